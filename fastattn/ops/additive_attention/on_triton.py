"""Additive attention on the Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops.additive_attention import operator
from fastattn.ops.additive_attention.call import AdditiveCall
from fastattn.ops.common import availability

MAX_VALUE_DIM = 512


def refusals(call: AdditiveCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    reasons = availability.refusals("query", call.query)
    if not 1 <= call.value.shape[3] <= MAX_VALUE_DIM:
        reasons.append(f"value size={call.value.shape[3]}: it takes 1 to {MAX_VALUE_DIM}")
    return reasons + availability.dtype_refusals(("attn_mask", call.bias))


def describe(call: AdditiveCall) -> str:
    """Where the kernels would run."""
    return availability.WHERE


def run(call: AdditiveCall) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)``."""
    return operator.apply(call, "triton")
