"""Attention by the short way (``common.short_way``): a call as the user made it, on the kernels. Imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
from fastattn.ops.common.short_way import Made, tensors_in, with_tensors, without_tensors

# Which gradient of the operator's is that of an argument of the public function.
_GRADIENTS = {"query": "d_query", "key": "d_key", "value": "d_value", "attn_mask": "d_bias",
              "alibi_slopes": "d_alibi_slopes", "sinks": "d_sinks"}  # fmt: skip


class Context(NamedTuple):
    """What the backward has to know of a call beside tensors.

    Attributes:
        arguments: of the public function, without their tensors.
        returned: which results the forward returned.
        has_seed: whether there is dropout, and its seed among what was kept.
    """

    arguments: Arguments
    returned: tuple[str, ...]
    has_seed: bool


def _call(arguments: Arguments) -> AttentionCall:
    words = arguments._asdict()
    del words["backend"]
    return make_call(**words)


def short_forward(arguments: Arguments, training: bool) -> Made:
    """The call's results, and what its backward reads: output, statistics, the seed if there is dropout, and the
    tensors of the call."""
    call = _call(arguments)
    seed = on_triton.draw_seed(call)
    inputs, options = operands(call, seed, "triton", keeps_statistics=training or call.return_lse)
    made = launch.forward(inputs, options)
    returned = {"output": True, "weights": call.weights != "none", "lse": call.return_lse}
    names = tuple(name for name, is_returned in returned.items() if is_returned)
    own = [made.output, made.statistics, *([] if seed is None else [seed])]
    return Made(
        results=tuple(getattr(made, name) for name in names),
        hidden=(),
        kept=tuple(own + tensors_in(arguments)) if training else (),
        context=Context(without_tensors(arguments), names, seed is not None),
    )


def short_backward(
    context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors among the arguments, by the kernels."""
    return _backward(context, kept, gradients, needs, launch.backward)


def short_backward_by_operators(
    context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """:func:`short_backward`, differentiable."""

    def run(*groups: Any) -> InputGradients:
        return InputGradients(*apply(AttentionBackward, *groups))

    return _backward(context, kept, gradients, needs, run)


def _backward(
    context: Context,
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    run: Callable[[OutputGradients, Kept, Needs, Inputs, Options], InputGradients],
) -> list[Tensor | None]:
    output, statistics, *rest = kept
    seed = rest.pop(0) if context.has_seed else None
    arguments: Arguments = with_tensors(context.arguments, iter(rest))
    inputs, options = operands(_call(arguments), seed, "triton", keeps_statistics=True)
    of_results = dict(zip(context.returned, gradients))
    d_output = of_results["output"]
    given = OutputGradients(
        d_output=torch.zeros_like(output) if d_output is None else d_output,
        d_lse=of_results.get("lse"),
        d_weights=of_results.get("weights"),
    )
    names = [name for name, value in arguments._asdict().items() for _ in tensors_in((value,))]
    wanted = {name for name, is_needed in zip(names, needs) if is_needed}
    flags = Needs("attn_mask" in wanted, "alibi_slopes" in wanted, "sinks" in wanted, d_weights_may_be_zeros=False)
    made = run(given, Kept(output, statistics), flags, inputs, options)
    return [
        getattr(made, _GRADIENTS[name]).reshape(tensor.shape) if name in wanted else None
        for name, tensor in zip(names, rest)
    ]
