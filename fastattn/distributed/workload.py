"""A call of attention over a whole sequence, before it is sharded: its sizes, and the pairs that its mask lets be
seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.distributed.cluster import check_count
from fastattn.ops.common.checks import DTYPES


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call of self-attention, as :func:`fastattn.attention` would take it on one rank.

    Args:
        batch: sequences.
        heads: heads of queries.
        kv_heads: heads of keys and values, a divisor of ``heads``.
        length: tokens of a sequence, on all ranks together.
        head_dim: the size of a head, of values as of keys.
        dtype: of the inputs. Sums over ranks are float32, or float64 for float64 inputs.
        is_causal: whether a query sees no later key.
        window: ``(left, right)``, how many keys a query sees on each side beside its own, or None for no limit.
        training: whether there is a backward.

    Raises:
        ValueError: a size is not above 0, heads are not a multiple of ``kv_heads``, or a window is negative.
        TypeError: a size is no int, a flag no bool, or the dtype none that attention takes.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    training: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "length", "head_dim"):
            check_count(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: expected a divisor of heads={self.heads}")
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype={self.dtype!r}: expected float16, bfloat16, float32 or float64")
        for name in ("is_causal", "training"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected True or False")
        _check_window(self.window)

    @property
    def element_size(self) -> int:
        """Bytes of an element of query, key and value, and of what is sent of them."""
        return self.dtype.itemsize

    @property
    def sum_size(self) -> int:
        """Bytes of an element of what is summed over ranks: float32, or wider."""
        return max(4, self.dtype.itemsize)

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """How many keys a query sees to its left and to its right, None for no limit."""
        left, right = self.window or (None, None)
        return left, 0 if self.is_causal else right

    def pairs(self, first: int, stop: int) -> int:
        """How many pairs of a query and a key are seen by the queries ``first`` to ``stop - 1``, in one head."""
        left, right = self.bounds
        seen = self.length * (stop - first)
        if left is not None:  # query i does not see the first i - left keys
            seen -= _triangle(stop - 1 - left) - _triangle(first - 1 - left)
        if right is not None:  # nor the last length - 1 - right - i
            seen -= _triangle(self.length - 1 - right - first) - _triangle(self.length - 1 - right - stop)
        return seen

    def most_pairs(self, shards: int) -> int:
        """The pairs that the busiest of ``shards`` equal, contiguous pieces of the queries sees.

        The pairs of a query rise by one a query until the window or the sequence stops them, stay, and fall: the
        busiest piece is that in which they stop rising, or a neighbour of it.
        """
        left, right = self.bounds
        last, size = self.length - 1, self.length // shards
        stops = 0 if right is None else max(0, last - right)
        if left is not None:
            stops = min(stops, left)
        centre = min(stops, last) // size
        pieces = range(max(0, centre - 1), min(shards, centre + 2))
        return max(self.pairs(piece * size, (piece + 1) * size) for piece in pieces)


def _check_window(window: object) -> None:
    if window is None:
        return
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window={window!r}: expected a pair (left, right) or None")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"window={window!r}: expected 0 or more keys on each side, or None for no limit")


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, and 0 for a negative n."""
    return n * (n + 1) // 2 if n > 0 else 0
