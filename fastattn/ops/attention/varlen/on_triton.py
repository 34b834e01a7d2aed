"""Packed attention on the Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

from fastattn.ops.attention.varlen.contract import VarlenCall
from fastattn.ops.common import backends


def refusals(call: VarlenCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    return [*backends.kernel_refusals("query", call.query), "it does not take packed sequences yet"]
