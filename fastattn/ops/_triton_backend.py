"""The Triton backend: the fused kernels of ``fastattn_kernels``."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fastattn.ops import _autograd
from fastattn.ops._call import AttentionCall

MAX_HEAD_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Read once, because @triton.jit reads it once: with it the kernels run on CPU tensors, in Triton's interpreter.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
DEVICES = ("cpu",) if _INTERPRETED else ("cuda", "xpu")


def refusals(call: AttentionCall) -> list[str]:
    """Why the kernels cannot run ``call``; empty where they can."""
    reasons = []
    device, dtype = call.query.device.type, call.query.dtype
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if device not in DEVICES:
        accepted = "CUDA, ROCm and XPU devices, and the CPU under TRITON_INTERPRET=1"
        reasons.append(f"query is on {device}: it runs on {accepted}")
    if dtype not in DTYPES:
        reasons.append(f"query is {dtype}: it takes float16, bfloat16 and float32")
    for name, tensor in (("head_dim", call.query), ("value head_dim", call.value)):
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            reasons.append(f"{name}={tensor.shape[3]}: it takes 1 to {MAX_HEAD_DIM}")
    for name, tensor in (("attn_mask", call.bias), ("alibi_slopes", call.alibi_slopes), ("sinks", call.sinks)):
        if tensor is not None and tensor.dtype not in DTYPES:
            reasons.append(f"{name} is {tensor.dtype}: it takes float16, bfloat16 and float32")
    return reasons


def describe(call: AttentionCall) -> str:
    """Where the kernels would run."""
    return "Triton kernels" + (" in Triton's interpreter" if _INTERPRETED else "")


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``."""
    seed = None
    if call.dropout_p > 0.0:
        # On the device, from torch's own generator: torch.manual_seed rules it and CUDA graphs may capture it.
        seed = torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=call.query.device)
    return _autograd.apply(call, seed, "triton")
