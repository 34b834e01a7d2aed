"""Blocks of rows and keys of a call, and the tensors that every operator over rows and keys allocates."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Which axes of a tensor follow the blocks: batch entries, rows or keys. None is an axis that every block has whole.
Axes = tuple[str | None, ...]
SCORES: Axes = ("batch", None, "rows", "keys")
OF_ROWS: Axes = ("batch", None, "rows")
OF_KEYS: Axes = ("batch", None, "keys")


class Part(Protocol):
    """A part of a call that is a call by itself."""

    def of(self, tensor: Tensor, axes: Axes) -> Tensor:
        """This part of a tensor, as a view."""
        ...


class Block(NamedTuple):
    """Some rows of some batch entries, and the range of keys outside which these rows see nothing."""

    batch: slice
    rows: slice
    keys: slice

    def place_in(self, tensor: Tensor, axes: Axes) -> tuple[slice, ...]:
        """Where this block lies in a tensor; axes of size 1 broadcast and stay whole."""
        return tuple(
            slice(None) if axis is None or size == 1 else getattr(self, axis) for axis, size in zip(axes, tensor.shape)
        )

    def of(self, tensor: Tensor, axes: Axes) -> Tensor:
        """This block of a tensor, as a view."""
        # narrow and not an index: an index that takes everything is torch.alias, for which vectorised Jacobians have no
        # batching rule
        for axis, part in enumerate(self.place_in(tensor, axes)):
            if part.start is not None and part.stop - part.start != tensor.shape[axis]:
                tensor = tensor.narrow(axis, part.start, part.stop - part.start)
        return tensor


def empty_in_order_of(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty dense tensor whose dimensions lie in memory in the order of ``like``'s.

    The output of attention over a ``[B, L, H, D]`` view then merges its heads without a copy, and the output over a
    ``[B, C, H * W]`` feature map is such a map again. An expanded dimension, whose elements lie in one place, gets the
    place that it has in a contiguous tensor: ahead of the one behind it.
    """
    steps: list[Any] = list(like.stride())
    for axis in reversed(range(like.dim() - 1)):
        if type(steps[axis]) is int and steps[axis] == 0:  # no symbol of a graph, which need not be looked at
            steps[axis] = steps[axis + 1] * like.shape[axis + 1]
    order = sorted(range(like.dim()), key=lambda axis: -steps[axis])
    return torch.empty_permuted(shape, order, dtype=dtype or like.dtype, device=like.device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics are float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
