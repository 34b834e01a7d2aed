"""Tiles in and out of memory, the step of online softmax, and the product that keeps masked-out NaN and inf in place.

A tensor ``[B, H, length, size]`` comes as ``arguments.Heads``, one head of it as ``arguments.Matrix``.
"""

import triton
import triton.language as tl

from fastattn_kernels.common.arguments import Matrix
from fastattn_kernels.common.masking import INFINITY

_WHOLE_HALF = tl.constexpr(256)


@triton.jit
def head_of(tensor, batch, head, first=None):
    """The matrix of one head; of a packed sequence (``batch``, an axis of stride 0), from its first row (key) on."""
    ptr = tensor.ptr + batch * tensor.stride_b + head * tensor.stride_h
    if first is not None:
        ptr += first * tensor.stride_m
    return Matrix(ptr, tensor.stride_m, tensor.stride_d)


@triton.jit
def columns_from(matrix, first_col):
    """The matrix without its columns before ``first_col``."""
    ptr = matrix.ptr + tl.cast(matrix.stride_col, tl.int64) * first_col
    return Matrix(ptr, matrix.stride_row, matrix.stride_col)


@triton.jit
def tile_pointers(matrix, row_start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers ``[ROWS, COLS]`` of the tile that starts at ``row_start``. All offsets are 64 bits wide: a long
    sequence of wide rows, or a far-apart stride, passes 2^31 elements."""
    row_offsets = tl.arange(0, ROWS).to(tl.int64) * matrix.stride_row
    col_offsets = tl.arange(0, COLS).to(tl.int64) * matrix.stride_col
    start_ptr = matrix.ptr + tl.cast(row_start, tl.int64) * matrix.stride_row
    return start_ptr + row_offsets[:, None] + col_offsets[None, :]


@triton.jit
def load_tile(
    matrix, row_start, row_end, ROWS: tl.constexpr, COLS: tl.constexpr, USED_COLS: tl.constexpr, BOUND: tl.constexpr
):
    """A ``[ROWS, COLS]`` tile; zero in columns from USED_COLS on and, if BOUND, in rows from ``row_end`` on."""
    ptrs = tile_pointers(matrix, row_start, ROWS, COLS)
    rows = row_start + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    if BOUND:
        if USED_COLS < COLS:
            tile = tl.load(ptrs, mask=(rows < row_end)[:, None] & (cols < USED_COLS)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs, mask=(rows < row_end)[:, None], other=0.0)
    else:
        if USED_COLS < COLS:
            tile = tl.load(ptrs, mask=(cols < USED_COLS)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    matrix, row_start, row_end, tile, ROWS: tl.constexpr, COLS: tl.constexpr, USED_COLS: tl.constexpr
):  # fmt: skip
    """Store a ``[ROWS, COLS]`` tile up to ``row_end`` and USED_COLS, rounded to the destination's dtype."""
    ptrs = tile_pointers(matrix, row_start, ROWS, COLS)
    rows = row_start + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < row_end)[:, None] & (cols < USED_COLS)[None, :]
    tl.store(ptrs, tile.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(acc, row_max, row_sum, scores, unit):
    """``(P, acc, row_max, row_sum)`` after one more tile of scores: P is not divided by the sum yet, and ``acc`` is
    relative to the new maximum. ``unit`` brings the scores to base 2, in the multiply-add of the exponent."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    # a row with no visible key keeps max = -inf; a finite pivot avoids -inf - -inf
    pivot = tl.where(new_max == -INFINITY, 0.0, new_max)
    p = tl.exp2(scores * unit - pivot[:, None])
    correction = tl.exp2(row_max - pivot)
    return p, acc * correction[:, None], new_max, row_sum * correction + tl.sum(p, 1)


@triton.jit
def store_statistics(statistics_ptr, row, seqlen_q, row_max, inverse_sum, all_rows=None):
    """Store what :func:`load_statistics` loads, of the rows of one head."""
    if all_rows is None:
        all_rows = seqlen_q
    tl.store(statistics_ptr + row, row_max, mask=row < seqlen_q)
    tl.store(statistics_ptr + all_rows + row, inverse_sum, mask=row < seqlen_q)


@triton.jit
def load_statistics(statistics_ptr, row, seqlen_q, all_rows=None):
    """``(maximum, 1 / sum)`` of rows: ``exp2(score - maximum) / sum`` is the probability. Past the end the maximum is
    +inf, so that the probability is 0 whatever the score is. A head has ``all_rows`` rows in memory: ``seqlen_q``,
    unless its sequences are packed.

    Two numbers and not the LSE, ``maximum + log2(sum)``: its rounding to float32 gives the probabilities a relative
    error as large as an ulp of the LSE itself, and where a bias is finfo.min the sum is lost in it altogether.
    """
    if all_rows is None:
        all_rows = seqlen_q
    row_max = tl.load(statistics_ptr + row, mask=row < seqlen_q, other=INFINITY)
    inverse_sum = tl.load(statistics_ptr + all_rows + row, mask=row < seqlen_q, other=0.0)
    return row_max, inverse_sum


@triton.jit
def weighted_sum(weights, x, acc, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + weights @ x``. CAREFUL: with ``0 * NaN = 0 * inf = 0``, so that what is masked out never leaks."""
    if CAREFUL:
        x32 = x.to(tl.float32)
        finite = tl.abs(x32) < INFINITY
        touched = (weights != 0).to(x.dtype)
        up = tl.where((x32 == INFINITY) | (x32 != x32), 1.0, 0.0).to(x.dtype)
        down = tl.where((x32 == -INFINITY) | (x32 != x32), 1.0, 0.0).to(x.dtype)
        acc = tl.dot(weights, tl.where(finite, x32, 0.0).to(x.dtype), acc, input_precision=PRECISION)
        acc += tl.where(tl.dot(touched, up, input_precision=PRECISION) > 0, INFINITY, 0.0)
        acc -= tl.where(tl.dot(touched, down, input_precision=PRECISION) > 0, INFINITY, 0.0)
    else:
        acc = tl.dot(weights, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product(
    a, a_matrix, a_start, a_end, b, b_matrix, b_start, b_end,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, USED: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE_FLOAT32: tl.constexpr, WHOLE_HALF: tl.constexpr = _WHOLE_HALF,
):  # fmt: skip
    """``a @ b^T`` of tiles ``[ROWS, BLOCK]`` and ``[COLS, BLOCK]``.

    Those wider than WHOLE_HALF (float32: WHOLE_FLOAT32) are read again, in strips: whole, they would fill the registers
    as operands, float32 ones most of all, since multiply-adds want whole rows in every thread.
    """
    IS_FLOAT32: tl.constexpr = a_matrix.ptr.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = 64 if IS_FLOAT32 else WHOLE_HALF
    WHOLE: tl.constexpr = WHOLE_FLOAT32 if IS_FLOAT32 else WHOLE_HALF
    if BLOCK > WHOLE:
        result = tl.zeros([ROWS, COLS], tl.float32)
        for strip in tl.static_range(BLOCK // WIDTH):
            a_strip = columns_from(a_matrix, strip * WIDTH)
            b_strip = columns_from(b_matrix, strip * WIDTH)
            left = load_tile(a_strip, a_start, a_end, ROWS, WIDTH, USED - strip * WIDTH, True)
            right = load_tile(b_strip, b_start, b_end, COLS, WIDTH, USED - strip * WIDTH, True)
            result = tl.dot(left, tl.trans(right), result, input_precision=PRECISION)
    else:
        result = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return result


@triton.jit
def is_off(only_if):
    """Whether a kernel that was launched under a condition (``arguments.OnlyIf``) has nothing to do."""
    return tl.load(only_if.flag_ptr).to(tl.int32) != only_if.expected
