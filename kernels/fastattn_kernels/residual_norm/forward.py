"""Forward: ``r = residual + dropout(x + x_bias) * row_scale``, and the layer or RMS norm of ``r``, in one pass
(arXiv:1607.06450, arXiv:1910.07467)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.config import Config
from fastattn_kernels.common.launch import launch
from fastattn_kernels.residual_norm.config import norm_forward_config
from fastattn_kernels.residual_norm.problem import RUN_TIME, NormProblem, triton_dtype
from fastattn_kernels.residual_norm.rows import RowAxes, Rows, load_rows, load_vector, row_dropout_factor, store_rows


@triton.jit
def _summed(
    x, residual, x_bias_ptr, row_scale, dropout, new_residual, rows, start, row_count, size, row_axes,
    SUM_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The float32 tile of ``r`` whose first column is ``start``, zero outside; stored where there is a place for it."""
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < row_count) & (cols < size)
    total = load_rows(x, rows, cols, row_axes, inside, EVICTION)
    if x_bias_ptr is not None:
        total += load_vector(x_bias_ptr, cols, size)
    if dropout is not None:
        total *= row_dropout_factor(rows, start, dropout, BLOCK_M, BLOCK_N)
    if row_scale is not None:
        total *= load_rows(row_scale, rows, cols * 0, row_axes, rows < row_count, "evict_last")
    if residual is not None:
        total += load_rows(residual, rows, cols, row_axes, inside, EVICTION)
    total = total.to(SUM_DTYPE).to(tl.float32)  # the norm is that of what is stored, and what the backward reads
    if new_residual is not None:
        store_rows(new_residual, rows, cols, row_axes, inside, total)
    return total


@triton.jit
def _merged_statistics(pivot, shift, squares, tile, start, size, BLOCK_N: tl.constexpr, IS_RMS: tl.constexpr):
    """Statistics of rows ``[M, 1]`` up to column ``start``, with those of the tile from there on merged in (Chan,
    Golub, LeVeque 1979): the mean is ``pivot + shift``, ``squares`` the sum of squared distances from it.

    Where a row lies a thousand deviations away from zero, the rounding of its mean to float32 is an error of many ulps
    of a deviation. So the mean is two numbers: the pivot, as near as float32 comes, and the shift, what is missing. The
    tile, which is zero outside, takes two passes over registers: ``E[x^2] - E[x]^2`` would cancel all digits there.
    """
    if IS_RMS:
        squares += tl.sum(tile * tile, 1)[:, None]
    else:
        here = tl.minimum(size - start, BLOCK_N)
        # Near the largest float32 the sum of a row overflows, and so does a distance from the mean, and inf * 0 is NaN.
        # So the elements are scaled down before they are summed; in wide tiles only where the sum overflowed, since the
        # scaled elements take 19 registers there, while in narrow tiles a branch would take 8. Beyond 2^100, where a
        # distance from the mean is 0 or its square inf, distances are taken from 0.
        if BLOCK_N < 4096:
            middle = tl.sum(tile * 2.0**-20, 1)[:, None] * (2.0**20 / here)
        else:
            middle = tl.sum(tile, 1)[:, None] / here
            if tl.max(tl.abs(middle)) == float("inf"):
                middle = tl.sum(tile * 2.0**-20, 1)[:, None] * (2.0**20 / here)
        is_beyond = (tl.abs(middle) > 2.0**100) & (tl.abs(middle) < float("inf"))
        middle = tl.where(is_beyond, 0.0, middle)
        distance = tl.where(start + tl.arange(0, BLOCK_N)[None, :] < size, tile - middle, 0.0)
        missed = tl.sum(distance, 1)[:, None] / here
        missed = tl.where(is_beyond | (tl.abs(missed) == float("inf")), 0.0, missed)
        pivot = tl.where(start == 0, middle, pivot)
        share = here / (start + here).to(tl.float32)
        step = (middle - pivot) + missed - shift
        # Variances beyond float32 become inf, never NaN: neither by inf - inf, here, nor by 0 * inf, as the square of
        # the step times the first block's start of 0 would be.
        scattered = tl.sum(distance * distance, 1)[:, None]
        squares += tl.where(scattered < float("inf"), scattered - here * missed * missed, scattered)
        squares += step * (start * share) * step
        shift += step * share
    return pivot, shift, squares


@triton.jit
def _inverse_root(variance):
    """``1 / sqrt(variance)``: the approximate instruction, whose error would scale whole rows, and a step of Newton's.
    The exact square root is a function call, around which registers spill."""
    approximate = tl.rsqrt(variance)
    refined = approximate * (1.5 - 0.5 * variance * approximate * approximate)
    return tl.where((approximate > 0.0) & (approximate < float("inf")), refined, approximate)


@triton.jit
def _finished_statistics(statistics_ptr, pivot, shift, squares, eps, rows, row_count, size, IS_RMS: tl.constexpr):
    """The inverse deviation of rows; stored, and the mean's two parts behind it, where there is a place for them."""
    rstd = _inverse_root(squares / size + tl.cast(eps, tl.float32))
    if statistics_ptr is not None:
        tl.store(statistics_ptr + rows, rstd, mask=rows < row_count)
        if not IS_RMS:
            tl.store(statistics_ptr + row_count + rows, pivot, mask=rows < row_count)
            tl.store(statistics_ptr + row_count + (row_count + rows), shift, mask=rows < row_count)
    return rstd


@triton.jit
def _store_norm(
    output, tile, pivot, shift, rstd, weight_ptr, bias_ptr, rows, cols, row_count, size, row_axes,
    IS_RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Normalise a tile of ``r`` and store it."""
    if IS_RMS:
        normal = tile * rstd
    else:
        normal = (tile - pivot - shift) * rstd
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, cols, size)
        if UNIT_OFFSET:
            weight += 1.0
        normal *= weight
    if bias_ptr is not None:
        normal += load_vector(bias_ptr, cols, size)
    store_rows(output, rows, cols, row_axes, (rows < row_count) & (cols < size), normal)


@triton.jit(do_not_specialize=RUN_TIME)
def _residual_norm_fwd_kernel(
    x, residual, weight_ptr, bias_ptr, x_bias_ptr, row_scale, dropout, output, new_residual, statistics_ptr,
    row_count, size, middle_rows, inner_rows, eps,
    IS_RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, SUM_DTYPE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows: in one tile (WHOLE), or block by block of columns, twice."""
    row_axes = RowAxes(middle_rows, inner_rows)
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    lanes = tl.arange(0, BLOCK_N)[None, :]
    pivot = tl.zeros([BLOCK_M, 1], tl.float32)
    shift = tl.zeros([BLOCK_M, 1], tl.float32)
    squares = tl.zeros([BLOCK_M, 1], tl.float32)
    if WHOLE:
        tile = _summed(
            x, residual, x_bias_ptr, row_scale, dropout, new_residual, rows, 0, row_count, size, row_axes,
            SUM_DTYPE, BLOCK_M, BLOCK_N, "evict_first",
        )  # fmt: skip
        pivot, shift, squares = _merged_statistics(pivot, shift, squares, tile, 0, size, BLOCK_N, IS_RMS)
        rstd = _finished_statistics(statistics_ptr, pivot, shift, squares, eps, rows, row_count, size, IS_RMS)
        _store_norm(
            output, tile, pivot, shift, rstd, weight_ptr, bias_ptr, rows, lanes, row_count, size, row_axes,
            IS_RMS, UNIT_OFFSET,
        )  # fmt: skip
    else:
        for start in tl.range(0, size, BLOCK_N):
            tile = _summed(
                x, residual, x_bias_ptr, row_scale, dropout, new_residual, rows, start, row_count, size, row_axes,
                SUM_DTYPE, BLOCK_M, BLOCK_N, "",
            )  # fmt: skip
            pivot, shift, squares = _merged_statistics(pivot, shift, squares, tile, start, size, BLOCK_N, IS_RMS)
        rstd = _finished_statistics(statistics_ptr, pivot, shift, squares, eps, rows, row_count, size, IS_RMS)
        if new_residual is not None:
            tl.debug_barrier()  # what is read now was stored by other threads of this program
        for start in tl.range(0, size, BLOCK_N):
            cols = start + lanes
            if new_residual is not None:  # one tensor to read again, where x and the residual are two
                inside = (rows < row_count) & (cols < size)
                tile = load_rows(new_residual, rows, cols, row_axes, inside, "evict_first")
            else:
                tile = _summed(
                    x, residual, x_bias_ptr, row_scale, dropout, None, rows, start, row_count, size, row_axes,
                    SUM_DTYPE, BLOCK_M, BLOCK_N, "evict_first",
                )  # fmt: skip
            _store_norm(
                output, tile, pivot, shift, rstd, weight_ptr, bias_ptr, rows, cols, row_count, size, row_axes,
                IS_RMS, UNIT_OFFSET,
            )  # fmt: skip


def launch_residual_norm_fwd(
    problem: NormProblem,
    output: Tensor,
    new_residual: Tensor | None,
    statistics: Tensor | None,
    residual_dtype: torch.dtype,
    config: Config | None = None,
) -> None:
    """Write the norm, and, where they are wanted, ``r`` and the statistics: float32 ``[1, rows]``, the inverse
    deviations, and for a layer norm ``[3, rows]``, the means in two parts behind them."""
    size = problem.x.shape[-1]
    rows = Rows.of(problem.x, problem.residual, problem.row_scale, output, new_residual)
    if not output.numel():
        return
    x, residual, row_scale, out, new = rows.arguments()
    config = config or norm_forward_config(size, problem.x.device, problem.is_heavy)
    launch(
        _residual_norm_fwd_kernel, (triton.cdiv(rows.count, config.block_m),), problem.x,
        x, residual, problem.weight, problem.bias, problem.x_bias, row_scale, problem.dropout(), out, new,
        statistics, rows.count, size, *rows.sizes(), problem.eps,
        IS_RMS=problem.is_rms, UNIT_OFFSET=problem.unit_offset,
        SUM_DTYPE=triton_dtype(residual_dtype), WHOLE=size <= config.block_n, **config.launch_options(),
    )  # fmt: skip
