"""Forward of additive attention: scores column by column, then online softmax (arXiv:1409.0473, arXiv:2205.14135).

``score(i, j) = sum_a w_a tanh(q_ia + k_ja)`` is no matrix product: a tile of scores is summed in registers over the
columns ``a``, of each of which it wants BLOCK_M numbers of the queries and BLOCK_N of the keys. Nothing larger is made.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.additive_attention.config import (
    additive_careful_config,
    additive_forward_config,
    has_hardware_tanh,
)
from fastattn_kernels.additive_attention.problem import AdditiveProblem
from fastattn_kernels.attention.config import Config, dot_precision, head_block
from fastattn_kernels.common.device import device_guard
from fastattn_kernels.common.marks import empty_marks, is_marked, programs, rows_not_finite, tiles_to_look_at
from fastattn_kernels.common.masking import INFINITY, LOG2_E, masked_scores, tanh
from fastattn_kernels.common.problem import RUN_TIME, strided
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of, load_tile, softmax_step, store_statistics, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, visited_tile

# Columns in one turn of the loop: so many loads are on their way together.
_UNROLLED = tl.constexpr(4)


@triton.jit
def bend(x, HARDWARE_TANH: tl.constexpr):
    """``tanh(x)``, by one instruction if HARDWARE_TANH."""
    if HARDWARE_TANH:
        bent = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        bent = tanh(x)
    return bent


@triton.jit
def columns_of(tensor, batch, head):
    """The columns of one head, (pointer, stride of column), from (pointer, strides of batch, head, column, 1)."""
    ptr, stride_b, stride_h, stride_a, _ = tensor
    return ptr + batch * stride_b + head * stride_h, stride_a


@triton.jit
def weight_of(weight, head):
    """The weight of one head: (pointer, stride)."""
    weight_ptr, stride_h, stride_a = weight
    return weight_ptr + head * stride_h, stride_a


@triton.jit
def additive_scores(
    x, x_start, y, y_start, weight, size, ROWS: tl.constexpr, COLS: tl.constexpr, HARDWARE_TANH: tl.constexpr
):
    """``sum_a w_a tanh(x_ra + y_ca)`` in base 2, ``[ROWS, COLS]``: of queries and keys, or of keys and queries."""
    x_ptr, stride_xa = x
    y_ptr, stride_ya = y
    weight_ptr, stride_w = weight
    x_ptrs = x_ptr + x_start + tl.arange(0, ROWS)
    y_ptrs = y_ptr + y_start + tl.arange(0, COLS)
    # A product of nothing, for its layout: a row belongs to four threads, where elementwise arithmetic alone would give
    # it to a warp. That takes a third of the loads, half of the registers and a tenth of a maximum's shuffles (sm_90),
    # and leaves P as the next product wants it.
    nothing = tl.zeros([ROWS, 16], tl.float16), tl.zeros([16, COLS], tl.float16)
    scores = tl.dot(nothing[0], nothing[1])
    for first in tl.range(0, size, _UNROLLED):
        for offset in tl.static_range(_UNROLLED):
            a = tl.minimum(first + offset, size - 1).to(tl.int64)  # one past the last has no weight
            w = tl.load(weight_ptr + a * stride_w).to(tl.float32)
            w = tl.where(first + offset < size, w * LOG2_E, 0.0)
            x_a = tl.load(x_ptrs + a * stride_xa).to(tl.float32)
            y_a = tl.load(y_ptrs + a * stride_ya).to(tl.float32)
            scores += w * bend(x_a[:, None] + y_a[None, :], HARDWARE_TANH)
    return scores


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, query, key, weight, value, row_start, at, size, sizes, rules, visits, edges, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys that are seen whole or, if PARTIAL, over those seen in part."""
    seqlen_k = sizes[1]
    rows = row_start + tl.arange(0, BLOCK_M)[:, None]
    for position in tl.range(0, visits):
        start = visited_tile(position, edges, tiles, tl.cdiv(seqlen_k, BLOCK_N), PARTIAL) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        scores = additive_scores(query, row_start, key, start, weight, size, BLOCK_M, BLOCK_N, HARDWARE_TANH)
        scores = masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL)
        p, acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, 1.0)
        v = load_tile(value, start, seqlen_k, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL)
        acc = weighted_sum(p.to(v.dtype), v, acc, CAREFUL, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_rows(
    batch_head, row_tile, query, key, weight, value, out, statistics_ptr, marks_ptr, rules,
    tile_lists, lists_per_batch, lists_per_head, heads, seqlen_q, seqlen_k, lower, upper, shift, size,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M tile of queries of one head against all visible keys; with marks, unless ``marks_ptr`` is None."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    row_start = row_tile * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    out = head_of(out, batch, head)
    at = (batch, head)
    sizes = (seqlen_q, seqlen_k, lower, upper, shift)
    query, key, weight = columns_of(query, batch, head), columns_of(key, batch, head), weight_of(weight, head)
    value = head_of(value, batch, head)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -INFINITY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tiles = None
    if tile_lists is not None:
        tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, at, row_tile, tiles_m, tiles_n)
    edges = key_edges(row_start, at, sizes, rules, BLOCK_M, BLOCK_N)
    full, partial = count_visits(edges, tiles)
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, query, key, weight, value, row_start, at, size, sizes, rules, full, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM, False, CAREFUL, PRECISION, HARDWARE_TANH,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, query, key, weight, value, row_start, at, size, sizes, rules, partial, edges, tiles,
        BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM, True, CAREFUL, PRECISION, HARDWARE_TANH,
    )  # fmt: skip

    inverse_sum = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    o = acc * inverse_sum[:, None]
    store_tile(out, row_start, seqlen_q, o, BLOCK_M, BLOCK_DV, VALUE_DIM)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    row = row_start + tl.arange(0, BLOCK_M)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(o), mask=row < seqlen_q)
    store_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q, pivot, inverse_sum)


@triton.jit(do_not_specialize=[*RUN_TIME, "size", "tiles"])
def _additive_fwd_kernel(
    query, key, weight, value, out, statistics_ptr, marks_ptr, rules, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, size, tiles,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One of ``tiles`` tiles of queries. CAREFUL: those of the program's share that hold a marked row."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    if CAREFUL:
        first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_q, BLOCK_M)
        for tile in tl.range(first, last):
            if is_marked(marks_ptr, tile, seqlen_q, BLOCK_M):
                _attend_rows(
                    tile // tiles_m, tile % tiles_m, query, key, weight, value, out, statistics_ptr, None, rules,
                    tile_lists, lists_per_batch, lists_per_head, heads, seqlen_q, seqlen_k, lower, upper, shift, size,
                    VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, HARDWARE_TANH, CAREFUL,
                )  # fmt: skip
    else:
        # longest first, as in attention.forward
        _attend_rows(
            tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m, query, key, weight, value, out,
            statistics_ptr, marks_ptr, rules, tile_lists, lists_per_batch, lists_per_head, heads, seqlen_q, seqlen_k,
            lower, upper, shift, size, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, HARDWARE_TANH, CAREFUL,
        )  # fmt: skip


def launch_additive_fwd(
    problem: AdditiveProblem,
    out: Tensor,
    statistics: Tensor,
    tile_map: TileMap | None = None,
    config: Config | None = None,
) -> None:
    """Write the output ``[B, H, L, Dv]`` (any strides), and the statistics ``[B, H, 2, L]``, contiguous and float32,
    that the other launchers take."""
    query, value = problem.query, problem.value
    (batch, heads, seqlen_q, size), value_dim = query.shape, value.shape[3]
    if statistics.numel() == 0:
        return
    config = config or additive_forward_config(query.device, query.dtype, value_dim, problem.load())
    scored = problem.scored()
    hardware_tanh = has_hardware_tanh(query.device, query.dtype)
    marks = empty_marks(problem, out)
    for careful in (False,) if marks is None else (False, True):
        tile = additive_careful_config() if careful else config
        lists = tile_map.of_rows(tile) if tile_map is not None and not careful else None
        tiles = int(triton.cdiv(seqlen_q, tile.block_m)) * batch * heads
        with device_guard(query):
            _additive_fwd_kernel[(programs(tiles, query.device, careful),)](
                *scored, strided(value), strided(out), statistics, marks, problem.rules(), *list_arguments(lists),
                *problem.sizes(), size, tiles,
                VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), PRECISION=dot_precision(query.dtype),
                HARDWARE_TANH=hardware_tanh, CAREFUL=careful, **tile.launch_options(),
            )  # fmt: skip
