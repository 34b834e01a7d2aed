"""The norms on the Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.common import backends
from fastattn.ops.residual_norm import operator
from fastattn.ops.residual_norm.contract import ResidualNormCall

MAX_SIZE = 262144


def refusals(call: ResidualNormCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    reasons = backends.kernel_refusals("x", call.x)
    size = call.x.shape[-1]
    if not 1 <= size <= MAX_SIZE:
        reasons.append(f"N={size}: it takes 1 to {MAX_SIZE}")
    reasons += [
        f"{name}={dtype}: it takes float16, bfloat16 and float32"
        for name, dtype in (("out_dtype", call.out_dtype), ("residual_dtype", call.residual_dtype))
        if dtype not in backends.KERNEL_DTYPES
    ]
    return reasons + backends.dtype_refusals(
        ("residual", call.residual),
        ("weight", call.weight),
        ("bias", call.bias),
        ("x_bias", call.x_bias),
        ("row_scale", call.row_scale),
    )


def describe(call: ResidualNormCall) -> str:
    """Where the kernels would run."""
    return backends.WHERE


def run(call: ResidualNormCall) -> tuple[Tensor, Tensor]:
    """``(norm, new residual)``."""
    if not call.round_residual and call.residual_dtype != torch.float32:
        # The backward needs the sum as it was normalised, unrounded: it is kept in float32, and rounded to be returned.
        output, total = run(call._replace(residual_dtype=torch.float32))
        return output, total.to(call.residual_dtype) if call.return_residual else total
    return operator.apply(call, draw_seed(call))


def draw_seed(call: ResidualNormCall) -> Tensor | None:
    """The seed and offset of a call's dropout; None without dropout."""
    if call.dropout_p == 0.0:
        return None
    # On the device, from torch's own generator: torch.manual_seed rules it and CUDA graphs may capture it.
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=call.x.device)
