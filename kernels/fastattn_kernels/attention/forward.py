"""Forward: one tile of queries against all keys it may see, by online softmax (arXiv:2205.14135, arXiv:2307.08691)."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import Config, careful_config, dot_precision, forward_config, head_block
from fastattn_kernels.common.device import device_guard
from fastattn_kernels.common.dropout import dropout_keep, dropout_scale
from fastattn_kernels.common.marks import empty_marks, is_marked, programs, rows_not_finite, tiles_to_look_at
from fastattn_kernels.common.masking import INFINITY, LN_2, LOG2_E, capped, masked_scores
from fastattn_kernels.common.problem import RUN_TIME, Problem, strided
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of, load_tile, softmax_step, store_statistics, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, visited_tile

# The smallest normal float32: scores times this are 0, as a scale of 0 wants, yet -inf times it stays -inf.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _pointers(matrix, rows, cols):
    """Pointers to ``rows`` and ``cols`` of a matrix. The rows' offsets change with the tile, so that none are kept from
    tile to tile: those of ``tile_pointers`` take 32 registers at a head size of 128, which the pipelined loop lacks."""
    ptr, stride_row, stride_col = matrix
    return ptr + rows.to(tl.int64) * stride_row + cols.to(tl.int64) * stride_col


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
def _attend_tile(
    acc, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL: tl.constexpr
):
    """``(P, acc, row_max, row_sum)`` after one more tile of products: a step of online softmax, but for adding P V."""
    _, bias, _, _, _, slopes, softcap, _ = rules
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
    return p, acc, row_max, row_sum


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, visits, edges, tiles,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, PIPELINED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys that are seen whole or, if PARTIAL, over those seen in part.

    PIPELINED: the next tile's Q K^T comes before a tile's P V, and so a tile's exponentials, ahead of both, run while
    the tensor cores still do the P V of the tile before.
    """
    seqlen_k = sizes[1]
    if PIPELINED and not PARTIAL:
        start = tl.where(visits > 0, visited_tile(0, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL), 0) * BLOCK_N
        k = _load_rows(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, True, PIPELINED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        for position in tl.range(0, visits):
            cols = start + tl.arange(0, BLOCK_N)[None, :]
            # acc still is what P V is being added to: 1.0 in its place becomes the factor that it needs
            p, correction, row_max, row_sum = _attend_tile(
                1.0, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL
            )
            p = p.to(value[0].dtype.element_ty)  # before the next products, which else would spill
            v = _load_rows(value, start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL, PIPELINED)
            # the last tile's keys are multiplied again, in vain: a tail of its own behind the loop would spill, and a
            # branch around all of this, for its beginning, would serialise the loop's wgmma (C7515)
            following = tl.minimum(position + 1, visits - 1)
            start = visited_tile(following, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL) * BLOCK_N
            k = _load_rows(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL, PIPELINED)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc = weighted_sum(p, v, acc * correction, CAREFUL, PRECISION)
    else:
        for position in tl.range(0, visits):
            start = visited_tile(position, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL) * BLOCK_N
            cols = start + tl.arange(0, BLOCK_N)[None, :]
            k = _load_rows(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL, PIPELINED)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p, acc, row_max, row_sum = _attend_tile(
                acc, row_max, row_sum, qk, unit, rows, cols, at, batch_head, sizes, rules, dropout, PARTIAL
            )
            v = _load_rows(value, start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL, PIPELINED)
            acc = weighted_sum(p.to(v.dtype), v, acc, CAREFUL, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_rows(
    batch_head, row_tile, query, key, value, out, lse_ptr, statistics_ptr, marks_ptr, rules, sinks, dropout,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
    PIPELINED: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M tile of queries of one head against all visible keys; with marks, unless ``marks_ptr`` is None."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    row_start = row_tile * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    out = head_of(out, batch, head)
    at = (batch, head)
    sizes = (seqlen_q, seqlen_k, lower, upper, shift)
    key = head_of(key, batch, head // group)
    value = head_of(value, batch, head // group)
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    q = _load_rows(head_of(query, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True, PIPELINED)
    if not PIPELINED:
        # max(scale * qk) = scale * max(qk) wants scale > 0: a negative one's sign moves into q, which is exact. Not if
        # pipelined: q as it is loaded stays in shared memory, a computed one is an operand in 32 registers.
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
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, PIPELINED, CAREFUL, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, key, value, rows, at, batch_head, sizes, rules, dropout, partial, edges, tiles,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, PIPELINED, CAREFUL, PRECISION,
    )  # fmt: skip

    inverse_sum = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    norm = inverse_sum
    if dropout is not None:
        norm = norm * dropout_scale(dropout)
    o = acc * norm[:, None]
    if PIPELINED:
        cols = tl.arange(0, BLOCK_DV)[None, :]
        inside = (rows < seqlen_q) & (cols < VALUE_DIM)
        tl.store(_pointers(out, rows, cols), o.to(out[0].dtype.element_ty), mask=inside)
    else:
        store_tile(out, row_start, seqlen_q, o, BLOCK_M, BLOCK_DV, VALUE_DIM)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(o), mask=row < seqlen_q)
    tl.store(lse_ptr + rows_of + row, (pivot + tl.log2(row_sum)) * LN_2, mask=row < seqlen_q)
    store_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q, pivot, inverse_sum)


@triton.jit(do_not_specialize=[*RUN_TIME, "tiles"])
def _attention_fwd_kernel(
    query, key, value, out, lse_ptr, statistics_ptr, marks_ptr, rules, sinks, dropout,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
    PIPELINED: tl.constexpr = False,  # pyrefly: ignore[bad-function-definition]
):  # fmt: skip
    """A program computes one of ``tiles`` tiles of queries. CAREFUL: it looks after its share of all tiles, and
    computes those again that hold a marked row."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    if CAREFUL:
        first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_q, BLOCK_M)
        for tile in tl.range(first, last):
            if is_marked(marks_ptr, tile, seqlen_q, BLOCK_M):
                _attend_rows(
                    tile // tiles_m, tile % tiles_m, query, key, value, out, lse_ptr, statistics_ptr, None, rules,
                    sinks, dropout, tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k,
                    lower, upper, shift, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                    CAREFUL, PIPELINED,
                )  # fmt: skip
    else:
        # the last rows see the most keys under a diagonal: longest tiles first leave no long one for the end
        _attend_rows(
            tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m, query, key, value, out, lse_ptr,
            statistics_ptr, marks_ptr, rules, sinks, dropout, tile_lists, lists_per_batch, lists_per_head, heads, group,
            seqlen_q, seqlen_k, lower, upper, shift, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            PRECISION, CAREFUL, PIPELINED,
        )  # fmt: skip


def _launch(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    marks: Tensor | None,
    lists: Tensor | None,
    config: Config,
    careful: bool,
) -> None:
    query, value = problem.query, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    value_dim = value.shape[3]
    tiles = int(triton.cdiv(seqlen_q, config.block_m)) * batch * heads
    with device_guard(query):
        _attention_fwd_kernel[(programs(tiles, query.device, careful),)](
            strided(query), strided(problem.key), strided(value), strided(out), lse, statistics, marks,
            problem.rules(), strided(problem.sinks), problem.dropout(), *list_arguments(lists),
            *problem.sizes(), problem.scale, tiles,
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
            PRECISION=dot_precision(query.dtype), CAREFUL=careful, **config.launch_options(),
        )  # fmt: skip


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
    query = problem.query
    config = config or forward_config(query.device, query.dtype, query.shape[3], problem.value.shape[3], problem.load())
    whole = query.shape[3] == problem.value.shape[3] == head_block(query.shape[3])  # padded heads would spill
    if problem.scale < 0 or not whole:  # its sign moves into q, which the pipelined order leaves as it is loaded
        config = config._replace(pipelined=False)
    lists = None if tile_map is None else tile_map.of_rows(config)
    marks = empty_marks(problem, out)
    _launch(problem, out, lse, statistics, marks, lists, config, careful=False)
    if marks is not None:
        launch_careful_fwd(problem, out, lse, statistics, marks)


def launch_careful_fwd(problem: Problem, out: Tensor, lse: Tensor, statistics: Tensor, marks: Tensor) -> None:
    """Do again, with ``0 * NaN = 0 * inf = 0``, the tiles with rows that the forward has marked. Where it has marked
    none, this reads the marks and writes nothing."""
    config = careful_config(problem.query.dtype, problem.query.shape[3], problem.value.shape[3])
    _launch(problem, out, lse, statistics, marks, None, config, careful=True)
