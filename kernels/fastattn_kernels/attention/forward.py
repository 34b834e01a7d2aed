"""Forward: one tile of queries against all keys it may see, by online softmax (arXiv:2205.14135, arXiv:2307.08691)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import again_options, careful_config, forward_config
from fastattn_kernels.common.arguments import RUN_TIME, Blocks, Heads, PerHead, Sizes, TileLists, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.dropout import dropout_keep, dropout_scale
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import few_programs, is_marked, rows_not_finite, tiles_to_look_at
from fastattn_kernels.common.masking import INFINITY, LN_2, LOG2_E, in_unit, masked_scores
from fastattn_kernels.common.packed import Packing, Span, count_tiles, find_tile, line_of, place_of
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import softcapped_scores
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of, load_tile, softmax_step, store_statistics, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, visited_tile

# The smallest normal float32. Scores times this are 0, as a scale of 0 makes them, yet -inf times it stays -inf.
TINY = tl.constexpr(1.1754943508222875e-38)


class _Call(NamedTuple):
    """What every tile of a launch is told, beside its own place."""

    query: Heads
    key: Heads
    value: Heads
    output: Heads
    lse_ptr: Any
    statistics_ptr: Any
    sinks: PerHead | None
    dropout: Any
    lists: TileLists
    heads: Any
    group: Any
    scale: Any


@triton.jit
def _pointers(matrix, rows, cols):
    """Pointers to ``rows`` and ``cols`` of a matrix. The rows' offsets are worked out anew for each tile, so that none
    are kept from tile to tile: ``tile_pointers`` keeps them in 32 registers at a head size of 128, which the pipelined
    loop does not have."""
    return matrix.ptr + rows.to(tl.int64) * matrix.stride_row + cols.to(tl.int64) * matrix.stride_col


@triton.jit
def _load_rows(
    matrix, row_start, row_end, ROWS: tl.constexpr, COLS: tl.constexpr, USED_COLS: tl.constexpr, BOUND: tl.constexpr,
    PIPELINED: tl.constexpr,
):  # fmt: skip
    """:func:`load_tile`, in a pipelined kernel by way of :func:`_pointers`."""
    if not PIPELINED:
        return load_tile(matrix, row_start, row_end, ROWS, COLS, USED_COLS, BOUND)
    rows = row_start + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    ptrs = _pointers(matrix, rows, cols)
    if BOUND and USED_COLS < COLS:
        tile = tl.load(ptrs, mask=(rows < row_end) & (cols < USED_COLS), other=0.0)
    elif BOUND:
        tile = tl.load(ptrs, mask=rows < row_end, other=0.0)
    elif USED_COLS < COLS:
        tile = tl.load(ptrs, mask=cols < USED_COLS, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def attend_tile(
    acc, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL: tl.constexpr
):
    """``(P, acc, row_max, row_sum)`` after one more tile of products: a step of online softmax, but for adding P V."""
    # as long as nothing is made of the products, the scale can wait for the multiply-add of the exponent
    if rules.bias is None and rules.alibi_slopes is None and rules.softcap is None and rules.score_mod is None:
        scores = masked_scores(qk, rows, cols, at, sizes, rules, PARTIAL)
        p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, unit)
    else:
        scores = masked_scores(softcapped_scores(qk, unit, rules), rows, cols, at, sizes, rules, PARTIAL)
        p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, 1.0)
    if dropout is not None:
        p = tl.where(dropout_keep(rows, cols, batch_head, dropout), p, 0.0)
    return p, acc, row_max, row_sum


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, visits, edges, tiles,
    blocks, PARTIAL: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys that are seen whole or, if PARTIAL, over those seen in part.

    PIPELINED: the next tile's Q K^T comes before a tile's P V, and so a tile's exponentials, ahead of both, run while
    the tensor cores still compute the P V of the tile before.
    """
    seqlen_k = sizes.seqlen_k
    all_tiles = tl.cdiv(seqlen_k, blocks.N)
    if PIPELINED and not PARTIAL:
        start = tl.where(visits > 0, visited_tile(0, edges, tiles, all_tiles, PARTIAL), 0) * blocks.N
        k = _load_rows(key, start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, True, PIPELINED)
        qk = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)
        for position in tl.range(0, visits):
            cols = start + tl.arange(0, blocks.N)[None, :]
            # The P V of the tile before is still being added to acc. With 1.0 in the place of acc, the step returns the
            # factor that rescales it, and acc is multiplied by that below, just before it is added to again.
            p, correction, row_max, row_sum = attend_tile(
                1.0, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL
            )
            # rounded before the next products: P in float32 beside them would spill
            p = p.to(value.ptr.dtype.element_ty)
            v = _load_rows(value, start, seqlen_k, blocks.N, blocks.DV, blocks.VALUE_DIM, PARTIAL, PIPELINED)
            # After the last tile its keys are multiplied once more, and the result is thrown away. To leave that out, a
            # tail of its own behind the loop would spill, and a branch around all of this, for the loop's beginning,
            # would make ptxas serialise the loop's wgmma (C7515).
            following = tl.minimum(position + 1, visits - 1)
            start = visited_tile(following, edges, tiles, all_tiles, PARTIAL) * blocks.N
            k = _load_rows(key, start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, PARTIAL, PIPELINED)
            qk = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)
            acc = weighted_sum(p, v, acc * correction, blocks.CAREFUL, blocks.PRECISION)
    else:
        for position in tl.range(0, visits):
            start = visited_tile(position, edges, tiles, all_tiles, PARTIAL) * blocks.N
            cols = start + tl.arange(0, blocks.N)[None, :]
            k = _load_rows(key, start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, PARTIAL, PIPELINED)
            qk = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)
            p, acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL
            )
            v = _load_rows(value, start, seqlen_k, blocks.N, blocks.DV, blocks.VALUE_DIM, PARTIAL, PIPELINED)
            acc = weighted_sum(p.to(v.dtype), v, acc, blocks.CAREFUL, blocks.PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_rows(entry, row_tile, span, call, rules, blocks, PIPELINED: tl.constexpr):
    """Write the output and statistics of one tile of queries of one head (``packed.place_of``); return whether it holds
    NaN or inf."""
    sizes, dropout = span.sizes, call.dropout
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    row_start = row_tile * blocks.M
    at, batch_head = place_of(entry, call.heads, span)
    batch, head = at.batch, at.head
    key = head_of(call.key, batch, head // call.group, span.first_key)
    value = head_of(call.value, batch, head // call.group, span.first_key)
    query = head_of(call.query, batch, head, span.first_row)
    row = row_start + tl.arange(0, blocks.M)
    rows = row[:, None]
    q = _load_rows(query, row_start, seqlen_q, blocks.M, blocks.D, blocks.HEAD_DIM, True, PIPELINED)
    if not PIPELINED:
        # max(scale * qk) = scale * max(qk) holds for scale > 0: a negative one's sign moves into q, which is exact. Not
        # if pipelined: q as it is loaded stays in shared memory, a computed one is an operand in 32 registers.
        q = tl.where(call.scale < 0, -q, q)
    unit = tl.maximum(in_unit(tl.abs(call.scale), rules), TINY)

    acc = tl.zeros([blocks.M, blocks.DV], tl.float32)
    row_max = tl.full([blocks.M], -INFINITY, tl.float32)
    if call.sinks is not None:  # a sink is a key that every row has seen before the first
        sinks = call.sinks
        sink = tl.load(sinks.ptr + batch * sinks.stride_b + head * sinks.stride_h).to(tl.float32)
        row_max = tl.maximum(row_max, sink * LOG2_E)
    row_sum = tl.where(row_max == -INFINITY, 0.0, 1.0)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, row_tile, tl.cdiv(seqlen_q, blocks.M), tl.cdiv(seqlen_k, blocks.N))
    edges = key_edges(row_start, at, sizes, rules, blocks.M, blocks.N)
    full, partial = count_visits(edges, tiles)
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, full, edges, tiles,
        blocks, False, PIPELINED,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, partial, edges, tiles,
        blocks, True, PIPELINED,
    )  # fmt: skip

    inverse_sum = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    norm = inverse_sum
    if dropout is not None:
        norm = norm * dropout_scale(dropout)
    o = acc * norm[:, None]
    output = head_of(call.output, batch, head, span.first_row)
    if PIPELINED:
        cols = tl.arange(0, blocks.DV)[None, :]
        inside = (rows < seqlen_q) & (cols < blocks.VALUE_DIM)
        tl.store(_pointers(output, rows, cols), o.to(output.ptr.dtype.element_ty), mask=inside)
    else:
        store_tile(output, row_start, seqlen_q, o, blocks.M, blocks.DV, blocks.VALUE_DIM)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    lse_ptr = call.lse_ptr + line_of(batch_head, at, span.first_row, span.all_rows, 1)
    tl.store(lse_ptr + row, (pivot + tl.log2(row_sum)) * LN_2, mask=row < seqlen_q)
    statistics_ptr = call.statistics_ptr + line_of(batch_head, at, span.first_row, span.all_rows, 2)
    store_statistics(statistics_ptr, row, seqlen_q, pivot, inverse_sum, span.all_rows)
    return tl.max(rows_not_finite(o), 0) > 0


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_fwd_kernel(
    query, key, value, output, lse_ptr, statistics_ptr, rules, sinks, dropout,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, AGAIN_M: tl.constexpr, AGAIN_N: tl.constexpr,
    PIPELINED: tl.constexpr = False,  # pyrefly: ignore[bad-function-definition]
):  # fmt: skip
    """One tile of queries. If AGAIN_M is not 0, something is hidden, and a tile whose output is not finite is computed
    again at once, carefully, in tiles of AGAIN_M by AGAIN_N.

    When the careful loops begin, no register holds anything of the others any more. On sm_90 and for bfloat16, at head
    sizes 64 and 128, the others are the same instructions with them and without. Where every feature is asked for at
    once, 24 bytes are spilled (sm_80: 112), outside of the loops that all programs run.
    """
    packing = Packing(offsets, sequences, longest_q, longest_k, bottom_right)
    tiles_m = count_tiles(seqlen_q, sequences, BLOCK_M)
    # the last rows see the most keys under a diagonal: longest tiles first leave no long one for the end
    entry, number = tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m
    row_tile, span = find_tile(number, Sizes(seqlen_q, seqlen_k, lower, upper, shift), packing, BLOCK_M, True)
    if sequences is not None:
        if row_tile < 0:
            return
    is_suspect = _attend_rows(
        entry, row_tile, span,
        _Call(
            query, key, value, output, lse_ptr, statistics_ptr, sinks, dropout,
            TileLists(tile_lists, lists_per_batch, lists_per_head), heads, group, scale,
        ),
        rules, Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False), PIPELINED,
    )  # fmt: skip
    if AGAIN_M > 0:
        if is_suspect:
            for part in tl.range(0, BLOCK_M // AGAIN_M):
                _attend_rows(
                    entry, row_tile * (BLOCK_M // AGAIN_M) + part, span,
                    _Call(
                        query, key, value, output, lse_ptr, statistics_ptr, sinks, dropout,
                        TileLists(None, 0, 0), heads, group, scale,  # the lists are of larger tiles
                    ),
                    rules, Blocks(AGAIN_M, AGAIN_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, True), False,
                )  # fmt: skip


@triton.jit(do_not_specialize=[*RUN_TIME, "tiles"])
def _attention_fwd_careful_kernel(
    query, key, value, output, lse_ptr, statistics_ptr, marks_ptr, rules, sinks, dropout,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Behind the forward in Gluon: of ``tiles`` tiles of queries each program looks after its share, and computes those
    that hold a marked row."""
    call = _Call(
        query, key, value, output, lse_ptr, statistics_ptr, sinks, dropout, TileLists(None, 0, 0), heads, group, scale
    )
    span = Span(Sizes(seqlen_q, seqlen_k, lower, upper, shift), None, None, None, seqlen_q, seqlen_k)
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_q, BLOCK_M)
    for tile in tl.range(first, last):
        if is_marked(marks_ptr, tile, seqlen_q, BLOCK_M):
            _attend_rows(
                tile // tiles_m, tile % tiles_m, span, call, rules,
                Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, CAREFUL), False,
            )  # fmt: skip


def launch_attention_fwd(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    statistics: Tensor,
    tile_map: TileMap | None = None,
    config: Config | None = None,
) -> None:
    """Write the output, the LSE and the statistics; of rows that belong to no packed sequence, nothing.

    Args:
        problem: the call's inputs.
        output: ``[B, H, L, Dv]``, any strides.
        lse: ``[B, H, L]``, contiguous float32: the natural logarithm of each row's sum of exponentials.
        statistics: ``[B, H, 2, L]``, contiguous float32, which the other launchers take: ``tiles.load_statistics``.
        tile_map: of the problem; None: arithmetic says which tiles are visited.
        config: the tile; None: the one that ``forward_config`` chooses.
    """
    if lse.numel() == 0:
        return
    query = problem.query
    config = config or forward_config(query.device, query.dtype, query.shape[3], problem.value.shape[3], problem.load())
    whole = query.shape[3] == problem.value.shape[3] == head_block(query.shape[3])  # padded heads would spill
    if problem.scale < 0 or not whole:  # its sign moves into q, which the pipelined order leaves as it is loaded
        config = config._replace(pipelined=False)
    lists = None if tile_map is None else tile_map.of_rows(config)
    tiles, tensors, constants = _of_launch(problem, output, lse, statistics, config)
    if not tiles:
        return
    launch(
        _attention_fwd_kernel, (tiles,), query,
        *tensors, problem.rules(), strided(PerHead, problem.sinks), problem.dropout(), *list_arguments(lists),
        *problem.sizes(), problem.scale, *problem.packing(), **constants, **again_options(problem, config),
    )  # fmt: skip


def launch_careful_fwd(problem: Problem, output: Tensor, lse: Tensor, statistics: Tensor, marks: Tensor) -> None:
    """Compute again, with ``0 * NaN = 0 * inf = 0``, the tiles with rows that a forward in Gluon has marked. Where it
    has marked none, this reads the marks and writes nothing."""
    config = careful_config(problem.query.dtype, problem.query.shape[3], problem.value.shape[3])
    tiles, tensors, constants = _of_launch(problem, output, lse, statistics, config)
    launch(
        _attention_fwd_careful_kernel, (few_programs(tiles, output.device),), output,
        *tensors, marks, problem.rules(), strided(PerHead, problem.sinks), problem.dropout(), *problem.sizes(),
        problem.scale, tiles, **constants, CAREFUL=True,
    )  # fmt: skip


def _of_launch(
    problem: Problem, output: Tensor, lse: Tensor, statistics: Tensor, config: Config
) -> tuple[int, tuple[object, ...], dict[str, Any]]:
    """How many tiles of rows there are, the kernel arguments ``query`` to ``statistics_ptr``, and the constants."""
    query, value = problem.query, problem.value
    head_dim = query.shape[3]
    tiles = problem.tiles_of_rows(config.block_m)
    tensors = *(strided(Heads, each) for each in (query, problem.key, value, output)), lse, statistics
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[3],
        "BLOCK_D": head_block(head_dim),
        "BLOCK_DV": head_block(value.shape[3]),
        "PRECISION": dot_precision(query.dtype),
        **config.launch_options(),
    }
    return tiles, tensors, constants
