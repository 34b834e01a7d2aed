"""Packed attention on the Triton backend: the fused kernels of ``fastattn_kernels``, for which nothing is waited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastattn.ops.attention import on_triton as of_attention
from fastattn.ops.attention.varlen import modified, operator
from fastattn.ops.attention.varlen.contract import VarlenCall
from fastattn.ops.common import backends


def refusals(call: VarlenCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can: the reasons are those of ``attention``."""
    own: Any = call  # which has all that is asked for under the same names
    return of_attention.refusals(own)


def describe(call: VarlenCall) -> str:
    """Where the kernels would run, and which of them."""
    if backends.INTERPRETED or isinstance(call.query, FakeTensor):  # which lies nowhere
        return backends.WHERE
    if call.score_mod is not None or call.mask_mod is not None:
        return of_attention.describe(modified.as_attention(call))
    from fastattn.ops.attention.varlen import launch  # imports triton

    return f"{backends.WHERE}: {launch.describe(*operator.operands(call, None, 'triton'))}"


def run(call: VarlenCall) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)``."""
    if call.score_mod is not None or call.mask_mod is not None:
        return modified.run(call, "triton")
    seed = None
    if call.dropout_p > 0.0:
        seed = torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=call.device)
    return operator.apply(call, seed, "triton")
