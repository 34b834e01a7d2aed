"""Memory that nobody has written holds NaN, so that an element that a kernel leaves out shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_ALLOCATORS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)


@contextlib.contextmanager
def poisoned_memory() -> Generator[None]:
    """Every buffer that Python code allocates uninitialised inside starts as NaN, or as the largest integer."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_poison(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_and_poison

    with contextlib.ExitStack() as stack:
        for owner, names in _ALLOCATORS:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, poisoning(getattr(owner, name))))
        yield
