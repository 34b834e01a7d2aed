"""Marks of rows that are not finite, and how a careful launch finds its tiles by them.

Wherever something is masked, the kernels of a backward, those of the forward in Gluon and that of additive attention
mark each row ``[B, H, length]`` of what they write with a byte: 1 where it holds NaN or inf, else 0. The careful launch
that follows computes the tiles with a marked row again. It has few programs, each of which looks after many tiles:
where nothing is marked, all that it does is to read the marks. The plain forward of attention needs none of this: it
computes such a tile again itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.device import multiprocessors
from fastattn_kernels.common.packed import count_tiles, offset_of, sequence_of
from fastattn_kernels.common.problem import Problem

# Marks that a program of a careful launch reads at once.
_AT_ONCE = tl.constexpr(1024)
# Programs of a careful launch for each multiprocessor: no more than its registers leave room for, since every program
# that has to wait for another to end adds about a microsecond to every masked call.
_CAREFUL_PROGRAMS = 2


@triton.jit
def rows_not_finite(tile):
    """The marks of a tile's rows. An element times 0 is 0, or NaN where the element is NaN or inf, and so is their sum:
    one multiply-add an element. Comparing every element would make the Hopper forward spill at head size 256."""
    return tl.where(tl.sum(tile * 0.0, axis=1) == 0.0, 0, 1)


@triton.jit
def _first_row(tile, length, BLOCK: tl.constexpr, offsets_ptr, sequences):
    """The first row of a tile, both counted over all heads: where the tile before it ends."""
    tiles = count_tiles(length, sequences, BLOCK)
    row = tile % tiles * BLOCK
    if offsets_ptr is not None:
        # Rows in front of the first sequence and behind the last are never marked: it does not matter whose they are.
        sequence, first_row, number = sequence_of(tile % tiles, offsets_ptr, sequences, length, BLOCK)
        end = offset_of(sequence + 1, offsets_ptr, length)
        row = tl.where(tile % tiles == 0, 0, tl.minimum(first_row + tl.maximum(number, 0) * BLOCK, end))
    return (tile // tiles).to(tl.int64) * length + row


@triton.jit
def _any_marked(marks_ptr, first, last, length, BLOCK: tl.constexpr, offsets_ptr, sequences):
    """Whether a row of one of the tiles from ``first`` to before ``last`` is marked."""
    end = _first_row(last, length, BLOCK, offsets_ptr, sequences)
    found = 0
    for start in tl.range(_first_row(first, length, BLOCK, offsets_ptr, sequences), end, _AT_ONCE):
        row = start + tl.arange(0, _AT_ONCE)
        found = tl.maximum(found, tl.max(tl.load(marks_ptr + row, mask=row < end, other=0).to(tl.int32), 0))
    return found > 0


@triton.jit
def is_marked(marks_ptr, tile, length, BLOCK: tl.constexpr, offsets_ptr=None, sequences=None):
    """Whether a row of a tile of BLOCK rows is marked; tiles are counted over all heads, of ``length`` rows each, which
    packed sequences divide at ``offsets_ptr``."""
    return _any_marked(marks_ptr, tile, tile + 1, length, BLOCK, offsets_ptr, sequences)


@triton.jit
def tiles_to_look_at(marks_ptr, tiles, length, BLOCK: tl.constexpr, offsets_ptr=None, sequences=None):
    """The first of this program's share of all ``tiles``, and the end of it: none if no row of the share is marked."""
    share = tl.cdiv(tiles, tl.num_programs(0))
    first = tl.minimum(tl.program_id(0) * share, tiles)
    last = tl.minimum(first + share, tiles)
    return first, tl.where(_any_marked(marks_ptr, first, last, length, BLOCK, offsets_ptr, sequences), last, first)


class GradientMarks(NamedTuple):
    """Marks of the rows of dQ, ``[B, H, L]``, and of the keys, ``[B, Hk, S]``, of which dK or dV is not finite."""

    of_rows: Tensor | None
    of_keys: Tensor | None


def empty_marks(problem: Problem, tensor: Tensor) -> Tensor | None:
    """Where a kernel is to mark the rows of a tensor ``[B, H, length, size]``; None where nothing is hidden, and so
    nothing can leak. Every row is written, and nothing has to be zeroed, unless sequences are packed, between which
    there may be rows."""
    if not problem.masks_pairs():
        return None
    empty = torch.empty if problem.packed is None else torch.zeros
    return empty(tensor.shape[:3], dtype=torch.int8, device=tensor.device)


def empty_gradient_marks(problem: Problem) -> GradientMarks:
    """:func:`empty_marks` of all gradients."""
    return GradientMarks(empty_marks(problem, problem.query), empty_marks(problem, problem.key))


def few_programs(tiles: int, device: torch.device) -> int:
    """The programs of a careful launch that looks after so many tiles."""
    return min(tiles, _CAREFUL_PROGRAMS * multiprocessors(device))
