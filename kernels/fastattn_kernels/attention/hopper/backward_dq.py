"""The dQ pass of the deterministic pair on Hopper: 128 rows of one head against all keys that they see.

Two consumers, a warpgroup each, keep dQ of 64 rows in registers; one producer warp feeds them keys and values by TMA:

    dP = dO V^T         exp2 of this step's S runs under it
    dQ += dS K          then the next step's S, in flight across the back edge
    S  = Q K^T

The arithmetic of dS runs under the other consumer's products only, and nothing makes the two take turns.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn_kernels.attention.hopper.backward_problem import bias_arguments, rules_of_rows
from fastattn_kernels.attention.hopper.backward_scores import (
    as_operand,
    probabilities,
    score_gradient,
    seen_by_bits,
    visible,
)
from fastattn_kernels.attention.hopper.compat import shared, tma_load, tma_store, tma_store_wait
from fastattn_kernels.attention.hopper.config import BackwardConfig, head_block
from fastattn_kernels.attention.hopper.partitions import Buffers, Descriptors, RowOwnerBarriers
from fastattn_kernels.attention.hopper.problem import descriptor, head_descriptor
from fastattn_kernels.attention.hopper.schedule import keys_visited, ring, tile_of
from fastattn_kernels.common import marks as marking
from fastattn_kernels.common import tiles
from fastattn_kernels.common.arguments import RUN_TIME, At, Rules, Sizes, TileLists
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import LN_2, LOG2_E
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap, list_arguments

load_statistics = shared(tiles.load_statistics)
rows_not_finite = shared(marking.rows_not_finite)

# Rows of a consumer and of a thread block.
ROWS = gl.constexpr(64)
BLOCK_M = gl.constexpr(128)


@gluon.jit
def _own_tile(seqlen_q, heads):
    """``(batch, head, tile of rows, at)`` of this program, longest first: under a diagonal the last rows see most."""
    tiles_m = gl.cdiv(seqlen_q, BLOCK_M)
    batch_head = gl.program_id(0) // tiles_m
    batch = batch_head // heads
    head = batch_head - batch * heads
    row_tile = tiles_m - 1 - (gl.program_id(0) - batch_head * tiles_m)
    return batch, head, row_tile, At(batch.to(gl.int64), head.to(gl.int64))


@gluon.jit
def _producer(
    descriptors, buffers, tile_box, full, empty, rules, lists, bias_axes, sizes, heads, group, BLOCK_N: gl.constexpr
):
    """Feeds the consumers: their rows of Q and dO once, then tile after tile of keys and values."""
    query, key, value, d_output, bias = descriptors
    q_tiles, do_tiles, k_tiles, v_tiles, b_tiles = buffers
    q_full, k_full, v_full = full
    STAGES: gl.constexpr = k_tiles.type.shape[0]
    LISTED: gl.constexpr = lists.ptr is not None
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    batch, head, row_tile, at = _own_tile(sizes.seqlen_q, heads)
    row_start = row_tile * BLOCK_M
    tiles_m = gl.cdiv(sizes.seqlen_q, BLOCK_M)
    visits, in_part, whole = keys_visited(row_tile, at, sizes, rules, lists, tiles_m, BLOCK_M, BLOCK_N)
    for c in gl.static_range(2):
        mbarrier.expect(q_full.index(c), query.block_type.nbytes + d_output.block_type.nbytes)
        tma_load(query, [batch, head, row_start + c * ROWS, 0], q_full.index(c), q_tiles.index(c))
        tma_load(d_output, [batch, head, row_start + c * ROWS, 0], q_full.index(c), do_tiles.index(c))
    step = 0
    for phase in gl.static_range(2):
        for position in range(0, in_part if phase == 0 else whole):
            tile = tile_of(position, visits, LISTED, phase == 0)
            start = tile * BLOCK_N
            slot, parity = ring(step, STAGES)
            mbarrier.wait(empty.index(slot), parity ^ 1)  # of K, and so of V: that is done with before
            tile_box.index(slot).store(gl.full([1], tile, gl.int32, WARP))
            if bias is None:
                mbarrier.expect(k_full.index(slot), key.block_type.nbytes)
            else:
                mbarrier.expect(k_full.index(slot), key.block_type.nbytes + 2 * bias.block_type.nbytes)
                for c in gl.static_range(2):
                    tma_load(
                        bias, [batch * bias_axes.batch, head * bias_axes.head, row_start + c * ROWS, start],
                        k_full.index(slot), b_tiles.index(2 * slot + c),
                    )  # fmt: skip
            tma_load(key, [batch, head // group, start, 0], k_full.index(slot), k_tiles.index(slot))
            mbarrier.expect(v_full.index(slot), value.block_type.nbytes)
            tma_load(value, [batch, head // group, start, 0], v_full.index(slot), v_tiles.index(slot))
            step += 1


@gluon.jit
def _bias_of_keys(row_bias, at, start, seqlen_k, BLOCK_N: gl.constexpr):
    """A bias that broadcasts over rows, for BLOCK_N keys: one load a thread, where the accumulator's layout would make
    every thread load those of its 32 columns."""
    cols = start + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    of_head = at.batch * row_bias.stride_b + at.head * row_bias.stride_h
    offsets = of_head + cols.to(gl.int64) * row_bias.stride_n
    return gl.load(row_bias.ptr + offsets, mask=cols < seqlen_k, other=0.0).to(gl.float32)


@gluon.jit
def _row_numbers(statistics_ptr, delta_ptr, at, heads, rows, seqlen_q):
    """``(pivot, inverse sum, delta)``, ``[rows, 1]``."""
    rows_of = (at.batch * heads + at.head) * seqlen_q
    pivot, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, rows, seqlen_q)
    delta = gl.load(delta_ptr + rows_of + rows, mask=rows < seqlen_q, other=0.0)
    return pivot[:, None], inverse_sum[:, None], delta[:, None]


@gluon.jit
def _next_scores(
    q, k_tiles, k_full, zeros, step, steps, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr
):
    """Start S of the step after this one. The last step, which has none, computes its own once more, unused."""
    slot, parity = ring(gl.minimum(step + 1, steps - 1), STAGES)
    mbarrier.wait(k_full.index(slot), parity)
    k = k_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _consumer(
    OWN: gl.constexpr, d_query, marks_ptr, statistics_ptr, delta_ptr, buffers, tile_box, full, empty, row_bias, rules,
    lists, sizes, heads, scale, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows, those of consumer OWN."""
    q_tiles, do_tiles, k_tiles, v_tiles, b_tiles = buffers
    q_full, k_full, v_full = full
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    dtype: gl.constexpr = q_tiles.dtype
    STAGES: gl.constexpr = k_tiles.type.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    GRADIENT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADIENT, 2)
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    by_element = Rules(documents=rules.documents, prefix=rules.prefix)  # the packed bits say the rest
    batch, head, row_tile, at = _own_tile(seqlen_q, heads)
    tiles_m = gl.cdiv(seqlen_q, BLOCK_M)
    _, in_part, whole = keys_visited(row_tile, at, sizes, rules, lists, tiles_m, BLOCK_M, BLOCK_N)
    steps = in_part + whole
    rows = row_tile * BLOCK_M + OWN * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    pivot, inverse_sum, delta = _row_numbers(statistics_ptr, delta_ptr, at, heads, rows, seqlen_q)
    if b_tiles is None and row_bias is None:
        pivot -= gl.log2(inverse_sum)  # the LSE, see probabilities; +inf where a row sees nothing
    unit = scale * LOG2_E
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, GRADIENT)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(q_full.index(OWN), 0)
    mbarrier.wait(k_full.index(0), 0)
    first_k = k_tiles.index(0).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    s = warpgroup_mma(q_tiles.index(OWN).reshape([ROWS, BLOCK_D]), first_k, zeros, use_acc=False, is_async=True)
    for phase in gl.static_range(2):
        for step in range(0 if phase == 0 else in_part, in_part if phase == 0 else steps):
            zero = step >> 30  # always 0, which the compiler cannot know: as in ``backward``
            q = q_tiles.index(OWN + zero).reshape([ROWS, BLOCK_D])
            do = do_tiles.index(OWN + zero).reshape([ROWS, BLOCK_D])
            slot, parity = ring(step, STAGES)
            k = k_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
            mbarrier.wait(v_full.index(slot), parity)
            products = warpgroup_mma_wait(0, deps=[s])
            v = v_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
            dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if b_tiles is not None:
                b = b_tiles.index(2 * slot + OWN).reshape([ROWS, BLOCK_N]).load(SCORES).to(gl.float32)
            elif row_bias is not None:
                start = gl.max(tile_box.index(slot).load(COL), 0) * BLOCK_N
                b = gl.convert_layout(_bias_of_keys(row_bias, at, start, seqlen_k, BLOCK_N), COL)[None, :]
            else:
                b: gl.constexpr = None
            p, bent = probabilities(products, pivot, inverse_sum, b, unit, rules.softcap)
            if phase == 0:
                start = gl.max(tile_box.index(slot).load(COL), 0) * BLOCK_N
                cols = start + gl.arange(0, BLOCK_N, layout=COL)
                seen = visible(rows[:, None], cols[None, :], at, sizes, by_element)
                own = gl.minimum(rows, seqlen_q - 1)
                if rules.mask is not None:
                    seen = seen & seen_by_bits(rules.mask, batch, head, own, start, SCORES, BLOCK_N)
                if rules.padding is not None:
                    seen = seen & seen_by_bits(rules.padding, batch, head, own, start, SCORES, BLOCK_N)
                bent = gl.where(seen, bent, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = as_operand(score_gradient(bent, dp, delta, dtype), dtype, OPERAND)
            # The next S may be issued only when the registers of this one and of its P are no longer needed. Otherwise
            # two accumulators change places on the back edge, and copying one in flight serialises all wgmma (C7514).
            dq = warpgroup_mma(ds, k, dq, is_async=True)
            s = _next_scores(q, k_tiles, k_full, zeros, step, steps, STAGES, BLOCK_N, BLOCK_D)
            dq = warpgroup_mma_wait(1, deps=[dq])
            if b_tiles is not None:
                fence_async_shared()  # the bias has been read before TMA writes there again
            mbarrier.arrive(empty.index(slot), count=1)
    warpgroup_mma_wait(0, deps=[s])
    dq = dq * (unit * LN_2)
    q_tiles.index(OWN).reshape([ROWS, BLOCK_D]).store(dq.to(dtype))
    fence_async_shared()
    batch, head, row_tile, _ = _own_tile(seqlen_q, heads)
    tma_store(d_query, [batch, head, row_tile * BLOCK_M + OWN * ROWS, 0], q_tiles.index(OWN))
    if marks_ptr is not None:
        row = row_tile * BLOCK_M + OWN * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, GRADIENT))
        rows_of = (batch * heads + head).to(gl.int64) * seqlen_q
        gl.store(marks_ptr + rows_of + row, rows_not_finite(dq).to(gl.int8), mask=row < seqlen_q)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def attention_dq_kernel(
    query, key, value, d_output, d_query, marks_ptr, statistics_ptr, delta_ptr, bias, bias_axes, row_bias, rules,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of 128 rows of one head."""
    dtype: gl.constexpr = query.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, BLOCK_D], query.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, BLOCK_D], d_output.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], key.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], value.layout)
    if bias is not None:
        b_tiles = gl.allocate_shared_memory(bias.dtype, [2 * STAGES, 1, 1, ROWS, BLOCK_N], bias.layout)
    else:
        b_tiles: gl.constexpr = None
    tile_box = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    buffers = Buffers(q_tiles, do_tiles, k_tiles, v_tiles, b_tiles)
    full = RowOwnerBarriers(q_full, k_full, v_full)
    descriptors = Descriptors(query, key, value, d_output, bias)
    gl.warp_specialize(
        [
            (_consumer, (
                0, d_query, marks_ptr, statistics_ptr, delta_ptr, buffers, tile_box, full, empty, row_bias, rules,
                lists, sizes, heads, scale, BLOCK_N, BLOCK_D,
            )),
            (_consumer, (
                1, d_query, marks_ptr, statistics_ptr, delta_ptr, buffers, tile_box, full, empty, row_bias, rules,
                lists, sizes, heads, scale, BLOCK_N, BLOCK_D,
            )),
            (_producer, (
                descriptors, buffers, tile_box, full, empty, rules, lists, bias_axes, sizes, heads, group, BLOCK_N,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch_attention_dq(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_query: Tensor,
    marks: Tensor | None,
    tile_map: TileMap | None,
    config: BackwardConfig,
) -> None:
    """Write dQ, and the marks of its rows; ``d_output`` suits TMA."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q = delta.shape
    tile = Config(BLOCK_M.value, config.block_n, 4, config.stages)
    bias, bias_axes, row_bias = bias_arguments(problem)
    launch(
        attention_dq_kernel, (int(triton.cdiv(seqlen_q, tile.block_m)) * batch * heads,), query,
        head_descriptor(query, ROWS.value, problem), head_descriptor(key, tile.block_n, problem),
        head_descriptor(value, tile.block_n, problem), head_descriptor(d_output, ROWS.value, problem),
        head_descriptor(d_query, ROWS.value, problem), marks, statistics, delta,
        None if bias is None else descriptor(bias, ROWS.value, tile.block_n), bias_axes, row_bias,
        rules_of_rows(problem), *list_arguments(tile_map and tile_map.of_rows(tile)), *problem.sizes(),
        problem.scale, BLOCK_D=head_block(query.shape[3], value.shape[3]), BLOCK_N=tile.block_n,
        STAGES=tile.num_stages, num_warps=4,
    )  # fmt: skip
