"""Backward in two passes without atomics, bitwise deterministic: a program owns a tile of dK and dV, or one of dQ.

Both recompute P from each row's statistics (arXiv:2307.08691, algorithm 2); the workspace is delta, O(L).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import (
    BackwardConfig,
    backward_config,
    careful_config,
    dot_precision,
    head_block,
)
from fastattn_kernels.common.device import device_guard
from fastattn_kernels.common.dropout import dropout_factor
from fastattn_kernels.common.marks import empty_marks, is_marked, programs, rows_not_finite, tiles_to_look_at
from fastattn_kernels.common.masking import INFINITY, LOG2_E, capped, capped_slope, distance, masked_scores
from fastattn_kernels.common.problem import RUN_TIME, Argument, Problem, WeightsGradient, strided
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


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _delta_kernel(
    out, d_out, d_lse, delta_ptr, heads, seqlen_q,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dO * O) - dLSE``: the mean that softmax's gradient subtracts."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row_start = tl.program_id(0) % tiles * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    o = load_tile(head_of(out, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    do = load_tile(head_of(d_out, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    # a row that sees nothing is 0, and NaN or inf that comes in as its gradient must not reach the sink's
    delta = tl.where(tl.max(tl.abs(o.to(tl.float32)), 1) == 0.0, 0.0, delta)
    row = row_start + tl.arange(0, BLOCK_M)
    if d_lse is not None:
        d_lse_ptr, stride_lb, stride_lh, stride_lm = d_lse
        ptrs = d_lse_ptr + batch * stride_lb + head * stride_lh + row.to(tl.int64) * stride_lm
        delta -= tl.load(ptrs, mask=row < seqlen_q, other=0.0).to(tl.float32)
    tl.store(delta_ptr + batch_head.to(tl.int64) * seqlen_q + row, delta, mask=row < seqlen_q)


@triton.jit
def load_weights_gradient(d_weights, rows, cols, at, sizes):
    """A tile of the gradient of the returned weights, as the share of this head."""
    d_weights_ptr, stride_b, stride_h, stride_m, stride_n, share = d_weights
    ptrs = d_weights_ptr + at[0] * stride_b + at[1] * stride_h + rows.to(tl.int64) * stride_m
    inside = (rows < sizes[0]) & (cols < sizes[1])
    return tl.load(ptrs + cols.to(tl.int64) * stride_n, mask=inside, other=0.0).to(tl.float32) * share


@triton.jit
def bent_scores(qk, unit, rules):
    """Scores in base 2, softcapped, before anything is added to them."""
    scores = qk * unit
    if rules[6] is not None:
        scores = capped(scores, rules[6])
    return scores


@triton.jit
def probabilities(scores, row_max, inverse_sum, rows, cols, at, sizes, rules, PARTIAL: tl.constexpr):
    """P of a tile of :func:`bent_scores`, in either orientation; the rows' statistics broadcast against it."""
    scores = masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL)
    p = tl.exp2(scores - row_max) * inverse_sum
    if PARTIAL or rules[1] is not None:
        p = tl.where(scores == -INFINITY, 0.0, p)  # the statistics of a row may be NaN
    return p


@triton.jit
def score_gradient(p, factor, dp, delta, rows, cols, at, sizes, rules, d_weights, PARTIAL: tl.constexpr):
    """dS of a tile, from P, the factor that dropout puts on it (or None), dO V^T and delta."""
    if d_weights is not None:
        dp += load_weights_gradient(d_weights, rows, cols, at, sizes)
    if factor is not None:
        dp = tl.where(factor == 0.0, 0.0, dp * factor)
    ds = p * (dp - delta)
    if PARTIAL or rules[1] is not None:
        ds = tl.where(p == 0.0, 0.0, ds)  # what dP is of a masked-out value may be NaN or inf, and 0 * NaN is NaN
    return ds


@triton.jit
def _through_softcap(ds, scores, softcap):
    """The gradient of the scores before the softcap."""
    if softcap is not None:
        ds = tl.where(ds == 0.0, 0.0, ds * capped_slope(scores, softcap))  # 0 * NaN again
    return ds


@triton.jit
def _add_grad_of_queries(
    d_query_ptr, ds, k, row, seqlen_q, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """Add ``dS K``, without the scale, to one head's float32 dQ, in whatever order programs come to it."""
    # [M, D]: its transpose, of which wgmma could do tiles of fewer than 64 rows, spills on sm_80 (16 to 400 bytes)
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
    col = tl.arange(0, BLOCK_D)[None, :]
    ptrs = d_query_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + col
    tl.atomic_add(ptrs, dq, mask=(row < seqlen_q)[:, None] & (col < HEAD_DIM), sem="relaxed")


@triton.jit
def _grad_of_keys(
    dk, dv, k, v, unit, query, key, value, d_out, statistics_ptr, delta_ptr, col_start, batch, kv_head, heads, group,
    sizes, rules, dropout, d_weights, d_query_ptr, visits, edges, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what the tiles of rows that see these keys whole (if PARTIAL: in part) give, head after
    head; and to dQ, where there is one to add to, what these keys give.

    One loop over heads and rows: nothing is summed between programs, and two nested loops would spill (96 bytes more on
    sm_90 at head size 128). Tiles are transposed, ``[N, M]``, so that P and dS are left operands in registers.
    """
    seqlen_q, seqlen_k, _, _, _ = sizes
    cols = col_start + tl.arange(0, BLOCK_N)[:, None]
    # The pipeliner computes the first addresses ahead of the loop, also where the loop is empty, and a division by zero
    # there is undefined in LLVM. Any other guard of the division spilled 8 to 40 bytes on sm_90. In the backward in one
    # pass this one does too (8 bytes at head size 128), so that it is left out there: a GPU divides by zero unharmed.
    if d_query_ptr is not None or visits > 0:
        for step in tl.range(0, group * visits):
            member = step // visits
            tile = visited_tile(step - member * visits, edges, tiles, tl.cdiv(seqlen_q, BLOCK_M), PARTIAL)
            start = tile * BLOCK_M
            head = kv_head * group + member
            at = (batch, head)
            batch_head = batch * heads + head
            row = start + tl.arange(0, BLOCK_M)
            rows = row[None, :]
            head_q, head_do = head_of(query, batch, head), head_of(d_out, batch, head)
            q = load_tile(head_q, start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
            do = load_tile(head_do, start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
            row_max, inverse_sum = load_statistics(statistics_ptr + 2 * batch_head * seqlen_q, row, seqlen_q)
            delta = tl.load(delta_ptr + batch_head * seqlen_q + row, mask=row < seqlen_q, other=0.0)
            qk = product(
                k, key, col_start, seqlen_k, q, head_q, start, seqlen_q, BLOCK_N, BLOCK_M, BLOCK_D, HEAD_DIM, PRECISION,
                256,  # strips of keys would stay in registers, since the loop does not change them
            )  # fmt: skip
            scores = bent_scores(qk, unit, rules)
            p = probabilities(scores, row_max[None, :], inverse_sum[None, :], rows, cols, at, sizes, rules, PARTIAL)
            factor = None
            dropped = p
            if dropout is not None:
                factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
                dropped = p * factor
            dv = weighted_sum(dropped.to(do.dtype), do, dv, CAREFUL, PRECISION)
            dp = product(
                v, value, col_start, seqlen_k, do, head_do, start, seqlen_q, BLOCK_N, BLOCK_M, BLOCK_DV, VALUE_DIM,
                PRECISION, 256,
            )  # fmt: skip
            ds = score_gradient(p, factor, dp, delta[None, :], rows, cols, at, sizes, rules, d_weights, PARTIAL)
            ds = _through_softcap(ds, scores, rules[6]).to(q.dtype)
            dk = weighted_sum(ds, q, dk, CAREFUL, PRECISION)
            if d_query_ptr is not None:
                _add_grad_of_queries(
                    d_query_ptr + batch_head * seqlen_q * HEAD_DIM, ds, k, row, seqlen_q, BLOCK_D, HEAD_DIM, PRECISION
                )
    return dk, dv


@triton.jit
def _grad_of_tile_of_keys(
    batch_head, col_tile, query, key, value, d_out, statistics_ptr, delta_ptr, d_key, d_value, marks_ptr,
    rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, d_query_ptr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one BLOCK_N tile of keys, from all query rows that see it; a key is marked, unless ``marks_ptr`` is
    None, where one of the two is not finite."""
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    kv_heads = heads // group
    col_start = col_tile * BLOCK_N
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    d_key = head_of(d_key, batch, kv_head)
    d_value = head_of(d_value, batch, kv_head)
    sizes = (seqlen_q, seqlen_k, lower, upper, shift)
    key = head_of(key, batch, kv_head)
    value = head_of(value, batch, kv_head)
    k = load_tile(key, col_start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    v = load_tile(value, col_start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, True)
    unit = scale * LOG2_E

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    tiles = None
    if tile_lists is not None:
        tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, (batch, kv_head), col_tile, tiles_n, tiles_m)
    edges = row_edges(col_start, (batch, kv_head), sizes, rules, BLOCK_M, BLOCK_N)
    full, partial = count_visits(edges, tiles)
    dk, dv = _grad_of_keys(
        dk, dv, k, v, unit, query, key, value, d_out, statistics_ptr, delta_ptr, col_start, batch, kv_head, heads,
        group, sizes, rules, dropout, d_weights, d_query_ptr, partial, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, CAREFUL, PRECISION,
    )  # fmt: skip
    dk, dv = _grad_of_keys(
        dk, dv, k, v, unit, query, key, value, d_out, statistics_ptr, delta_ptr, col_start, batch, kv_head, heads,
        group, sizes, rules, dropout, d_weights, d_query_ptr, full, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, CAREFUL, PRECISION,
    )  # fmt: skip
    dk *= scale
    store_tile(d_key, col_start, seqlen_k, dk, BLOCK_N, BLOCK_D, HEAD_DIM)
    store_tile(d_value, col_start, seqlen_k, dv, BLOCK_N, BLOCK_DV, VALUE_DIM)
    if marks_ptr is not None:
        col = col_start + tl.arange(0, BLOCK_N)
        marks = rows_not_finite(dk) | rows_not_finite(dv)
        tl.store(marks_ptr + batch_head.to(tl.int64) * seqlen_k + col, marks, mask=col < seqlen_k)


@triton.jit(do_not_specialize=[*RUN_TIME, "tiles"])
def _attention_bwd_dkdv_kernel(
    query, key, value, d_out, statistics_ptr, delta_ptr, d_key, d_value, marks_ptr, rules, dropout, d_weights,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
    d_query_ptr=None, only_if=None,
):  # fmt: skip
    """dK and dV of one of ``tiles`` tiles of keys. CAREFUL: of those of the program's share that hold a marked key.

    With ``d_query_ptr``, to zeros ``[B, H, L, D]``, it is the whole backward in one pass; see attention_bwd_one_pass.
    """
    if only_if is not None:
        if is_off(only_if):
            return
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    if CAREFUL:
        first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_k, BLOCK_N)
        for tile in tl.range(first, last):
            if is_marked(marks_ptr, tile, seqlen_k, BLOCK_N):
                _grad_of_tile_of_keys(
                    tile // tiles_n, tile % tiles_n, query, key, value, d_out, statistics_ptr, delta_ptr, d_key,
                    d_value, None, rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
                    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, d_query_ptr,
                    HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CAREFUL,
                )  # fmt: skip
    else:
        # under a diagonal the first keys are seen most: longest first
        _grad_of_tile_of_keys(
            tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, query, key, value, d_out, statistics_ptr,
            delta_ptr, d_key, d_value, marks_ptr, rules, dropout, d_weights,
            tile_lists, lists_per_batch, lists_per_head,
            heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, d_query_ptr,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CAREFUL,
        )  # fmt: skip


@triton.jit
def _grad_of_queries(
    dq, d_slope, q, do, row_max, inverse_sum, delta, unit, query, d_out, key, value, row_start, at, batch_head, sizes,
    rules, dropout, d_weights, visits, edges, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SLOPES: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dQ, and if SLOPES to the gradient of the rows' ALiBi slope, what the tiles of keys that are seen whole (if
    PARTIAL: in part) give."""
    seqlen_q, seqlen_k, _, _, shift = sizes
    rows = row_start + tl.arange(0, BLOCK_M)[:, None]
    for position in tl.range(0, visits):
        start = visited_tile(position, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL)
        v = load_tile(value, start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL)
        qk = product(
            q, query, row_start, seqlen_q, k, key, start, seqlen_k, BLOCK_M, BLOCK_N, BLOCK_D, HEAD_DIM, PRECISION, 128
        )  # fmt: skip
        scores = bent_scores(qk, unit, rules)
        p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, PARTIAL)
        factor = None
        if dropout is not None:
            factor = dropout_factor(rows, cols, batch_head, dropout)
        dp = product(
            do, d_out, row_start, seqlen_q, v, value, start, seqlen_k, BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM,
            PRECISION, 128,
        )  # fmt: skip
        ds = score_gradient(p, factor, dp, delta[:, None], rows, cols, at, sizes, rules, d_weights, PARTIAL)
        if SLOPES:
            d_slope -= tl.sum(ds * distance(rows, cols, shift), 1)
        dq = weighted_sum(_through_softcap(ds, scores, rules[6]).to(k.dtype), k, dq, CAREFUL, PRECISION)
    return dq, d_slope


@triton.jit
def _grad_of_tile_of_queries(
    batch_head, row_tile, query, key, value, d_out, statistics_ptr, delta_ptr, d_query, d_slopes_ptr, marks_ptr,
    rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dQ of one BLOCK_M tile of rows, from all keys that it sees; its rows are marked unless ``marks_ptr`` is None."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    row_start = row_tile * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    d_query = head_of(d_query, batch, head)
    at = (batch, head)
    sizes = (seqlen_q, seqlen_k, lower, upper, shift)
    key = head_of(key, batch, head // group)
    value = head_of(value, batch, head // group)
    query = head_of(query, batch, head)
    d_out = head_of(d_out, batch, head)
    row = row_start + tl.arange(0, BLOCK_M)
    q = load_tile(query, row_start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    do = load_tile(d_out, row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    row_max, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q)
    delta = tl.load(delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
    unit = scale * LOG2_E

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_slope = tl.zeros([BLOCK_M], tl.float32)
    tiles = None
    if tile_lists is not None:
        tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, at, row_tile, tiles_m, tiles_n)
    edges = key_edges(row_start, at, sizes, rules, BLOCK_M, BLOCK_N)
    full, partial = count_visits(edges, tiles)
    SLOPES: tl.constexpr = d_slopes_ptr is not None
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, unit, query, d_out, key, value, row_start, at, batch_head,
        sizes, rules, dropout, d_weights, full, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, SLOPES, False, CAREFUL, PRECISION,
    )  # fmt: skip
    dq, d_slope = _grad_of_queries(
        dq, d_slope, q, do, row_max, inverse_sum, delta, unit, query, d_out, key, value, row_start, at, batch_head,
        sizes, rules, dropout, d_weights, partial, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, SLOPES, True, CAREFUL, PRECISION,
    )  # fmt: skip
    dq *= scale
    store_tile(d_query, row_start, seqlen_q, dq, BLOCK_M, BLOCK_D, HEAD_DIM)
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(dq), mask=row < seqlen_q)
    if SLOPES:
        tl.store(d_slopes_ptr + rows_of + row, d_slope, mask=row < seqlen_q)


@triton.jit(do_not_specialize=[*RUN_TIME, "tiles"])
def _attention_bwd_dq_kernel(
    query, key, value, d_out, statistics_ptr, delta_ptr, d_query, d_slopes_ptr, marks_ptr, rules, dropout, d_weights,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
    only_if=None,
):  # fmt: skip
    """dQ of one of ``tiles`` tiles of rows. CAREFUL: of those of the program's share that hold a marked row."""
    if only_if is not None:
        if is_off(only_if):
            return
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    if CAREFUL:
        first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_q, BLOCK_M)
        for tile in tl.range(first, last):
            if is_marked(marks_ptr, tile, seqlen_q, BLOCK_M):
                _grad_of_tile_of_queries(
                    tile // tiles_m, tile % tiles_m, query, key, value, d_out, statistics_ptr, delta_ptr, d_query,
                    d_slopes_ptr, None, rules, dropout, d_weights, tile_lists, lists_per_batch, lists_per_head,
                    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
                    HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CAREFUL,
                )  # fmt: skip
    else:
        # longest first, as in the forward
        _grad_of_tile_of_queries(
            tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m, query, key, value, d_out,
            statistics_ptr, delta_ptr, d_query, d_slopes_ptr, marks_ptr, rules, dropout, d_weights, tile_lists,
            lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, CAREFUL,
        )  # fmt: skip


class GradientMarks(NamedTuple):
    """Marks of the rows of dQ, ``[B, H, L]``, and of the keys, ``[B, Hk, S]``, of which dK or dV is not finite."""

    of_rows: Tensor | None
    of_keys: Tensor | None


def empty_gradient_marks(problem: Problem) -> GradientMarks:
    """:func:`fastattn_kernels.common.marks.empty_marks` of all gradients."""
    return GradientMarks(empty_marks(problem, problem.query), empty_marks(problem, problem.key))


def launch_attention_delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """``rowsum(dO * O) - dLSE``, ``[B, H, L]`` float32."""
    batch, heads, seqlen_q, value_dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    if delta.numel() == 0:
        return delta
    block_m = 64
    with device_guard(out):
        _delta_kernel[(triton.cdiv(seqlen_q, block_m) * batch * heads,)](
            strided(out), strided(d_out), strided(d_lse), delta, heads, seqlen_q,
            VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), BLOCK_M=block_m,
        )  # fmt: skip
    return delta


def launch_attention_bwd(
    problem: Problem,
    d_out: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_slopes: Tensor | None = None,
    tile_map: TileMap | None = None,
    config: BackwardConfig | None = None,
    only_if: Argument = None,
) -> None:
    """Write dQ, dK and dV (any strides) from the forward's statistics and delta; and into ``d_slopes``, ``[B, H, L]``
    contiguous float32, the gradient of its ALiBi slope that each row gives. Nothing, where the device finds
    ``only_if`` otherwise (:meth:`WeightsGradient.only_if_used`)."""
    query = problem.query
    sizes = query.shape[3], problem.value.shape[3]
    config = config or backward_config(query.device, query.dtype, *sizes, problem.load(d_weights))
    marks = empty_gradient_marks(problem)
    arguments = problem, d_out, statistics, delta, d_weights, dq, dk, dv, marks, d_slopes
    _launch_passes(*arguments, tile_map, config, only_if, careful=False)
    if problem.masks_pairs():
        launch_careful_bwd(*arguments, only_if)


def launch_careful_bwd(
    problem: Problem,
    d_out: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    marks: GradientMarks,
    d_slopes: Tensor | None = None,
    only_if: Argument = None,
) -> None:
    """Do again, with ``0 * NaN = 0 * inf = 0``, those tiles of gradients of which a row is marked: what follows the
    launch of any kernel on a problem that masks pairs."""
    smallest = careful_config(problem.query.dtype, problem.query.shape[3], problem.value.shape[3])
    config = BackwardConfig(smallest, smallest)
    _launch_passes(
        problem, d_out, statistics, delta, d_weights, dq, dk, dv, marks, d_slopes, None, config, only_if, careful=True
    )


def _launch_passes(
    problem: Problem,
    d_out: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    marks: GradientMarks,
    d_slopes: Tensor | None,
    tile_map: TileMap | None,
    config: BackwardConfig,
    only_if: Argument,
    *,
    careful: bool,
) -> None:
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_k, value_dim = key.shape[1], key.shape[2], value.shape[3]
    inputs = strided(query), strided(key), strided(value), strided(d_out), statistics, delta
    rules = problem.rules(), problem.dropout(), None if d_weights is None else d_weights.argument()
    numbers = (*problem.sizes(), problem.scale)
    sizes = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_DV": head_block(value_dim),
        "PRECISION": dot_precision(query.dtype),
    }
    with device_guard(query):
        if dk.numel() or dv.numel():
            tiles = int(triton.cdiv(seqlen_k, config.dkdv.block_n)) * batch * kv_heads
            _attention_bwd_dkdv_kernel[(programs(tiles, query.device, careful),)](
                *inputs, strided(dk), strided(dv), marks.of_keys, *rules,
                *list_arguments(tile_map and tile_map.of_keys(config.dkdv)), *numbers, tiles, **sizes,
                CAREFUL=careful, only_if=only_if, **config.dkdv.launch_options(),
            )  # fmt: skip
        if dq.numel():
            tiles = int(triton.cdiv(seqlen_q, config.dq.block_m)) * batch * heads
            _attention_bwd_dq_kernel[(programs(tiles, query.device, careful),)](
                *inputs, strided(dq), d_slopes, marks.of_rows, *rules,
                *list_arguments(tile_map and tile_map.of_rows(config.dq)), *numbers, tiles, **sizes,
                CAREFUL=careful, only_if=only_if, **config.dq.launch_options(),
            )  # fmt: skip
