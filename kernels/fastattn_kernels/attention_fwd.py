"""Forward: one tile of queries against all keys it may see, by online softmax (arXiv:2205.14135, arXiv:2307.08691)."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels._device import device_guard
from fastattn_kernels._dropout import dropout_keep, dropout_scale
from fastattn_kernels._masking import INFINITY, LN_2, LOG2_E, capped, masked_scores
from fastattn_kernels._tiles import (
    any_not_finite,
    head_of,
    load_tile,
    softmax_step,
    store_statistics,
    store_tile,
    weighted_sum,
)
from fastattn_kernels._visits import count_visits, key_edges, list_of, visited_tile
from fastattn_kernels.attention_config import Config, careful_config, dot_precision, forward_config, head_block
from fastattn_kernels.attention_problem import RUN_TIME, Problem, strided
from fastattn_kernels.attention_tile_map import TileMap, list_arguments

# The smallest normal float32: scores times this are 0, as a scale of 0 wants, yet -inf times it stays -inf.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, visits, edges, tiles,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys that are seen whole or, if PARTIAL, over those seen in part."""
    seqlen_k = sizes[1]
    _, bias, _, _, _, slopes, softcap = rules
    for position in tl.range(0, visits):
        start = visited_tile(position, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if bias is None and slopes is None and softcap is None:  # nothing is added in another unit
            scores = masked_scores(qk, rows, cols, at, sizes, rules, PARTIAL)
            p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, unit)
        else:
            scores = qk * unit
            if softcap is not None:
                scores = capped(scores, softcap)
            scores = masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL)
            p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, 1.0)
        if dropout is not None:
            p = tl.where(dropout_keep(rows, cols, batch_head, dropout), p, 0.0)
        v = load_tile(value, start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL)
        acc = weighted_sum(p.to(v.dtype), v, acc, CAREFUL, PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_fwd_kernel(
    query, key, value, out, lse_ptr, statistics_ptr, rules, sinks, dropout,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M tile of queries of one head against all visible keys. CAREFUL: only if its output is not finite."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles_m
    # the last rows see the most keys under a diagonal: longest tiles first leave no long one for the end
    row_tile = tiles_m - 1 - tl.program_id(0) % tiles_m
    row_start = row_tile * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    out = head_of(out, batch, head)
    if CAREFUL:
        if not any_not_finite(load_tile(out, row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)):
            return
    at = (batch, head)
    sizes = (seqlen_q, seqlen_k, lower, upper, shift)
    key = head_of(key, batch, head // group)
    value = head_of(value, batch, head // group)
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    q = load_tile(head_of(query, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    # max(scale * qk) = scale * max(qk) wants scale > 0: a negative one's sign moves into q, which is exact
    q = tl.where(scale < 0, -q, q)
    unit = tl.maximum(tl.abs(scale) * LOG2_E, TINY)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -INFINITY, tl.float32)
    if sinks is not None:  # a sink is a key that every row has seen before the first
        sinks_ptr, stride_sb, stride_sh = sinks
        sink = tl.load(sinks_ptr + batch * stride_sb + head * stride_sh).to(tl.float32)
        row_max = tl.maximum(row_max, sink * LOG2_E)
    row_sum = tl.where(row_max == -INFINITY, 0.0, 1.0)
    tiles = None
    if tile_lists is not None:
        tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, at, row_tile, tiles_m, tiles_n)
    edges = key_edges(row_start, at, sizes, rules, BLOCK_M, BLOCK_N)
    full, partial = count_visits(edges, tiles)
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, full, edges, tiles,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, CAREFUL, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, partial, edges, tiles,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, CAREFUL, PRECISION,
    )  # fmt: skip

    inverse_sum = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    norm = inverse_sum
    if dropout is not None:
        norm = norm * dropout_scale(dropout)
    store_tile(out, row_start, seqlen_q, acc * norm[:, None], BLOCK_M, BLOCK_DV, VALUE_DIM)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    tl.store(lse_ptr + rows_of + row, (pivot + tl.log2(row_sum)) * LN_2, mask=row < seqlen_q)
    store_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q, pivot, inverse_sum)


def launch_attention_fwd(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    tile_map: TileMap | None = None,
    config: Config | None = None,
) -> None:
    """Write the output ``[B, H, L, Dv]`` (any strides), and, contiguous and float32, the natural LSE ``[B, H, L]`` and
    the statistics ``[B, H, 2, L]`` that the other launchers take."""
    if lse.numel() == 0:
        return
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    value_dim = value.shape[3]
    config = config or forward_config(query.device, query.dtype, head_dim, value_dim, problem.load())
    for careful in (False, True) if problem.masks_pairs() else (False,):
        tile = careful_config(query.dtype, head_dim, value_dim) if careful else config
        lists = tile_map.of_rows(tile) if tile_map is not None and not careful else None
        with device_guard(query):
            _attention_fwd_kernel[(triton.cdiv(seqlen_q, tile.block_m) * batch * heads,)](
                strided(query), strided(key), strided(value), strided(out), lse, statistics,
                problem.rules(), strided(problem.sinks), problem.dropout(), *list_arguments(lists),
                *problem.sizes(), problem.scale,
                HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
                PRECISION=dot_precision(query.dtype), CAREFUL=careful, **tile.launch_options(),
            )  # fmt: skip
