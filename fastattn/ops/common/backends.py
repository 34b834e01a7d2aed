"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch

from fastattn.ops.attention import on_torch, on_triton
from fastattn.ops.attention.call import AttentionCall
from fastattn.ops.common import availability
from fastattn.ops.common.switch import Switch
from fastattn.ops.common.tracing import is_recorded

Backend = Literal["auto", "triton", "torch"]
ENVIRONMENT_VARIABLE = "FASTATTN_BACKEND"

_logger = logging.getLogger("fastattn")


def _checked(backend: str, source: str) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"{source}={backend!r}: expected one of {', '.join(map(repr, get_args(Backend)))}")
    return backend


_default_backend = Switch(_checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE))


def use_backend(backend: Backend) -> contextlib.AbstractContextManager[None]:
    """Make ``backend`` the default inside a ``with`` block (for the whole process: it is not thread-local).

    Where several threads are inside such blocks, that which was entered last rules all of them; each takes its own
    choice away when it is left, in whatever order that happens.

    Args:
        backend: ``"auto"`` (the default: the first backend that can), ``"triton"`` or ``"torch"``. One asked for by
            name refuses what it cannot run; it never falls back.

    Raises:
        ValueError: ``backend`` is none of these.
    """
    return _default_backend.set(_checked(backend, "backend"))


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
    """The backend that a call on ``device`` goes to unless it asks for something that one refuses."""
    wanted = _default_backend.value if backend is None else backend
    if wanted != "auto":
        return wanted
    # kernels are for this process; a graph for others has them only where they are asked for by name
    return "triton" if device.type in availability.DEVICES and not is_recorded() else "torch"


class _Call(Protocol):
    """What is asked of a call here."""

    @property
    def device(self) -> torch.device: ...


def choose(call: _Call, backend: str | None, triton_refusals: Callable[[Any], list[str]]) -> str:
    """The backend's name for ``call``; raise NotImplementedError where the one asked for by name refuses.

    ``auto`` asks triton first, where it runs at all. torch refuses nothing, so ``auto`` always ends with an answer.
    """
    wanted = _default_backend.value if backend is None else _checked(backend, "backend")
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


def run(call: AttentionCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``(output, weights or None, lse or None)`` of ``call`` on the backend that :func:`choose` names."""
    # A branch and not a table of modules: torch.compile follows it without guarding on module attributes.
    if choose(call, backend, on_triton.refusals) == "triton":
        return on_triton.run(call)
    return on_torch.run(call)
