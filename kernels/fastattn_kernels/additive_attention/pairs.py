"""Weights, and the gradient of the scores: what there is for each pair of a query and a key, from rows' statistics."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.additive_attention.config import additive_pairs_config, has_hardware_tanh
from fastattn_kernels.additive_attention.forward import additive_scores, columns_of, weight_of
from fastattn_kernels.additive_attention.problem import AdditiveProblem
from fastattn_kernels.common.arguments import RUN_TIME, At, Heads, Sizes, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.gradients import WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import visible
from fastattn_kernels.common.scores import probabilities, score_gradient
from fastattn_kernels.common.tiles import head_of, load_statistics, load_tile, product


@triton.jit
def _store_pairs(matrix, rows, cols, inside, tile):
    """Store a tile of a head's ``[L, S]``, rounded to the destination's dtype."""
    ptrs = matrix.ptr + rows.to(tl.int64) * matrix.stride_row + cols.to(tl.int64) * matrix.stride_col
    tl.store(ptrs, tile.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*RUN_TIME, "size", "rows_written", "cols_written"])
def _additive_pairs_kernel(
    query, key, weight, value, d_output, statistics_ptr, delta_ptr, weights, d_scores, rules, d_weights,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, size, rows_written, cols_written,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr,
):  # fmt: skip
    """One tile of one head's weights (unless None) and of dS (unless None). Of both ``rows_written`` rows and
    ``cols_written`` columns are written, zero past the last query and key."""
    tiles_m = tl.cdiv(rows_written, BLOCK_M)
    tiles_n = tl.cdiv(cols_written, BLOCK_N)
    pid = tl.program_id(0)
    col_start = pid % tiles_n * BLOCK_N
    row_start = pid // tiles_n % tiles_m * BLOCK_M
    batch_head = pid // tiles_n // tiles_m
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    at = At(batch, head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    cols = col_start + tl.arange(0, BLOCK_N)[None, :]
    seen = visible(rows, cols, at, sizes, rules)
    # a tile in which nobody sees anything goes through no columns
    size = tl.where(tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0) > 0, size, 0)
    scores = additive_scores(
        columns_of(query, batch, head), row_start, columns_of(key, batch, head), col_start, weight_of(weight, head),
        size, BLOCK_M, BLOCK_N, HARDWARE_TANH,
    )  # fmt: skip
    rows_of = batch_head.to(tl.int64) * seqlen_q
    row_max, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q)
    p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, True)
    written = (rows < rows_written) & (cols < cols_written)
    if weights is not None:
        _store_pairs(head_of(weights, batch, head), rows, cols, written, p)
    if d_scores is not None:
        d_output, value = head_of(d_output, batch, head), head_of(value, batch, head)
        do = load_tile(d_output, row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
        v = load_tile(value, col_start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, True)
        dp = product(
            do, d_output, row_start, seqlen_q, v, value, col_start, seqlen_k, BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM,
            PRECISION, 64, 64,
        )  # fmt: skip
        delta = tl.load(delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
        ds = score_gradient(p, None, dp, delta[:, None], rows, cols, at, sizes, rules, d_weights, True)
        _store_pairs(head_of(d_scores, batch, head), rows, cols, written, ds)


def _launch(
    problem: AdditiveProblem,
    statistics: Tensor,
    written: Tensor,
    config: Config | None,
    *,
    d_output: Tensor | None = None,
    delta: Tensor | None = None,
    weights: Tensor | None = None,
    d_scores: Tensor | None = None,
    d_weights: WeightsGradient | None = None,
) -> None:
    """Launch over all of ``written``, which is one of the weights and dS, or as large as both. Values, dO and delta are
    needed for dS alone."""
    if not written.numel():
        return
    query = problem.query
    batch, heads, rows, cols = written.shape
    value_dim = problem.value.shape[3]
    config = config or additive_pairs_config(query.device, query.dtype, value_dim)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    value = None if d_scores is None else problem.value
    launch(
        _additive_pairs_kernel, (tiles * batch * heads,), query,
        *problem.scored(), strided(Heads, value), strided(Heads, d_output), statistics, delta,
        strided(Heads, weights), strided(Heads, d_scores), problem.rules(), weights_argument(d_weights),
        *problem.sizes(), query.shape[3], rows, cols,
        VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), PRECISION=dot_precision(query.dtype),
        HARDWARE_TANH=has_hardware_tanh(query.device, query.dtype), **config.launch_options(),
    )  # fmt: skip


def launch_additive_weights(
    problem: AdditiveProblem, statistics: Tensor, weights: Tensor, config: Config | None = None
) -> None:
    """Write the weights ``[B, H, L, S]`` (any strides)."""
    _launch(problem, statistics, weights, config, weights=weights)


def launch_additive_scores_bwd(
    problem: AdditiveProblem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    d_scores: Tensor,
    weights: Tensor | None,
    config: Config | None = None,
) -> None:
    """Write dS into ``d_scores``, ``[B, H, L or more, S or more]``, zero past the last query and key, and, unless None,
    the weights into a tensor of the same shape."""
    _launch(
        problem,
        statistics,
        d_scores,
        config,
        d_output=d_output,
        delta=delta,
        weights=weights,
        d_scores=d_scores,
        d_weights=d_weights,
    )
