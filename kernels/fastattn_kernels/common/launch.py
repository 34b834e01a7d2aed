"""How every launcher of this package launches a kernel: so that plans (``plans``) can record what a call launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastattn_kernels.common.device import device_guard


class _ThisThread(threading.local):
    """What belongs to one thread: the function that is told of its launches while a plan is recorded, else None."""

    recorder: Callable[..., None] | None = None


this_thread = _ThisThread()


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the device of a tensor.

    Args:
        kernel: a function of Triton or Gluon.
        grid: how many programs along each axis.
        on: a tensor on the device to launch on.
        *arguments: of the kernel: tensors, numbers, descriptors, None, and tuples of them.
        **constants: of the kernel, and the launch's options.
    """
    if this_thread.recorder is None:
        with device_guard(on):
            kernel[grid](*arguments, **constants)
    else:  # Triton's interpreter calls operators of torch: the modes are off, so that these are not recorded as well
        with device_guard(on), _disable_current_modes():
            compiled = kernel[grid](*arguments, **constants)
        this_thread.recorder(kernel, compiled, grid, on, arguments, constants)
