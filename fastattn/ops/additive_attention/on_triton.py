"""Additive attention on the Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops.additive_attention import operator
from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common import backends

MAX_VALUE_DIM = 512


def refusals(call: AdditiveAttentionCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    reasons = backends.kernel_refusals("query", call.query)
    if not 1 <= call.value.shape[3] <= MAX_VALUE_DIM:
        reasons.append(f"value size={call.value.shape[3]}: it takes 1 to {MAX_VALUE_DIM}")
    return reasons + backends.dtype_refusals(("attn_mask", call.bias))


def describe(call: AdditiveAttentionCall) -> str:
    """Where the kernels would run."""
    return backends.WHERE


def run(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)``."""
    return operator.apply(call, "triton")
