"""What the modules share: checks of a backend and of a number, and what ``torch.jit.script`` gets in their place."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from torch import nn

from fastattn.ops.common.backends import Backend


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of one."""
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, get_args(Backend)))}")


def check_number(name: str, number: int, least: int = 1, most: int | None = None, what: str = "a number") -> None:
    """Raise unless ``number`` is an int from ``least`` to ``most``."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name}={number!r}: expected an int, got {type(number).__name__}")
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={number}: expected {what} {bounds}")


def plain_twin(module: nn.Module, kind: type[nn.Module], *ours: str) -> Any:
    """A ``kind`` of torch's with the state of ``module``, shared, but for the attributes named in ``ours``."""
    warnings.warn(
        f"torch.jit.script cannot compile fastattn.{type(module).__name__}: torch.nn.{kind.__name__}, on the same "
        "parameters, takes its place in the scripted model and in the model given",
        stacklevel=3,
    )
    plain = kind.__new__(kind)
    plain.__dict__.update({name: value for name, value in module.__dict__.items() if name not in ours})
    return plain
