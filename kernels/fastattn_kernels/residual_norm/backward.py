"""Backward of the residual add with its norm: one reading of the gradients and of ``r``, no atomics.

With ``n = (r - mean) * rstd`` and ``g = d_output * weight``, the gradient of ``r`` is ``(g - mean(g) - n * mean(g n)) *
rstd`` plus its own (RMS norm: without ``mean(g)``). A fixed set of programs shares the rows; each sums the gradients of
the vectors over its rows in registers, and a second, small kernel sums over programs, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.launch import launch
from fastattn_kernels.residual_norm.config import NormBackwardConfig, norm_backward_config
from fastattn_kernels.residual_norm.problem import RUN_TIME, NormProblem
from fastattn_kernels.residual_norm.rows import RowAxes, Rows, load_rows, load_vector, row_dropout_factor, store_rows

# The tile in which partial sums of the vectors' gradients are summed: narrow, so that many programs share the columns.
_SUM_ROWS, _SUM_COLS = 128, 32


@triton.jit
def _load_normal(total, statistics_ptr, rows, cols, row_count, size, row_axes, IS_RMS, EVICTION: tl.constexpr):
    """The tile ``n`` and the inverse deviations ``[M, 1]``."""
    exists = rows < row_count
    tile = load_rows(total, rows, cols, row_axes, exists & (cols < size), EVICTION)
    rstd = tl.load(statistics_ptr + rows, mask=exists, other=0.0)
    if not IS_RMS:  # the pivot first: it is so near the elements that this difference is exact
        tile -= tl.load(statistics_ptr + row_count + rows, mask=exists, other=0.0)
        tile -= tl.load(statistics_ptr + row_count + (row_count + rows), mask=exists, other=0.0)
    return tile * rstd, rstd


@triton.jit
def _weights(weight_ptr, cols, size, UNIT_OFFSET: tl.constexpr):
    """What multiplies the columns, ``[1, N]``."""
    if weight_ptr is None:
        weight = tl.where(cols < size, 1.0, 0.0)
    else:
        weight = load_vector(weight_ptr, cols, size)
        if UNIT_OFFSET:
            weight += 1.0
    return weight


@triton.jit
def _means_over_blocks(
    d_output, total, weight_ptr, statistics_ptr, rows, row_count, size, row_axes,
    IS_RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``mean(g)`` and ``mean(g n)`` of rows ``[M, 1]``, block by block of columns."""
    sum_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_gn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, size, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        normal, _ = _load_normal(total, statistics_ptr, rows, cols, row_count, size, row_axes, IS_RMS, "")
        g = load_rows(d_output, rows, cols, row_axes, (rows < row_count) & (cols < size), "")
        g *= _weights(weight_ptr, cols, size, UNIT_OFFSET)
        sum_g += g
        sum_gn += g * normal
    return tl.sum(sum_g, 1)[:, None] / size, tl.sum(sum_gn, 1)[:, None] / size


@triton.jit(do_not_specialize=RUN_TIME)
def _row_means_kernel(
    d_output, total, weight_ptr, statistics_ptr, means_ptr, row_count, size, middle_rows, inner_rows,
    IS_RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``mean(g n)`` and ``mean(g)`` of every row, for rows that are split among programs."""
    row_axes = RowAxes(middle_rows, inner_rows)
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mean_g, mean_gn = _means_over_blocks(
        d_output, total, weight_ptr, statistics_ptr, rows, row_count, size, row_axes,
        IS_RMS, UNIT_OFFSET, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(means_ptr + rows, mean_gn, mask=rows < row_count)
    tl.store(means_ptr + row_count + rows, mean_g, mask=rows < row_count)


@triton.jit(do_not_specialize=RUN_TIME)
def _residual_norm_bwd_kernel(
    d_output, d_new_residual, total, statistics_ptr, weight_ptr, x, x_bias_ptr, row_scale, dropout, means_ptr,
    d_residual, d_x, d_row_scale_ptr, d_weight_ptr, d_bias_ptr, d_x_bias_ptr, row_count, size, middle_rows, inner_rows,
    IS_RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs(0)``-th tile of rows, of the columns of block ``program_id(1)``."""
    row_axes = RowAxes(middle_rows, inner_rows)
    group, split = tl.program_id(0), tl.program_id(1)
    start = split * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)[None, :]
    weight = _weights(weight_ptr, cols, size, UNIT_OFFSET)
    sum_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_x_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(group, tl.cdiv(row_count, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        inside = (rows < row_count) & (cols < size)
        mean_g = tl.zeros([BLOCK_M, 1], tl.float32)
        mean_gn = tl.zeros([BLOCK_M, 1], tl.float32)
        if means_ptr is not None:
            mean_gn = tl.load(means_ptr + rows, mask=rows < row_count, other=0.0)
            mean_g = tl.load(means_ptr + row_count + rows, mask=rows < row_count, other=0.0)
        elif not WHOLE:  # before this program's own columns fill registers; these are read again from the cache
            mean_g, mean_gn = _means_over_blocks(
                d_output, total, weight_ptr, statistics_ptr, rows, row_count, size, row_axes,
                IS_RMS, UNIT_OFFSET, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        d_out = load_rows(d_output, rows, cols, row_axes, inside, "evict_first")
        normal, rstd = _load_normal(total, statistics_ptr, rows, cols, row_count, size, row_axes, IS_RMS, "evict_first")
        if d_bias_ptr is not None:
            sum_bias += d_out
        product = d_out * normal
        if d_weight_ptr is not None:
            sum_weight += product
        gradient = d_out * weight
        if WHOLE:
            mean_gn = tl.sum(product * weight, 1)[:, None] / size
            mean_g = tl.sum(gradient, 1)[:, None] / size
        if not IS_RMS:
            gradient -= mean_g
        gradient = (gradient - normal * mean_gn) * rstd
        if d_new_residual is not None:
            gradient += load_rows(d_new_residual, rows, cols, row_axes, inside, "evict_first")
        if d_residual is not None:
            store_rows(d_residual, rows, cols, row_axes, inside, gradient)
        # from here on the gradient of x, which differs where x is dropped or scaled
        if dropout is not None:
            gradient *= row_dropout_factor(rows, start, dropout, BLOCK_M, BLOCK_N)
        if d_row_scale_ptr is not None:
            branch = load_rows(x, rows, cols, row_axes, inside, "evict_first")
            if x_bias_ptr is not None:
                branch += load_vector(x_bias_ptr, cols, size)
            d_scale = tl.sum(gradient * branch, 1)[:, None]
            tl.store(d_row_scale_ptr + split.to(tl.int64) * row_count + rows, d_scale, mask=rows < row_count)
        if row_scale is not None:
            gradient *= load_rows(row_scale, rows, cols * 0, row_axes, rows < row_count, "evict_last")
        if d_x is not None:
            store_rows(d_x, rows, cols, row_axes, inside, gradient)
        if d_x_bias_ptr is not None:
            sum_x_bias += gradient

    columns = tl.arange(0, BLOCK_N)
    at = group.to(tl.int64) * size + start + columns
    inside = start + columns < size
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + at, tl.sum(sum_weight, 0), mask=inside)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + at, tl.sum(sum_bias, 0), mask=inside)
    if d_x_bias_ptr is not None:
        tl.store(d_x_bias_ptr + at, tl.sum(sum_x_bias, 0), mask=inside)


@triton.jit(do_not_specialize=("groups",))
def _sum_over_groups_kernel(partial_ptr, sums, groups, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sum over ``groups`` of ``[vectors, groups, size]``, for the columns of one program and one vector; ``sums``
    holds a pointer for each vector."""
    vector = tl.program_id(1)
    cols = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    partial_ptr += vector.to(tl.int64) * groups * size
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(0, groups, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        # 32 bits hold it: the programs of a GPU, a few for each of its multiprocessors, times the widest row
        total += tl.load(partial_ptr + rows * size + cols, mask=(rows < groups) & (cols < size), other=0.0)
    summed = tl.sum(total, 0)[None, :].to(sums[0].dtype.element_ty)
    for index in tl.static_range(len(sums)):
        tl.store(sums[index] + cols, summed, mask=(cols < size) & (vector == index))


def launch_residual_norm_bwd(
    problem: NormProblem,
    d_output: Tensor,
    d_new_residual: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    d_residual: Tensor | None,
    d_x: Tensor | None,
    vectors: tuple[bool, bool, bool],
    needs_row_scale: bool,
    vectors_dtype: torch.dtype = torch.float32,
    config: NormBackwardConfig | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Write the gradients of ``r`` and of ``x``, those that are given.

    Args:
        problem: the forward's; of its tensors only the vectors, the row scale and, where ``needs_row_scale``, ``x``.
        d_output: ``[..., N]``, the gradient of the norm, any strides.
        d_new_residual: ``[..., N]``, that of ``r``; None: zero.
        total: ``[..., N]``, ``r``.
        statistics: the forward's.
        d_residual: ``[..., N]``, the gradient of ``r`` with what goes through the norm; None: not wanted.
        d_x: ``[..., N]``; None: not wanted, or the same.
        vectors: whether the gradients of weight, bias and x_bias are wanted.
        needs_row_scale: whether that of the row scale is.
        vectors_dtype: of the vectors' gradients.
        config: the tile and grid.

    Returns:
        The gradients of the vectors that are wanted, ``[N]``, in this order; and the row scale's, float32 ``[rows]``.
    """
    size = total.shape[-1]
    x = problem.x if needs_row_scale else None
    rows = Rows.of(d_output, d_new_residual, total, x, problem.row_scale, d_residual, d_x)
    wanted = sum(vectors)
    if not total.numel():
        scale = total.new_zeros(rows.count, dtype=torch.float32) if needs_row_scale else None
        return [total.new_zeros(size, dtype=vectors_dtype) for _ in range(wanted)], scale
    d_out, d_new, sums, branch, row_scale, d_res, d_branch = rows.arguments()
    is_heavy = problem.is_heavy or (d_residual is not None and d_x is not None)
    is_heavy |= total.dtype == torch.float32 and len(rows.axes) > 1  # with the indices of rows, float32 would spill
    config = config or norm_backward_config(size, rows.count, total.device, is_heavy)
    tile = config.tile
    float32 = {"dtype": torch.float32, "device": total.device}
    partial = torch.empty((wanted, config.groups, size), **float32)
    given = iter(partial.unbind(0))
    d_vectors = [next(given) if is_wanted else None for is_wanted in vectors]
    d_row_scale = torch.empty((config.splits, rows.count), **float32) if needs_row_scale else None
    means = torch.empty((2, rows.count), **float32) if config.sums_apart else None
    flags = {"IS_RMS": problem.is_rms, "UNIT_OFFSET": problem.unit_offset}
    if means is not None:
        launch(
            _row_means_kernel, (triton.cdiv(rows.count, tile.block_m),), total,
            d_out, sums, problem.weight, statistics, means, rows.count, size, *rows.sizes(),
            **flags, **tile.launch_options(),
        )  # fmt: skip
    launch(
        _residual_norm_bwd_kernel, (config.groups, config.splits), total,
        d_out, d_new, sums, statistics, problem.weight, branch, problem.x_bias, row_scale, problem.dropout(),
        means, d_res, d_branch, d_row_scale, *d_vectors, rows.count, size, *rows.sizes(),
        **flags, WHOLE=config.splits == 1, NUM_STAGES=tile.num_stages, **tile.launch_options(),
    )  # fmt: skip
    gradients = [torch.empty(size, dtype=vectors_dtype, device=total.device) for _ in range(wanted)]
    if wanted:
        launch(
            _sum_over_groups_kernel,
            (triton.cdiv(size, _SUM_COLS), wanted),
            total,
            partial,
            tuple(gradients),
            config.groups,
            size,
            ROWS=_SUM_ROWS,
            COLS=_SUM_COLS,
        )
    return gradients, None if d_row_scale is None else d_row_scale.sum(0)
