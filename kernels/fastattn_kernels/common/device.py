"""What the kernels must know of the device they run on."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs


class Target(NamedTuple):
    """A compilation target: ``("cuda", 90)``, ``("hip", "gfx942")``, ``("xpu", 0)`` or ``("interpreter", 0)``."""

    backend: str
    arch: int | str


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return knobs.runtime.interpret


@functools.lru_cache
def _driver_target(index: int | None) -> Target:
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        target: Any = triton.runtime.driver.active.get_current_target()
    return Target(target.backend, target.arch)


def target_of(device: torch.device) -> Target:
    """The target that kernels for tensors on ``device`` are compiled for."""
    if interpreting():
        return Target("interpreter", 0)
    return _driver_target(device.index if device.type == "cuda" else None)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device current: triton launches on the current one."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel run at once, at least: a guess where torch cannot ask the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if interpreting() else 64
