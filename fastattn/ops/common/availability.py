"""Where the operators have a kernel, and where the Triton backend runs at all."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# Everywhere that torch has a device: the torch backend is plain torch, and asks nothing of a device but its operators.
OPERATOR_DEVICES = (
    "cpu", "cuda", "hip", "hpu", "ipu", "lazy", "maia", "mps", "mtia", "privateuseone", "ve", "vulkan", "xla", "xpu",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Read once, because @triton.jit reads it once: with it the kernels run on CPU tensors, in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")
WHERE = "Triton kernels" + (" in Triton's interpreter" if INTERPRETED else "")


def refusals(name: str, tensor: Tensor) -> list[str]:
    """Why no kernel can run on ``tensor``, the first argument of a call: the device, or triton itself."""
    reasons = []
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if tensor.device.type not in DEVICES:
        accepted = "CUDA, ROCm and XPU devices, and the CPU under TRITON_INTERPRET=1"
        reasons.append(f"{name} is on {tensor.device.type}: it runs on {accepted}")
    if tensor.is_nested:
        reasons.append(f"{name} is a nested tensor: it takes dense ones")
    return reasons + dtype_refusals((name, tensor))


def dtype_refusals(*named: tuple[str, Tensor | None]) -> list[str]:
    """Those of the named tensors whose dtype no kernel takes, each as a reason."""
    return [
        f"{name} is {tensor.dtype}: it takes float16, bfloat16 and float32"
        for name, tensor in named
        if tensor is not None and tensor.dtype not in DTYPES
    ]
