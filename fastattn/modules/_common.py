"""What the modules share: the check of their backend, and what ``torch.jit.script`` gets in their place."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from torch import nn

from fastattn.ops.common.backends import Backend


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of one."""
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, get_args(Backend)))}")


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
