"""Attention over a cache on the Triton backend: new tokens are put in, and the slots of a sequence divided."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastattn.ops.attention.kvcache import operator
from fastattn.ops.attention.kvcache.contract import KVCacheCall
from fastattn.ops.attention.on_triton import MAX_HEAD_DIM
from fastattn.ops.common import backends
from fastattn.ops.common.tracing import is_transformed


def refusals(call: KVCacheCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    inputs = call.inputs
    reasons = backends.kernel_refusals("query", inputs.query)
    for name, tensor in (("head_dim", inputs.query), ("value head_dim", inputs.value_cache)):
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            reasons.append(f"{name}={tensor.shape[3]}: it takes 1 to {MAX_HEAD_DIM}")
    reasons += backends.dtype_refusals(
        ("attn_mask", inputs.bias), ("alibi_slopes", inputs.alibi_slopes), ("sinks", inputs.sinks)
    )
    if is_transformed():
        reasons.append("the call is under torch.func or in forward mode: the kernels over a cache have no rules for it")
    functions = {"score_mod": call.score_mod, "mask_mod": call.mask_mod}
    read = [(f"a tensor that {name} reads", t) for name, f in functions.items() if f is not None for t in f.captured]
    reasons += backends.dtype_refusals(*((name, tensor) for name, tensor in read if tensor.is_floating_point()))
    asking = [
        "attn_mask" if name == "bias" else name
        for name, tensor in (*inputs._asdict().items(), *read)
        if tensor is not None and tensor.requires_grad
    ]
    if asking and torch.is_grad_enabled():
        reasons.append(
            f"gradients are asked for ({', '.join(asking)}): the kernels have none for a cache; run under "
            "torch.no_grad() or with backend='torch'"
        )
    return reasons


def describe(call: KVCacheCall) -> str:
    """Where the kernels would run, and which of them."""
    if backends.INTERPRETED or isinstance(call.inputs.query, FakeTensor):  # which lies nowhere
        return backends.WHERE
    from fastattn.ops.attention.kvcache import launch  # imports triton

    return f"{backends.WHERE}: {launch.describe(call.inputs, call.options)}"


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)``; the caches hold the new tokens afterwards."""
    return operator.apply(call)
