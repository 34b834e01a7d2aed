"""Tiles of rows of matrices ``[rows, size]``, the last axis of tensors of any rank, read as they lie.

A matrix comes as :class:`RowMatrix`: where a batch is transposed or broadcast, or heads lie inside, up to three numbers
tell rows apart, and nothing is copied. ``rows`` are ``[M, 1]`` and 64 bits wide, ``cols`` are ``[1, N]``.
"""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.dropout import dropout_scale


class RowMatrix(NamedTuple):
    """A matrix whose rows are told apart by up to three numbers, of an outer, a middle and an inner axis."""

    ptr: Any
    stride_outer: Any
    stride_middle: Any
    stride_inner: Any
    stride_col: Any


class RowAxes(NamedTuple):
    """How many rows the middle and the inner axis have; None where there is one outer, or one middle row."""

    middle_rows: Any
    inner_rows: Any


@triton.jit
def row_pointers(matrix, rows, cols, row_axes):
    """Pointers to the elements at ``rows`` and ``cols``; all offsets are 64 bits wide."""
    middle_rows, inner_rows = row_axes.middle_rows, row_axes.inner_rows
    if inner_rows is None:
        offsets = rows * matrix.stride_inner
    else:
        offsets = (rows % inner_rows) * matrix.stride_inner
        rows = rows // inner_rows
        if middle_rows is None:
            offsets += rows * matrix.stride_middle
        else:
            offsets += (rows % middle_rows) * matrix.stride_middle + (rows // middle_rows) * matrix.stride_outer
    return matrix.ptr + offsets + cols.to(tl.int64) * matrix.stride_col


@triton.jit
def load_rows(matrix, rows, cols, row_axes, inside, EVICTION: tl.constexpr):
    """A float32 tile, zero where not ``inside``."""
    ptrs = row_pointers(matrix, rows, cols, row_axes)
    return tl.load(ptrs, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def store_rows(matrix, rows, cols, row_axes, inside, tile):
    """Store a tile, rounded to the destination's dtype."""
    ptrs = row_pointers(matrix, rows, cols, row_axes)
    tl.store(ptrs, tile.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(vector_ptr, cols, size):
    """A float32 ``[1, N]`` of what all rows share; it stays in the cache while rows stream past it."""
    return tl.load(vector_ptr + cols, mask=cols < size, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def row_dropout_factor(rows, start, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout multiplies each element of the tile by whose first column is ``start``, a multiple of four.

    One call of Philox gives four numbers, which serve four neighbouring columns: 14 integer operations an element. With
    a call for each element they would be 56, and the norm would wait for random numbers, not for memory.
    """
    seed, offset = tl.load(dropout.state_ptr), tl.load(dropout.state_ptr + 1).to(tl.int32)
    quads = start // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    a, b, c, d = tl.philox(
        seed, zeros + quads, zeros + rows.to(tl.int32), zeros + (rows >> 32).to(tl.int32), zeros + offset, n_rounds=7
    )
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_M, BLOCK_N])  # in the order a, b, c, d
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout.p, dropout_scale(dropout), 0.0)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the leading axes of some tensors become rows.

    Attributes:
        count: how many rows there are.
        axes: the sizes and the tensors' strides of the axes that tell rows apart, three at most, outer first.
        tensors: the tensors, copied where their rows need more than three strides.
    """

    count: int
    axes: tuple[tuple[int, tuple[int, ...]], ...]
    tensors: tuple[Tensor | None, ...]

    @staticmethod
    def of(*tensors: Tensor | None) -> "Rows":
        """The rows that tensors ``[..., N]`` of one leading shape have in common."""
        given = [t for t in tensors if t is not None]
        shape = given[0].shape[:-1]
        axes: list[tuple[int, tuple[int, ...]]] = []
        for axis, size in enumerate(shape if shape.numel() else ()):
            if size == 1:
                continue
            strides = tuple(t.stride(axis) for t in given)
            if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], strides)):
                axes[-1] = (axes[-1][0] * size, strides)
            else:
                axes.append((size, strides))
        if len(axes) > 3:
            return Rows.of(*(None if t is None else t.contiguous() for t in tensors))
        return Rows(shape.numel(), tuple(axes), tensors)

    def sizes(self) -> tuple[int | None, int | None]:
        """The kernel arguments ``middle_rows`` and ``inner_rows``."""
        sizes = [size for size, _ in self.axes]
        return sizes[1] if len(sizes) == 3 else None, sizes[-1] if len(sizes) >= 2 else None

    def arguments(self) -> list[RowMatrix | None]:
        """The matrices, as kernel arguments, in the order in which the tensors were given."""
        present = 0
        matrices: list[RowMatrix | None] = []
        for tensor in self.tensors:
            if tensor is None:
                matrices.append(None)
                continue
            strides = [strides[present] for _, strides in self.axes]
            matrices.append(RowMatrix(tensor, *[0] * (3 - len(strides)), *strides, tensor.stride(-1)))
            present += 1
        return matrices
