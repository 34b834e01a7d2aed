"""Attention by the short way (``common.short_way``): a call as the user made it, on the kernels. Imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import launch, on_triton
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import (
    Arguments,
    AttentionCall,
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
)
from fastattn.ops.attention.operator import AttentionBackward, operands
from fastattn.ops.common.operator import apply
from fastattn.ops.common.short_way import Saved

# Which gradient of the operator's is that of an argument of the public function.
_GRADIENTS = {"query": "d_query", "key": "d_key", "value": "d_value", "attn_mask": "d_bias",
              "alibi_slopes": "d_alibi_slopes", "sinks": "d_sinks"}  # fmt: skip


def _call(arguments: Arguments) -> AttentionCall:
    words = arguments._asdict()
    del words["backend"]
    return make_call(**words)


def short_forward(arguments: Arguments, training: bool) -> Saved:
    """The call's results, and what its backward reads: output, statistics and, with dropout, the seed."""
    call = _call(arguments)
    seed = on_triton.draw_seed(call)
    inputs, options = operands(call, seed, "triton", keeps_statistics=training or call.return_lse)
    made = launch.forward(inputs, options)
    results = [made.output]
    if call.weights != "none":
        results.append(made.weights)
    if call.return_lse:
        results.append(made.lse)
    kept = [made.output, made.statistics] if training else []
    if training and seed is not None:
        kept.append(seed)
    return Saved(tuple(results), tuple(kept))


def short_backward(
    arguments: Arguments, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors among the arguments, by the kernels."""
    return _backward(arguments, kept, gradients, needs, launch.backward)


def short_backward_by_operators(
    arguments: Arguments, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """:func:`short_backward`, differentiable in the arguments and in ``gradients``."""

    def run(*groups: Any) -> InputGradients:
        return InputGradients(*apply(AttentionBackward, *groups))

    return _backward(arguments, kept, gradients, needs, run)


def _backward(
    arguments: Arguments,
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    run: Callable[[OutputGradients, Kept, Needs, Inputs, Options], InputGradients],
) -> list[Tensor | None]:
    call = _call(arguments)
    seed = kept[2] if len(kept) > 2 else None
    inputs, options = operands(call, seed, "triton", keeps_statistics=True)
    d_output, *rest = gradients
    found = OutputGradients(
        d_output=torch.zeros_like(kept[0]) if d_output is None else d_output,
        d_lse=rest.pop() if call.return_lse else None,
        d_weights=rest.pop() if call.weights != "none" else None,
    )
    tensors = [
        (name, each)
        for name, value in arguments._asdict().items()
        for each in (value if isinstance(value, tuple) else (value,))
        if isinstance(each, Tensor)
    ]
    wanted = {name for (name, _), needed in zip(tensors, needs) if needed}
    flags = Needs("attn_mask" in wanted, "alibi_slopes" in wanted, "sinks" in wanted, d_weights_may_be_zeros=False)
    made = run(found, Kept(kept[0], kept[1]), flags, inputs, options)
    return [
        getattr(made, _GRADIENTS[name]).reshape(tensor.shape) if name in wanted else None for name, tensor in tensors
    ]
