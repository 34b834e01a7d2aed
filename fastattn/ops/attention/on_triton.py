"""The Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastattn.ops.attention import operator
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.common import backends

MAX_HEAD_DIM = 512


def refusals(call: AttentionCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    reasons = backends.kernel_refusals("query", call.query)
    for name, tensor in (("head_dim", call.query), ("value head_dim", call.value)):
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            reasons.append(f"{name}={tensor.shape[3]}: it takes 1 to {MAX_HEAD_DIM}")
    read = () if call.score_mod is None else call.score_mod.captured
    return reasons + backends.dtype_refusals(
        ("attn_mask", call.bias),
        ("alibi_slopes", call.alibi_slopes),
        ("sinks", call.sinks),
        *(("a tensor that score_mod reads", tensor) for tensor in read if tensor.is_floating_point()),
    )


def describe(call: AttentionCall) -> str:
    """Where the kernels would run, and which of them."""
    if backends.INTERPRETED or isinstance(call.query, FakeTensor):  # which lies nowhere
        return backends.WHERE
    from fastattn.ops.attention import launch  # imports triton

    seed = torch.empty(2, dtype=torch.int64, device="cpu") if call.dropout_p > 0.0 else None
    return f"{backends.WHERE}: {launch.describe(*operator.operands(call, seed, 'triton'))}"


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``."""
    return operator.apply(call, draw_seed(call), "triton")


def draw_seed(call: AttentionCall) -> Tensor | None:
    """The seed and offset of a call's dropout; None without dropout."""
    if call.dropout_p == 0.0:
        return None
    # On the device, from torch's own generator: torch.manual_seed rules it and CUDA graphs may capture it.
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=call.query.device)
