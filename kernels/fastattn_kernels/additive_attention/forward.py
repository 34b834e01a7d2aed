"""Forward of additive attention: scores column by column, then online softmax (arXiv:1409.0473, arXiv:2205.14135).

``score(i, j) = sum_a w_a tanh(q_ia + k_ja)`` is no matrix product: a tile of scores is summed in registers over the
columns ``a``, of each of which it wants BLOCK_M numbers of the queries and BLOCK_N of the keys. Nothing larger is made.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.additive_attention.config import (
    additive_careful_config,
    additive_forward_config,
    has_hardware_tanh,
)
from fastattn_kernels.additive_attention.problem import AdditiveProblem, Vector, Weight
from fastattn_kernels.common.arguments import RUN_TIME, At, Heads, Rules, Sizes, TileLists, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import empty_marks, few_programs, is_marked, rows_not_finite, tiles_to_look_at
from fastattn_kernels.common.masking import INFINITY, LOG2_E, masked_scores, tanh
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of, load_tile, softmax_step, store_statistics, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, visited_tile

# Columns in one turn of the loop: their loads are in flight together.
_UNROLLED = tl.constexpr(4)


class _Call(NamedTuple):
    """What every tile of a launch is told, beside its own place."""

    query: Heads
    key: Heads
    weight: Weight
    value: Heads
    output: Heads
    statistics_ptr: Any
    rules: Rules
    lists: TileLists
    sizes: Sizes
    heads: Any
    size: Any


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
    """The columns of one head of ``problem.columns``, in which a head's rows are columns."""
    return Vector(tensor.ptr + batch * tensor.stride_b + head * tensor.stride_h, tensor.stride_m)


@triton.jit
def weight_of(weight, head):
    """The weight of one head."""
    return Vector(weight.ptr + head * weight.stride_h, weight.stride_a)


@triton.jit
def additive_scores(
    x, x_start, y, y_start, weight, size, ROWS: tl.constexpr, COLS: tl.constexpr, HARDWARE_TANH: tl.constexpr
):
    """``sum_a w_a tanh(x_ra + y_ca)`` in base 2, ``[ROWS, COLS]``: of queries and keys, or of keys and queries."""
    x_ptrs = x.ptr + x_start + tl.arange(0, ROWS)
    y_ptrs = y.ptr + y_start + tl.arange(0, COLS)
    # A product of zeros, for the layout of its result: four threads share a row, where elementwise arithmetic alone
    # would spread it over a warp. That takes a third of the loads, half of the registers and a tenth of the shuffles of
    # a row's maximum (sm_90), and P is where the next product reads it.
    scores = tl.dot(tl.zeros([ROWS, 16], tl.float16), tl.zeros([16, COLS], tl.float16))
    for first in tl.range(0, size, _UNROLLED):
        for offset in tl.static_range(_UNROLLED):
            a = tl.minimum(first + offset, size - 1).to(tl.int64)  # past the last column its weight counts as 0
            w = tl.load(weight.ptr + a * weight.stride).to(tl.float32)
            w = tl.where(first + offset < size, w * LOG2_E, 0.0)
            x_a = tl.load(x_ptrs + a * x.stride).to(tl.float32)
            y_a = tl.load(y_ptrs + a * y.stride).to(tl.float32)
            scores += w * bend(x_a[:, None] + y_a[None, :], HARDWARE_TANH)
    return scores


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, query, key, weight, value, row_start, at, size, sizes, rules, visits, edges, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys that are seen whole or, if PARTIAL, over those seen in part."""
    seqlen_k = sizes.seqlen_k
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
    batch_head, row_tile, call, marks_ptr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M tile of queries of one head against all visible keys; with marks, unless ``marks_ptr`` is None."""
    sizes, rules, size = call.sizes, call.rules, call.size
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    row_start = row_tile * BLOCK_M
    batch = (batch_head // call.heads).to(tl.int64)
    head = (batch_head % call.heads).to(tl.int64)
    at = At(batch, head)
    query, key = columns_of(call.query, batch, head), columns_of(call.key, batch, head)
    weight = weight_of(call.weight, head)
    value = head_of(call.value, batch, head)
    output = head_of(call.output, batch, head)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -INFINITY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, row_tile, tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N))
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
    store_tile(output, row_start, seqlen_q, o, BLOCK_M, BLOCK_DV, VALUE_DIM)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    row = row_start + tl.arange(0, BLOCK_M)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    if marks_ptr is not None:
        tl.store(marks_ptr + rows_of + row, rows_not_finite(o), mask=row < seqlen_q)
    store_statistics(call.statistics_ptr + 2 * rows_of, row, seqlen_q, pivot, inverse_sum)


@triton.jit(do_not_specialize=[*RUN_TIME, "size", "tiles"])
def _additive_fwd_kernel(
    query, key, weight, value, output, statistics_ptr, marks_ptr, rules, tile_lists, lists_per_batch, lists_per_head,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, size, tiles,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, HARDWARE_TANH: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One of ``tiles`` tiles of queries. CAREFUL: those of the program's share that hold a marked row."""
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    call = _Call(query, key, weight, value, output, statistics_ptr, rules, lists, sizes, heads, size)
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    if CAREFUL:
        first, last = tiles_to_look_at(marks_ptr, tiles, seqlen_q, BLOCK_M)
        for tile in tl.range(first, last):
            if is_marked(marks_ptr, tile, seqlen_q, BLOCK_M):
                _attend_rows(
                    tile // tiles_m, tile % tiles_m, call, None,
                    VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, HARDWARE_TANH, CAREFUL,
                )  # fmt: skip
    else:
        # longest first, as in attention.forward
        _attend_rows(
            tl.program_id(0) // tiles_m, tiles_m - 1 - tl.program_id(0) % tiles_m, call, marks_ptr,
            VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, HARDWARE_TANH, CAREFUL,
        )  # fmt: skip


def launch_additive_fwd(
    problem: AdditiveProblem,
    output: Tensor,
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
    marks = empty_marks(problem, output)
    for careful in (False,) if marks is None else (False, True):
        tile = additive_careful_config() if careful else config
        lists = tile_map.of_rows(tile) if tile_map is not None and not careful else None
        tiles = int(triton.cdiv(seqlen_q, tile.block_m)) * batch * heads
        launch(
            _additive_fwd_kernel, (few_programs(tiles, query.device) if careful else tiles,), query,
            *scored, strided(Heads, value), strided(Heads, output), statistics, marks, problem.rules(),
            *list_arguments(lists), *problem.sizes(), size, tiles,
            VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), PRECISION=dot_precision(query.dtype),
            HARDWARE_TANH=hardware_tanh, CAREFUL=careful, **tile.launch_options(),
        )  # fmt: skip
