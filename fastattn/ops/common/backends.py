"""Which backend runs a call and why the others do not, and which of the Triton backend's kernels of attention run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from fastattn.ops.common.switch import Switch
from fastattn.ops.common.tracing import is_recorded

Backend = Literal["auto", "triton", "torch"]
Kernels = Literal["auto", "gluon", "triton"]
BACKEND_VARIABLE, KERNELS_VARIABLE = "FASTATTN_BACKEND", "FASTATTN_KERNELS"

_logger = logging.getLogger("fastattn")


# ------------------------------------------------------------------------------------------------ where the kernels run

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Read once, because @triton.jit reads it once: with it the kernels run on CPU tensors, in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")
WHERE = "Triton kernels" + (" in Triton's interpreter" if INTERPRETED else "")


def kernel_refusals(name: str, tensor: Tensor) -> list[str]:
    """Why no kernel can run on ``tensor``, the first argument of a call: its device or dtype, or triton is missing."""
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
    """A reason for each of the named tensors whose dtype no kernel takes."""
    return [
        f"{name} is {tensor.dtype}: it takes float16, bfloat16 and float32"
        for name, tensor in named
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES
    ]


# --------------------------------------------------------------------------------------------------- which backend runs


def _checked(value: str, accepted: Any, source: str) -> str:
    if value not in get_args(accepted):
        raise ValueError(f"{source}={value!r}: expected one of {', '.join(map(repr, get_args(accepted)))}")
    return value


default_backend = Switch(_checked(os.environ.get(BACKEND_VARIABLE, "auto"), Backend, BACKEND_VARIABLE))


def use_backend(backend: Backend) -> contextlib.AbstractContextManager[None]:
    """Make ``backend`` the default inside a ``with`` block (for the whole process: it is not thread-local).

    Where several threads are inside such blocks, the one entered last decides for all of them. Leaving a block takes
    away that block's own choice, in whatever order the blocks are left.

    Args:
        backend: ``"auto"`` (the default: the first backend that can), ``"triton"`` or ``"torch"``. One asked for by
            name refuses what it cannot run; it never falls back.

    Raises:
        ValueError: ``backend`` is none of these.
    """
    return default_backend.set(_checked(backend, Backend, "backend"))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`fastattn.explain` found.

    Attributes:
        backend: the backend that would run, or None where the one asked for by name refuses.
        path: what that backend would do, in a few words; empty where none would run.
        refusals: for each backend that cannot run the call, its reasons.
    """

    backend: str | None
    path: str
    refusals: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.path}" if self.backend else "no backend would run"]
        lines += [f"not {name}: {'; '.join(reasons)}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def default_for(device: torch.device, backend: str | None) -> str:
    """The backend that a call on ``device`` goes to, unless that backend refuses something the call asks for."""
    wanted = default_backend.value if backend is None else backend
    if wanted != "auto":
        return wanted
    # An exported graph is run by other processes and runtimes, which may not have the kernels, so that auto leaves them
    # out of it. Asked for by name they are put in.
    return "triton" if device.type in DEVICES and not is_recorded() else "torch"


def is_torch_on_cpu(backend: str | None) -> bool:
    """Whether a call on the CPU that nothing traces goes to the torch backend; faster than :func:`default_for`."""
    wanted = default_backend.value if backend is None else backend
    return wanted == "torch" or (wanted == "auto" and "cpu" not in DEVICES)


class _Call(Protocol):
    """What this module reads of a call."""

    @property
    def device(self) -> torch.device: ...


def choose(call: _Call, backend: str | None, triton_refusals: Callable[[Any], list[str]]) -> str:
    """The backend's name for ``call``; raise NotImplementedError where the one asked for by name refuses.

    ``auto`` asks triton first, where it runs at all. torch refuses nothing, so ``auto`` always ends with an answer.
    """
    wanted = default_backend.value if backend is None else _checked(backend, Backend, "backend")
    if wanted == "torch" or default_for(call.device, wanted) == "torch":
        return "torch"
    reasons = triton_refusals(call)
    if not reasons:
        return "triton"
    if wanted == "triton":
        raise NotImplementedError(f"the triton backend refuses this call: {'; '.join(reasons)}")
    if not torch.compiler.is_compiling():
        _say_once(f"auto runs the torch backend, since triton refuses: {'; '.join(reasons)}")
    return "torch"


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message)


def explain_call(
    call: _Call,
    backend: str | None,
    refusals: Callable[[Any], list[str]],
    describe: dict[str, Callable[[Any], str]],
) -> Explanation:
    """:func:`choose`, with its reasons instead of an exception, and what each backend says that it would do."""
    reasons = tuple(refusals(call))
    refused = {"triton": reasons} if reasons else {}
    try:
        chosen = choose(call, backend, refusals)
    except NotImplementedError:
        return Explanation(None, "", refused)
    return Explanation(chosen, describe[chosen](call), refused)


# --------------------------------------------------------------------------------------- which kernels of attention run


class KernelChoice(NamedTuple):
    """What :func:`use_kernels` chooses."""

    kernels: Kernels = "auto"
    deterministic: bool = True


def _choice_of(kernels: str, source: str, deterministic: bool = True) -> KernelChoice:
    return KernelChoice(cast(Kernels, _checked(kernels, Kernels, source)), deterministic)


chosen_kernels = Switch(_choice_of(os.environ.get(KERNELS_VARIABLE, "auto"), KERNELS_VARIABLE))


def use_kernels(kernels: Kernels = "auto", *, deterministic: bool = True) -> contextlib.AbstractContextManager[None]:
    """Choose among the Triton backend's kernels of attention inside a ``with`` block (for the whole process).

    Blocks of several threads go together as those of :func:`use_backend` do.

    The choice is read when a kernel is launched: a backward that runs after the block follows what is chosen then.

    Args:
        kernels: ``"auto"`` (the default, also of the environment variable ``FASTATTN_KERNELS``): on Hopper those in
            Gluon where they can, else those in plain Triton; ``"gluon"``: those, or NotImplementedError with the
            reasons; ``"triton"``: the plain ones.
        deterministic: False lets the backward add up the query's gradient in no fixed order, in one pass instead of
            two, where that is expected to be faster: five matrix products instead of seven.

    Raises:
        ValueError: ``kernels`` is none of these.
    """
    return chosen_kernels.set(_choice_of(kernels, "kernels", deterministic))


def kernel_choice() -> KernelChoice:
    """What :func:`use_kernels`, or the environment, has chosen."""
    return chosen_kernels.value
