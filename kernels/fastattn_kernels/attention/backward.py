"""Backward in two passes without atomics, bitwise deterministic: a program owns a tile of dK and dV, or one of dQ.

Both recompute P from each row's statistics (arXiv:2307.08691, algorithm 2); the workspace is delta, O(L). The pass of
dQ comes first: it computes delta, which the other one reads. Where something is hidden, one careful launch comes last.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import BackwardConfig, backward_config, careful_config
from fastattn_kernels.common.arguments import (
    RUN_TIME,
    At,
    Blocks,
    Heads,
    OnlyIf,
    PerRow,
    Rules,
    Sizes,
    TileLists,
    strided,
)
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.delta import Delta, delta_of_rows, tensor_of
from fastattn_kernels.common.dropout import dropout_factor
from fastattn_kernels.common.gradients import Gradients, WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import (
    GradientMarks,
    empty_gradient_marks,
    few_programs,
    is_marked,
    rows_not_finite,
    tiles_to_look_at,
)
from fastattn_kernels.common.masking import LOG2_E, distance
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import probabilities, score_gradient, softcapped_scores, through_softcap
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import (
    head_of,
    is_off,
    load_statistics,
    load_tile,
    product,
    store_tile,
    weighted_sum,
)
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, row_edges, visited_tile


class _Call(NamedTuple):
    """What every tile of either pass is told, beside its own place and where its gradients go."""

    query: Heads
    key: Heads
    value: Heads
    d_output: Heads
    statistics_ptr: Any
    delta_ptr: Any
    rules: Rules
    dropout: Any
    d_weights: Any
    lists: TileLists
    sizes: Sizes
    heads: Any
    group: Any
    scale: Any


# ---------------------------------------------------------------------------------------------------------- dK and dV


@triton.jit
def _add_grad_of_queries(dq_sums_ptr, ds, k, row, seqlen_q, blocks):
    """Add ``dS K``, without the scale, to one head's float32 dQ, in whatever order programs come to it."""
    # [M, D]: its transpose, of which wgmma could do tiles of fewer than 64 rows, spills on sm_80 (16 to 400 bytes)
    dq = tl.dot(tl.trans(ds), k, input_precision=blocks.PRECISION)
    col = tl.arange(0, blocks.D)[None, :]
    ptrs = dq_sums_ptr + row.to(tl.int64)[:, None] * blocks.HEAD_DIM + col
    tl.atomic_add(ptrs, dq, mask=(row < seqlen_q)[:, None] & (col < blocks.HEAD_DIM), sem="relaxed")


@triton.jit
def _grad_of_keys(
    dk, dv, k, v, key, value, col_start, batch, kv_head, call, dq_sums_ptr, visits, edges, tiles,
    blocks, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what the tiles of rows that see these keys whole (if PARTIAL: in part) give, head after
    head; and to dQ, where there is one to add to, what these keys give.

    One loop over heads and rows: nothing is summed between programs, and two nested loops would spill (96 bytes more on
    sm_90 at head size 128). Tiles are transposed, ``[N, M]``, so that P and dS are left operands in registers.
    """
    sizes, rules, dropout = call.sizes, call.rules, call.dropout
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    unit = call.scale * LOG2_E
    cols = col_start + tl.arange(0, blocks.N)[:, None]
    # The pipeliner computes the first addresses ahead of the loop, also where the loop is empty, and a division by zero
    # there is undefined in LLVM. Any other guard of the division spilled 8 to 40 bytes on sm_90. In the backward in one
    # pass this one spills too (8 bytes at head size 128), so it is left out there: a GPU divides by zero unharmed.
    if dq_sums_ptr is not None or visits > 0:
        for step in tl.range(0, call.group * visits):
            member = step // visits
            tile = visited_tile(step - member * visits, edges, tiles, tl.cdiv(seqlen_q, blocks.M), PARTIAL)
            start = tile * blocks.M
            head = kv_head * call.group + member
            at = At(batch, head)
            batch_head = batch * call.heads + head
            row = start + tl.arange(0, blocks.M)
            rows = row[None, :]
            query, d_output = head_of(call.query, batch, head), head_of(call.d_output, batch, head)
            q = load_tile(query, start, seqlen_q, blocks.M, blocks.D, blocks.HEAD_DIM, True)
            do = load_tile(d_output, start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
            row_max, inverse_sum = load_statistics(call.statistics_ptr + 2 * batch_head * seqlen_q, row, seqlen_q)
            delta = tl.load(call.delta_ptr + batch_head * seqlen_q + row, mask=row < seqlen_q, other=0.0)
            qk = product(
                k, key, col_start, seqlen_k, q, query, start, seqlen_q, blocks.N, blocks.M, blocks.D, blocks.HEAD_DIM,
                blocks.PRECISION,
                256,  # strips of keys would stay in registers, since the loop does not change them
            )  # fmt: skip
            scores = softcapped_scores(qk, unit, rules)
            p = probabilities(scores, row_max[None, :], inverse_sum[None, :], rows, cols, at, sizes, rules, PARTIAL)
            factor = None
            dropped = p
            if dropout is not None:
                factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
                dropped = p * factor
            dv = weighted_sum(dropped.to(do.dtype), do, dv, blocks.CAREFUL, blocks.PRECISION)
            dp = product(
                v, value, col_start, seqlen_k, do, d_output, start, seqlen_q, blocks.N, blocks.M, blocks.DV,
                blocks.VALUE_DIM, blocks.PRECISION, 256,
            )  # fmt: skip
            ds = score_gradient(p, factor, dp, delta[None, :], rows, cols, at, sizes, rules, call.d_weights, PARTIAL)
            ds = through_softcap(ds, scores, rules.softcap).to(q.dtype)
            dk = weighted_sum(ds, q, dk, blocks.CAREFUL, blocks.PRECISION)
            if dq_sums_ptr is not None:
                dq_sums_of_head = dq_sums_ptr + batch_head * seqlen_q * blocks.HEAD_DIM
                _add_grad_of_queries(dq_sums_of_head, ds, k, row, seqlen_q, blocks)
    return dk, dv


@triton.jit
def _grad_of_tile_of_keys(batch_head, col_tile, call, d_key, d_value, marks_ptr, dq_sums_ptr, blocks):
    """dK and dV of one tile of keys, from all query rows that see it; a key is marked, unless ``marks_ptr`` is None,
    where one of the two is not finite."""
    sizes = call.sizes
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    kv_heads = call.heads // call.group
    col_start = col_tile * blocks.N
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    at = At(batch, kv_head)
    key, value = head_of(call.key, batch, kv_head), head_of(call.value, batch, kv_head)
    k = load_tile(key, col_start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, True)
    v = load_tile(value, col_start, seqlen_k, blocks.N, blocks.DV, blocks.VALUE_DIM, True)

    dk = tl.zeros([blocks.N, blocks.D], tl.float32)
    dv = tl.zeros([blocks.N, blocks.DV], tl.float32)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, col_tile, tl.cdiv(seqlen_k, blocks.N), tl.cdiv(seqlen_q, blocks.M))
    edges = row_edges(col_start, at, sizes, call.rules, blocks.M, blocks.N)
    full, partial = count_visits(edges, tiles)
    dk, dv = _grad_of_keys(
        dk, dv, k, v, key, value, col_start, batch, kv_head, call, dq_sums_ptr, partial, edges, tiles, blocks, True
    )
    dk, dv = _grad_of_keys(
        dk, dv, k, v, key, value, col_start, batch, kv_head, call, dq_sums_ptr, full, edges, tiles, blocks, False
    )
    dk *= call.scale
    store_tile(head_of(d_key, batch, kv_head), col_start, seqlen_k, dk, blocks.N, blocks.D, blocks.HEAD_DIM)
    store_tile(head_of(d_value, batch, kv_head), col_start, seqlen_k, dv, blocks.N, blocks.DV, blocks.VALUE_DIM)
    if marks_ptr is not None:
        col = col_start + tl.arange(0, blocks.N)
        marks = rows_not_finite(dk) | rows_not_finite(dv)
        tl.store(marks_ptr + batch_head.to(tl.int64) * seqlen_k + col, marks, mask=col < seqlen_k)


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_dkdv_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, d_key, d_value, marks_ptr, rules, dropout, d_weights,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, dq_sums_ptr=None, only_if=None,
):  # fmt: skip
    """dK and dV of one tile of keys.

    With ``dq_sums_ptr``, to zeros ``[B, H, L, D]``, it is the whole backward in one pass; see ``backward_one_pass``.
    """
    if only_if is not None:
        if is_off(only_if):
            return
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    call = _Call(
        query, key, value, d_output, statistics_ptr, delta_ptr, rules, dropout, d_weights, lists, sizes, heads, group,
        scale,
    )  # fmt: skip
    # under a diagonal the first keys are seen most: longest first
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    _grad_of_tile_of_keys(
        tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, call, d_key, d_value, marks_ptr, dq_sums_ptr,
        Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- dQ


@triton.jit
def _grad_of_queries(
    dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, call,
    visits, edges, tiles, blocks, SLOPES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add to dQ, and if SLOPES to the gradient of the rows' ALiBi slope, what the tiles of keys that are seen whole (if
    PARTIAL: in part) give."""
    sizes, rules, dropout = call.sizes, call.rules, call.dropout
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    unit = call.scale * LOG2_E
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
        ds = through_softcap(ds, scores, rules.softcap).to(k.dtype)
        dq = weighted_sum(ds, k, dq, blocks.CAREFUL, blocks.PRECISION)
    return dq, d_slope


@triton.jit
def _grad_of_tile_of_queries(batch_head, row_tile, call, output, d_lse, d_query, d_alibi_slopes_ptr, marks_ptr, blocks):
    """dQ of one tile of rows, from all keys that it sees; its rows are marked unless ``marks_ptr`` is None. Their delta
    is computed and stored; if ``output`` is None, it has been computed before, and is loaded."""
    sizes = call.sizes
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    row_start = row_tile * blocks.M
    batch = (batch_head // call.heads).to(tl.int64)
    head = (batch_head % call.heads).to(tl.int64)
    at = At(batch, head)
    key, value = head_of(call.key, batch, head // call.group), head_of(call.value, batch, head // call.group)
    query, d_output = head_of(call.query, batch, head), head_of(call.d_output, batch, head)
    row = row_start + tl.arange(0, blocks.M)
    q = load_tile(query, row_start, seqlen_q, blocks.M, blocks.D, blocks.HEAD_DIM, True)
    do = load_tile(d_output, row_start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    row_max, inverse_sum = load_statistics(call.statistics_ptr + 2 * rows_of, row, seqlen_q)
    if output is not None:
        rows_of_output = head_of(output, batch, head)
        o = load_tile(rows_of_output, row_start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
        delta = delta_of_rows(o, do, d_lse, batch, head, row, seqlen_q)
        tl.store(call.delta_ptr + rows_of + row, delta, mask=row < seqlen_q)
    else:
        delta = tl.load(call.delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)

    dq = tl.zeros([blocks.M, blocks.D], tl.float32)
    d_slope = tl.zeros([blocks.M], tl.float32)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, row_tile, tl.cdiv(seqlen_q, blocks.M), tl.cdiv(seqlen_k, blocks.N))
    edges = key_edges(row_start, at, sizes, call.rules, blocks.M, blocks.N)
    full, partial = count_visits(edges, tiles)
    SLOPES: tl.constexpr = d_alibi_slopes_ptr is not None
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, call,
        full, edges, tiles, blocks, SLOPES, False,
    )  # fmt: skip
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, query, d_output, key, value, row_start, at, batch_head, call,
        partial, edges, tiles, blocks, SLOPES, True,
    )  # fmt: skip
    dq *= call.scale
    store_tile(head_of(d_query, batch, head), row_start, seqlen_q, dq, blocks.M, blocks.D, blocks.HEAD_DIM)
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(dq), mask=row < seqlen_q)
    if SLOPES:
        tl.store(d_alibi_slopes_ptr + rows_of + row, d_slope, mask=row < seqlen_q)


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_dq_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, output, d_lse, d_query, d_alibi_slopes_ptr, marks_ptr,
    rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, only_if=None,
):  # fmt: skip
    """dQ of one tile of rows; and the rows' delta, unless ``output`` is None."""
    if only_if is not None:
        if is_off(only_if):
            return
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    call = _Call(
        query, key, value, d_output, statistics_ptr, delta_ptr, rules, dropout, d_weights, lists, sizes, heads, group,
        scale,
    )  # fmt: skip
    # longest first, as in the forward
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    _grad_of_tile_of_queries(
        tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m, call, output, d_lse, d_query,
        d_alibi_slopes_ptr, marks_ptr,
        Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ careful passes


@triton.jit(do_not_specialize=[*RUN_TIME, "row_tiles", "key_tiles"])
def _attention_bwd_careful_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, d_query, d_key, d_value, d_alibi_slopes_ptr,
    marks_of_rows_ptr, marks_of_keys_ptr, rules, dropout, d_weights,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, row_tiles, key_tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr, only_if=None,
):  # fmt: skip
    """Of the program's share of tiles, those that hold a mark: dQ of tiles of rows, then dK and dV of tiles of keys.

    Careful loops in the kernels of the gradients themselves, as the forward has them, made the loop of dK and dV 12 %
    longer at head size 128 (600 instructions instead of 534 on sm_90), and spilled 48 to 88 bytes.
    """
    if only_if is not None:
        if is_off(only_if):
            return
    call = _Call(
        query, key, value, d_output, statistics_ptr, delta_ptr, rules, dropout, d_weights, TileLists(None, 0, 0),
        Sizes(seqlen_q, seqlen_k, lower, upper, shift), heads, group, scale,
    )  # fmt: skip
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    first, last = tiles_to_look_at(marks_of_rows_ptr, row_tiles, seqlen_q, BLOCK_M)
    for tile in tl.range(first, last):
        if is_marked(marks_of_rows_ptr, tile, seqlen_q, BLOCK_M):
            _grad_of_tile_of_queries(
                tile // tiles_m, tile % tiles_m, call, None, None, d_query, d_alibi_slopes_ptr, None,
                Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, CAREFUL),
            )  # fmt: skip
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    first, last = tiles_to_look_at(marks_of_keys_ptr, key_tiles, seqlen_k, BLOCK_N)
    for tile in tl.range(first, last):
        if is_marked(marks_of_keys_ptr, tile, seqlen_k, BLOCK_N):
            _grad_of_tile_of_keys(
                tile // tiles_n, tile % tiles_n, call, d_key, d_value, None, None,
                Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, CAREFUL),
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- launchers


def launch_attention_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    config: BackwardConfig | None = None,
    only_if: OnlyIf | None = None,
) -> None:
    """Write all gradients: dQ, then dK and dV; where the problem hides keys, tiles that are not finite a second time.

    Args:
        problem: the call's inputs.
        d_output: ``[B, H, L, Dv]``, any strides.
        statistics: the forward's.
        delta: ``[B, H, L]``, with what the returned weights add to it; or, where they add nothing, a :class:`Delta`,
            which the pass of dQ computes if it has not been computed yet.
        d_weights: the gradient of the returned weights; None: zero.
        gradients: what is written.
        tile_map: of the problem; None: arithmetic says which tiles are visited.
        config: the tiles; None: those that ``backward_config`` chooses.
        only_if: where the device finds otherwise, nothing is written; see ``WeightsGradient.only_if_used``.
    """
    query = problem.query
    sizes = query.shape[3], problem.value.shape[3]
    config = config or backward_config(query.device, query.dtype, *sizes, problem.load(d_weights))
    marks = empty_gradient_marks(problem)
    lists_of_rows, lists_of_keys = None, None
    if tile_map is not None:
        lists_of_rows, lists_of_keys = tile_map.of_rows_and_keys(config.dq, config.dkdv)
    _launch_dq(problem, d_output, statistics, delta, d_weights, gradients, marks, lists_of_rows, config.dq, only_if)
    upstream = problem, d_output, statistics, tensor_of(delta), d_weights
    launch_dkdv(*upstream, gradients, marks.of_keys, lists_of_keys, config.dkdv, only_if)
    if problem.masks_pairs():
        launch_careful_bwd(*upstream, gradients, marks, only_if)


def _launch_dq(
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
    batch, heads, seqlen_q, _ = query.shape
    if not gradients.d_query.numel():
        return
    output, d_lse = None, None
    if isinstance(delta, Delta) and not delta.is_written and only_if is None:
        output, d_lse, delta = delta.output, delta.d_lse, delta.unwritten()
    launch(
        _attention_bwd_dq_kernel, (int(triton.cdiv(seqlen_q, config.block_m)) * batch * heads,), query,
        *_inputs(problem, d_output, statistics, tensor_of(delta)), strided(Heads, output), strided(PerRow, d_lse),
        strided(Heads, gradients.d_query), gradients.d_alibi_slopes, marks.of_rows,
        problem.rules(), problem.dropout(), weights_argument(d_weights), *list_arguments(lists), *problem.sizes(),
        problem.scale, only_if=only_if, **_constants(problem, config),
    )  # fmt: skip


def launch_dkdv(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    marks_of_keys: Tensor | None,
    lists: Tensor | None,
    config: Config,
    only_if: OnlyIf | None = None,
    *,
    dq_sums: Tensor | None = None,
) -> None:
    """Write dK, dV and the marks of their keys; and add dQ, without the scale, to ``dq_sums``, contiguous float32
    ``[B, H, L, D]``, unless None."""
    key = problem.key
    if not gradients.d_key.numel() and not gradients.d_value.numel():
        return
    batch, kv_heads, seqlen_k, _ = key.shape
    launch(
        _attention_bwd_dkdv_kernel, (int(triton.cdiv(seqlen_k, config.block_n)) * batch * kv_heads,), key,
        *_inputs(problem, d_output, statistics, delta), strided(Heads, gradients.d_key),
        strided(Heads, gradients.d_value), marks_of_keys,
        problem.rules(), problem.dropout(), weights_argument(d_weights), *list_arguments(lists), *problem.sizes(),
        problem.scale, dq_sums_ptr=dq_sums, only_if=only_if, **_constants(problem, config),
    )  # fmt: skip


def launch_careful_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    marks: GradientMarks,
    only_if: OnlyIf | None = None,
) -> None:
    """Compute again, with ``0 * NaN = 0 * inf = 0``, the tiles of gradients of which a row is marked. This follows the
    launches of any kernels, of this module or another, on a problem that masks pairs."""
    query, key = problem.query, problem.key
    config = careful_config(query.dtype, query.shape[3], problem.value.shape[3])
    row_tiles = int(triton.cdiv(query.shape[2], config.block_m)) * query.shape[0] * query.shape[1]
    key_tiles = int(triton.cdiv(key.shape[2], config.block_n)) * key.shape[0] * key.shape[1]
    row_tiles *= bool(gradients.d_query.numel())
    key_tiles *= bool(gradients.d_key.numel() or gradients.d_value.numel())
    if row_tiles or key_tiles:
        launch(
            _attention_bwd_careful_kernel, (few_programs(max(row_tiles, key_tiles), query.device),), query,
            *_inputs(problem, d_output, statistics, delta), strided(Heads, gradients.d_query),
            strided(Heads, gradients.d_key), strided(Heads, gradients.d_value), gradients.d_alibi_slopes,
            marks.of_rows, marks.of_keys, problem.rules(), problem.dropout(), weights_argument(d_weights),
            *problem.sizes(), problem.scale, row_tiles, key_tiles, CAREFUL=True, only_if=only_if,
            **_constants(problem, config),
        )  # fmt: skip


def _inputs(problem: Problem, d_output: Tensor, statistics: Tensor, delta: Tensor) -> tuple[object, ...]:
    """The kernel arguments ``query, key, value, d_output, statistics_ptr, delta_ptr``."""
    tensors = problem.query, problem.key, problem.value, d_output
    return *(strided(Heads, tensor) for tensor in tensors), statistics, delta


def _constants(problem: Problem, config: Config) -> dict[str, Any]:
    """The compile-time arguments that all kernels have."""
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_DV": head_block(value_dim),
        "PRECISION": dot_precision(problem.query.dtype),
        **config.launch_options(),
    }
