"""dQ of a tile of rows, from all keys that it sees, and the rows' delta; see ``backward``."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.backward_call import BackwardCall, constants_of, inputs_of
from fastattn_kernels.common.arguments import RUN_TIME, Blocks, Heads, OnlyIf, PerRow, Sizes, TileLists, strided
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.delta import Delta, delta_of_rows, tensor_of
from fastattn_kernels.common.dropout import dropout_factor
from fastattn_kernels.common.gradients import Gradients, WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import GradientMarks, rows_not_finite
from fastattn_kernels.common.masking import distance, in_unit
from fastattn_kernels.common.packed import Packing, count_tiles, find_tile, line_of, place_of
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import probabilities, product_gradient, score_gradient, softcapped_scores
from fastattn_kernels.common.tile_map import list_arguments
from fastattn_kernels.common.tiles import head_of, is_off, load_statistics, load_tile, product, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, visited_tile


@triton.jit
def _grad_of_queries(
    dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, span, call,
    rules, visits, edges, tiles, blocks, SLOPES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add to dQ, and if SLOPES to the gradient of the rows' ALiBi slope, what the tiles of keys that are seen whole (if
    PARTIAL: in part) give."""
    sizes, dropout = span.sizes, call.dropout
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    unit = in_unit(call.scale, rules)
    rows = row_start + tl.arange(0, blocks.M)[:, None]
    for position in tl.range(0, visits):
        start = visited_tile(position, edges, tiles, tl.cdiv(seqlen_k, blocks.N), PARTIAL) * blocks.N
        cols = start + tl.arange(0, blocks.N)[None, :]
        k = load_tile(key, start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, PARTIAL)
        v = load_tile(value, start, seqlen_k, blocks.N, blocks.DV, blocks.VALUE_DIM, PARTIAL)
        qk = product(
            q, query, row_start, seqlen_q, k, key, start, seqlen_k, blocks.M, blocks.N, blocks.D, blocks.HEAD_DIM,
            blocks.PRECISION, 128,
        )  # fmt: skip
        scores = softcapped_scores(qk, unit, rules)
        p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, PARTIAL)
        factor = None
        if dropout is not None:
            factor = dropout_factor(rows, cols, batch_head, dropout)
        dp = product(
            do, d_output, row_start, seqlen_q, v, value, start, seqlen_k, blocks.M, blocks.N, blocks.DV,
            blocks.VALUE_DIM, blocks.PRECISION, 128,
        )  # fmt: skip
        ds = score_gradient(p, factor, dp, delta[:, None], rows, cols, at, sizes, rules, call.d_weights, PARTIAL)
        if SLOPES:
            d_slope -= tl.sum(ds * distance(rows, cols, sizes.shift), 1)
        ds = product_gradient(ds, scores, rows, cols, at, sizes, rules).to(k.dtype)
        dq = weighted_sum(ds, k, dq, blocks.CAREFUL, blocks.PRECISION)
    return dq, d_slope


@triton.jit
def grad_of_tile_of_queries(
    entry, row_tile, span, call, rules, output, d_lse, d_query, d_alibi_slopes_ptr, marks_ptr, blocks
):  # fmt: skip
    """dQ of one tile of rows, from all keys that it sees; its rows are marked unless ``marks_ptr`` is None. Their delta
    is computed and stored; if ``output`` is None, it has been computed before, and is loaded."""
    sizes = span.sizes
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    row_start = row_tile * blocks.M
    at, batch_head = place_of(entry, call.heads, span)
    batch, head = at.batch, at.head
    first_row, first_key = span.first_row, span.first_key
    key = head_of(call.key, batch, head // call.group, first_key)
    value = head_of(call.value, batch, head // call.group, first_key)
    query, d_output = head_of(call.query, batch, head, first_row), head_of(call.d_output, batch, head, first_row)
    row = row_start + tl.arange(0, blocks.M)
    q = load_tile(query, row_start, seqlen_q, blocks.M, blocks.D, blocks.HEAD_DIM, True)
    do = load_tile(d_output, row_start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
    rows_of = line_of(batch_head, at, first_row, span.all_rows, 1)
    statistics_ptr = call.statistics_ptr + line_of(batch_head, at, first_row, span.all_rows, 2)
    row_max, inverse_sum = load_statistics(statistics_ptr, row, seqlen_q, span.all_rows)
    if output is not None:
        rows_of_output = head_of(output, batch, head, first_row)
        o = load_tile(rows_of_output, row_start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
        delta = delta_of_rows(o, do, d_lse, batch, head, row, seqlen_q, first_row)
        tl.store(call.delta_ptr + rows_of + row, delta, mask=row < seqlen_q)
    else:
        delta = tl.load(call.delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)

    dq = tl.zeros([blocks.M, blocks.D], tl.float32)
    d_slope = tl.zeros([blocks.M], tl.float32)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, row_tile, tl.cdiv(seqlen_q, blocks.M), tl.cdiv(seqlen_k, blocks.N))
    edges = key_edges(row_start, at, sizes, rules, blocks.M, blocks.N)
    full, partial = count_visits(edges, tiles)
    SLOPES: tl.constexpr = d_alibi_slopes_ptr is not None
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, span,
        call, rules, full, edges, tiles, blocks, SLOPES, False,
    )  # fmt: skip
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, span,
        call, rules, partial, edges, tiles, blocks, SLOPES, True,
    )  # fmt: skip
    dq *= call.scale
    store_tile(head_of(d_query, batch, head, first_row), row_start, seqlen_q, dq, blocks.M, blocks.D, blocks.HEAD_DIM)
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(dq), mask=row < seqlen_q)
    if SLOPES:
        tl.store(d_alibi_slopes_ptr + rows_of + row, d_slope, mask=row < seqlen_q)


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_dq_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, output, d_lse, d_query, d_alibi_slopes_ptr, marks_ptr,
    rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, only_if=None,
):  # fmt: skip
    """dQ of one tile of rows; and the rows' delta, unless ``output`` is None."""
    if only_if is not None:
        if is_off(only_if):
            return
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    call = BackwardCall(
        query, key, value, d_output, statistics_ptr, delta_ptr, dropout, d_weights, lists, heads, group, scale
    )
    packing = Packing(offsets, sequences, longest_q, longest_k, bottom_right)
    # longest first, as in the forward
    tiles_m = count_tiles(seqlen_q, sequences, BLOCK_M)
    number = tiles_m - 1 - tl.program_id(0) % tiles_m
    row_tile, span = find_tile(number, Sizes(seqlen_q, seqlen_k, lower, upper, shift), packing, BLOCK_M, True)
    if sequences is not None:
        if row_tile < 0:
            return
    grad_of_tile_of_queries(
        tl.program_id(0) // tiles_m, row_tile, span, call, rules, output, d_lse, d_query,
        d_alibi_slopes_ptr, marks_ptr,
        Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False),
    )  # fmt: skip


def launch_dq(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    marks: GradientMarks,
    lists: Tensor | None,
    config: Config,
    only_if: OnlyIf | None,
) -> None:
    """Write dQ and its marks; and delta, unless it has been computed before, or ``only_if`` may forbid all of this."""
    query = problem.query
    if not gradients.d_query.numel():
        return
    tiles = problem.tiles_of_rows(config.block_m)
    if problem.packed is not None:
        gradients.d_query.zero_()  # of rows in no sequence
        if not tiles:
            return
    output, d_lse = None, None
    if isinstance(delta, Delta) and not delta.is_written and only_if is None:
        output, d_lse, delta = delta.output, delta.d_lse, delta.unwritten()
    launch(
        _attention_bwd_dq_kernel, (tiles,), query,
        *inputs_of(problem, d_output, statistics, tensor_of(delta)), strided(Heads, output), strided(PerRow, d_lse),
        strided(Heads, gradients.d_query), gradients.d_alibi_slopes, marks.of_rows,
        problem.rules(), problem.dropout(), weights_argument(d_weights), *list_arguments(lists), *problem.sizes(),
        problem.scale, *problem.packing(), only_if=only_if, **constants_of(problem, config),
    )  # fmt: skip
