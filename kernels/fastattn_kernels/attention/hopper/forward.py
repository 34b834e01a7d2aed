"""Forward on Hopper: a warp loads by TMA, two warpgroups compute on wgmma, softmax under the products.

A thread block has three partitions. The producer, one warp, brings tiles of queries, and of keys, values and a bias,
into rings of buffers. Each consumer, a warpgroup, has 64 rows. In step ``j`` it starts the product of queries and keys,
and that of the probabilities of step ``j - 1`` and their values; when the first is done it computes the probabilities
of step ``j``, while the tensor cores still compute the second. Thread blocks are persistent: they take tile after tile
of rows, and the next one's queries and keys arrive while the last one is being finished.

Barriers come in pairs: the phase of a ``full`` one ends with the bytes of a copy, that of an ``empty`` one when the
consumers have read. What is computed is what the plain kernel computes (``attention.forward``): the predicate is the
same, the same code says which tiles of keys are visited, and NaN behind a mask is left to the same careful launch.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn_kernels.attention.forward import TINY, launch_careful_fwd
from fastattn_kernels.attention.hopper.compat import gluon, shared, tma_load, tma_store, tma_store_wait
from fastattn_kernels.attention.hopper.config import (
    CONSUMER_ROWS,
    ForwardConfig,
    forward_config,
    head_block,
    is_of_keys,
)
from fastattn_kernels.attention.hopper.forward_softmax import (
    HALF_LOG2_E,
    load_addends,
    pack,
    probabilities,
    row_results,
    unpack,
)
from fastattn_kernels.attention.hopper.mask_bits import ROWS
from fastattn_kernels.attention.hopper.problem import (
    bias_axes_of,
    bias_for_tma,
    bias_of_keys,
    descriptor,
    head_descriptor,
    packed_rules,
)
from fastattn_kernels.attention.hopper.schedule import (
    Schedule,
    any_tile,
    hand_out_tile,
    keys_visited,
    opaque,
    ring,
    row_tile_of,
    take_tile,
    tile_of,
)
from fastattn_kernels.common import marks as marking
from fastattn_kernels.common.arguments import RUN_TIME, At, PerHead, Sizes, TileLists, strided
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.device import device_guard, multiprocessors
from fastattn_kernels.common.marks import empty_marks
from fastattn_kernels.common.masking import INFINITY, LOG2_E
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap, list_arguments

rows_not_finite = shared(marking.rows_not_finite)

# Registers of a thread. The compiler would give every thread 168, as if the producer were a warpgroup, too.
_CONSUMER_REGISTERS = gl.constexpr(240)
_PRODUCER_REGISTERS = gl.constexpr(24)
# Bytes of keys and values that heads which advance together may have: half of the L2 cache.
_ABREAST_BYTES = 24 * 2**20


class _Descriptors(NamedTuple):
    """What the producer loads; no bias: None."""

    query: Any
    key: Any
    value: Any
    bias: Any


class _Buffers(NamedTuple):
    """Shared memory: the queries of each consumer, and rings of keys, values and tiles of bias (or None)."""

    query: Any
    key: Any
    value: Any
    bias: Any


class _Barriers(NamedTuple):
    """The barriers of queries, keys and values: those that say "full", or those that say "empty"."""

    query: Any
    key: Any
    value: Any


class _Handout(NamedTuple):
    """How tiles are handed out: the counter's pointer, and the ring of numbers that consumers are told, with its
    barriers; all None where each program works out its own tiles."""

    counter_ptr: Any
    box: Any
    box_full: Any


@gluon.jit
def _load_values(v_desc, v_s, v_full, v_empty, batch, kv_head, row, count):
    """Bring a tile of values in, once the consumers have read what was in its buffer."""
    slot, parity = ring(count, v_s.type.shape[0])
    mbarrier.wait(v_empty.index(slot), parity ^ 1)
    mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
    tma_load(v_desc, [batch, kv_head, row, 0], v_full.index(slot), v_s.index(slot))


@gluon.jit
def _producer(
    descriptors, buffers, full, empty, bias_axes, sizes, rules, lists, heads, group, schedule, handout,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Loads what the consumers read, in the order in which they do: K and its bias, then V of the tile before."""
    q_desc, k_desc, v_desc, b_desc = descriptors
    q_s, k_s, v_s, b_s = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    STAGES: gl.constexpr = k_s.type.shape[0]
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    LISTED: gl.constexpr = lists.ptr is not None
    count = 0  # tiles of keys so far, over all tiles of rows
    rounds = 0
    tile = gl.program_id(0)
    while tile < schedule.tiles:
        row_tile, batch_head = row_tile_of(tile, schedule)
        batch = batch_head // heads
        head = batch_head - batch * heads
        kv_head = head // group
        at = At(batch.to(gl.int64), head.to(gl.int64))
        bounds = Sizes(opaque(sizes.seqlen_q), opaque(sizes.seqlen_k), sizes.lower, sizes.upper, sizes.shift)
        visits, in_part, whole = keys_visited(row_tile, at, bounds, rules, lists, schedule.tiles_m, BLOCK_M, BLOCK_N)
        all_visits = in_part + whole
        previous = row_tile * 0
        for position in range(0, all_visits):
            row = any_tile(position, in_part, visits, LISTED) * BLOCK_N
            slot, parity = ring(count, STAGES)
            mbarrier.wait(k_empty.index(slot), parity ^ 1)
            if b_desc is not None:  # on the barrier of K: one wait less for the consumers
                mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes + CONSUMERS * b_desc.block_type.nbytes)
                for consumer in gl.static_range(CONSUMERS):
                    start = row_tile * BLOCK_M + consumer * ROWS
                    coordinates = [batch * bias_axes.batch, head * bias_axes.head, start, row]
                    tma_load(b_desc, coordinates, k_full.index(slot), b_s.index(slot * CONSUMERS + consumer))
            else:
                mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, kv_head, row, 0], k_full.index(slot), k_s.index(slot))
            if position == 0:  # after K: the last tile's queries, or its output in their place, may still be in use
                for consumer in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(consumer), (rounds & 1) ^ 1)
                    mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
                    coordinates = [batch, head, row_tile * BLOCK_M + consumer * ROWS, 0]
                    tma_load(q_desc, coordinates, q_full.index(consumer), q_s.index(consumer))
            else:
                _load_values(v_desc, v_s, v_full, v_empty, batch, kv_head, previous, count - 1)
            previous = row
            count += 1
        _load_values(v_desc, v_s, v_full, v_empty, batch, kv_head, previous, count - 1)
        tile = hand_out_tile(handout.counter_ptr, handout.box, handout.box_full, tile, rounds)
        rounds += 1


@gluon.jit
def _wait_for_turn(turns, count, INDEX: gl.constexpr):
    """Before the products of tile ``count``, wait until the other consumer has started its own. Consumer 0 is first."""
    mbarrier.wait(turns.index(INDEX), (count + INDEX + 1) & 1)


@gluon.jit
def _attend_keys(
    acc, pairs, row_max, row_sum, count, last, begin, end, visits, at, row_start, sizes, rules, factors, q, buffers,
    row_bias, full, empty, turns, INDEX: gl.constexpr, CONSUMERS: gl.constexpr,
    LISTED: gl.constexpr, PING_PONG: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """The tiles of keys from ``begin`` to ``end`` among those seen whole or, if PARTIAL, in part. ``pairs`` are the
    probabilities of tile ``count``, whose values are still to be weighted; ``last`` is the number of the last tile of
    keys of this tile of rows."""
    k_s, v_s, b_s = buffers.key, buffers.value, buffers.bias
    k_full, v_full = full.key, full.value
    k_empty, v_empty = empty.key, empty.value
    STAGES: gl.constexpr = k_s.type.shape[0]
    BLOCK_N: gl.constexpr = k_s.type.shape[3]
    BLOCK_D: gl.constexpr = k_s.type.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    HALVED: gl.constexpr = b_s is not None or row_bias is not None
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    for position in range(begin, end):
        previous, previous_parity = ring(count, STAGES)
        count += 1
        slot, _ = ring(count, STAGES)  # its keys are known to be there
        k = k_s.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        if PING_PONG:
            _wait_for_turn(turns, count, INDEX)
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(previous), previous_parity)
        v = v_s.index(previous).reshape([BLOCK_N, BLOCK_D])
        acc = warpgroup_mma(unpack(pairs, v_s.dtype, OPERAND), v, acc, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turns.index(1 - INDEX), count=1)
        col_start = None
        if PARTIAL:
            col_start = tile_of(position, visits, LISTED, True) * BLOCK_N
        elif row_bias is not None:
            col_start = tile_of(position, visits, LISTED, False) * BLOCK_N
        addends = load_addends(
            col_start, slot, at, row_start, sizes, rules, b_s, row_bias, INDEX, SCORES, CONSUMERS, BLOCK_N, PARTIAL
        )
        scores = warpgroup_mma_wait(1, deps=[scores])
        if b_s is not None:
            fence_async_shared()  # the bias has been read before TMA writes there again
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, row_max, row_sum, correction = probabilities(
            scores, col_start, addends, row_max, row_sum, at, row_start, sizes, rules, factors, v_s.dtype,
            SCORES, HALVED, PARTIAL,
        )  # fmt: skip
        # Wait for the next keys HERE: the wait is a loop, which ends a basic block. Without it ptxas hoists the wait
        # for the second product above the exponentials, which then no longer run under it. Not after the last tile: by
        # then the producer may be two phases ahead, with the next rows' keys, and the parity would never come.
        next_slot, next_parity = ring(count + 1, STAGES)
        mbarrier.wait(k_full.index(next_slot), next_parity, pred=count < last)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(previous), count=1)
        acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUTPUT))[:, None]
        # Packed AFTER that wait: before it, the product would still read the registers that this writes (C7513).
        pairs = pack(p, v_s.dtype)
    return acc, pairs, row_max, row_sum, count


@gluon.jit
def _consumer(
    INDEX: gl.constexpr, out_desc, lse_ptr, statistics_ptr, marks_ptr, buffers, out_s, full, empty, turns, row_bias,
    sinks, sizes, rules, lists, scale, heads, schedule, handout,
    BLOCK_M: gl.constexpr, STAGE_OUTPUT: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows of each tile, from products to the output."""
    q_s, k_s, v_s, b_s = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    STAGES: gl.constexpr = k_s.type.shape[0]
    BLOCK_N: gl.constexpr = k_s.type.shape[3]
    BLOCK_D: gl.constexpr = k_s.type.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    HALVED: gl.constexpr = b_s is not None or row_bias is not None
    LISTED: gl.constexpr = lists.ptr is not None
    seqlen_q = sizes.seqlen_q
    if rules.softcap is not None:  # softcap * tanh(scale / softcap * product)
        factors = (scale / rules.softcap, gl.maximum(rules.softcap * LOG2_E, TINY))
    else:
        factors = (scale, gl.maximum(scale * LOG2_E, TINY))
    q = q_s.index(INDEX).reshape([ROWS, BLOCK_D])
    count = 0  # tiles of keys so far, over all tiles of rows
    rounds = 0
    tile = gl.program_id(0)
    while tile < schedule.tiles:
        row_tile, batch_head = row_tile_of(tile, schedule)
        batch = batch_head // heads
        head = batch_head - batch * heads
        at = At(batch.to(gl.int64), head.to(gl.int64))
        bounds = Sizes(opaque(sizes.seqlen_q), opaque(sizes.seqlen_k), sizes.lower, sizes.upper, sizes.shift)
        visits, in_part, whole = keys_visited(row_tile, at, bounds, rules, lists, schedule.tiles_m, BLOCK_M, BLOCK_N)
        all_visits = in_part + whole
        last = count + all_visits - 1
        row_start = opaque(row_tile * BLOCK_M + INDEX * ROWS)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUTPUT)
        row_max = gl.full([ROWS], -INFINITY, gl.float32, ROW)
        row_sum = gl.zeros([ROWS], gl.float32, ROW)
        if sinks is not None:  # a sink is a key that every row has seen before the first
            sink = gl.load(sinks.ptr + at.batch * sinks.stride_b + at.head * sinks.stride_h).to(gl.float32)
            row_max = gl.maximum(row_max, sink * (HALF_LOG2_E if HALVED else LOG2_E))
            row_sum = gl.where(row_max == -INFINITY, 0.0, 1.0)

        # The first tile of keys may be seen whole or in part: it goes by the predicate, which is right for both.
        slot, parity = ring(count, STAGES)
        mbarrier.wait(q_full.index(INDEX), rounds & 1)
        mbarrier.wait(k_full.index(slot), parity)
        k = k_s.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        if PING_PONG:
            _wait_for_turn(turns, count, INDEX)
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turns.index(1 - INDEX), count=1)
        col_start = any_tile(0, in_part, visits, LISTED) * BLOCK_N
        addends = load_addends(
            col_start, slot, at, row_start, bounds, rules, b_s, row_bias, INDEX, SCORES, CONSUMERS, BLOCK_N, True
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        if b_s is not None:
            fence_async_shared()  # the bias has been read before TMA writes there again
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, row_max, row_sum, _ = probabilities(
            scores, col_start, addends, row_max, row_sum, at, row_start, bounds, rules, factors, v_s.dtype,
            SCORES, HALVED, True,
        )  # fmt: skip
        pairs = pack(p, v_s.dtype)
        slot, parity = ring(count + 1, STAGES)
        mbarrier.wait(k_full.index(slot), parity, pred=count < last)

        acc, pairs, row_max, row_sum, count = _attend_keys(
            acc, pairs, row_max, row_sum, count, last, 1, in_part, visits, at, row_start, bounds, rules, factors, q,
            buffers, row_bias, full, empty, turns, INDEX, CONSUMERS, LISTED, PING_PONG, True,
        )  # fmt: skip
        acc, pairs, row_max, row_sum, count = _attend_keys(
            acc, pairs, row_max, row_sum, count, last, gl.where(in_part > 0, 0, 1), whole, visits, at, row_start,
            bounds, rules, factors, q, buffers, row_bias, full, empty, turns,
            INDEX, CONSUMERS, LISTED, PING_PONG, False,
        )  # fmt: skip

        if STAGE_OUTPUT:  # the last product with the queries is done: the next ones may come in
            mbarrier.arrive(q_empty.index(INDEX), count=1)
        slot, parity = ring(count, STAGES)
        count += 1
        mbarrier.wait(v_full.index(slot), parity)
        v = v_s.index(slot).reshape([BLOCK_N, BLOCK_D])
        acc = warpgroup_mma(unpack(pairs, v_s.dtype, OPERAND), v, acc, is_async=True)
        pivot, inverse_sum, lse = row_results(row_max, row_sum, HALVED)
        rows_of = batch_head.to(gl.int64) * seqlen_q
        row = row_start + gl.arange(0, ROWS, layout=ROW)
        gl.store(lse_ptr + rows_of + row, lse, mask=row < seqlen_q)
        gl.store(statistics_ptr + 2 * rows_of + row, pivot, mask=row < seqlen_q)
        gl.store(statistics_ptr + 2 * rows_of + seqlen_q + row, inverse_sum, mask=row < seqlen_q)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot), count=1)
        # This wait, which comes with a barrier of the warpgroup, stands behind the arrival. Between the product and its
        # wait, the compiler would take that barrier for the one that it needs behind the product, and leave out the one
        # that holds the arrival back until all four warps have waited.
        if STAGE_OUTPUT:
            tma_store_wait(0)  # the last tile's output has left
        acc = acc * gl.convert_layout(inverse_sum, gl.SliceLayout(1, OUTPUT))[:, None]
        if marks_ptr is not None:
            marks = gl.convert_layout(rows_not_finite(acc), ROW)
            gl.store(marks_ptr + rows_of + row, marks.to(gl.int8), mask=row < seqlen_q)
        out_s.index(INDEX).reshape([ROWS, BLOCK_D]).store(acc.to(out_s.dtype))
        fence_async_shared()
        tma_store(out_desc, [batch, head, row_start, 0], out_s.index(INDEX))
        if not STAGE_OUTPUT:  # it lies where the queries did
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(INDEX), count=1)
        tile = take_tile(handout.counter_ptr, handout.box, handout.box_full, tile, rounds, gl.SliceLayout(0, SCORES))
        rounds += 1
    tma_store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, a phase of each of which ends with ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=[*RUN_TIME, "tiles_m", "tiles", "heads_abreast", "absent"])
def _attention_fwd_kernel(
    q_desc, k_desc, v_desc, b_desc, out_desc, lse_ptr, statistics_ptr, marks_ptr, row_bias, bias_axes, rules, sinks,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    tiles_m, tiles, heads_abreast, absent, counter_ptr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    STAGE_OUTPUT: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head against all keys they see, tile after tile, which a counter may hand out."""
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    out_s = q_s
    if STAGE_OUTPUT:
        out_s = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], out_desc.layout)
    if b_desc is not None:
        b_s = gl.allocate_shared_memory(b_desc.dtype, [STAGES * CONSUMERS, 1, 1, ROWS, BLOCK_N], b_desc.layout)
    else:
        b_s: gl.constexpr = None
    q_full = _barriers(CONSUMERS, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    q_empty = _barriers(CONSUMERS, 1)
    k_empty = _barriers(STAGES, CONSUMERS)
    v_empty = _barriers(STAGES, CONSUMERS)
    if PING_PONG:
        turns = _barriers(CONSUMERS, 1)
    else:  # not allocated: the compiler would share the memory of barriers that are not used with other buffers
        turns: gl.constexpr = None
    if counter_ptr is not None:
        box = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        box_full = _barriers(2, 1)
    else:
        box: gl.constexpr = None
        box_full: gl.constexpr = None
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    schedule = Schedule(tiles_m, tiles, heads_abreast, absent)
    buffers = _Buffers(q_s, k_s, v_s, b_s)
    full = _Barriers(q_full, k_full, v_full)
    empty = _Barriers(q_empty, k_empty, v_empty)
    handout = _Handout(counter_ptr, box, box_full)
    # The arguments are spelled out twice: the compiler makes run-time values of the constants in a tuple with a name.
    gl.warp_specialize(
        [
            (_consumer, (
                0, out_desc, lse_ptr, statistics_ptr, marks_ptr, buffers, out_s, full, empty, turns, row_bias, sinks,
                sizes, rules, lists, scale, heads, schedule, handout, BLOCK_M, STAGE_OUTPUT, PING_PONG,
            )),
            (_consumer, (
                1, out_desc, lse_ptr, statistics_ptr, marks_ptr, buffers, out_s, full, empty, turns, row_bias, sinks,
                sizes, rules, lists, scale, heads, schedule, handout, BLOCK_M, STAGE_OUTPUT, PING_PONG,
            )),
            (_producer, (
                _Descriptors(q_desc, k_desc, v_desc, b_desc), buffers, full, empty, bias_axes, sizes, rules, lists,
                heads, group, schedule, handout, BLOCK_M, BLOCK_N,
            )),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_attention_fwd(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    statistics: Tensor,
    tile_map: TileMap | None = None,
    config: ForwardConfig | None = None,
) -> None:
    """:func:`fastattn_kernels.attention.forward.launch_attention_fwd`, for problems without ``refusals``."""
    if lse.numel() == 0:
        return
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, _ = query.shape
    config = config or forward_config(problem)
    tiles_m = int(triton.cdiv(seqlen_q, config.block_m))
    group = heads // key.shape[1]
    bytes_of_keys = key.shape[2] * (key.shape[3] + value.shape[3]) * key.element_size()
    heads_abreast = min(group * max(1, _ABREAST_BYTES // bytes_of_keys), batch * heads)
    tiles = tiles_m * batch * heads
    lists = None
    if tile_map is not None:
        lists = tile_map.of_rows(Config(config.block_m, config.block_n, 4, 1))
    bias = problem.bias
    b_desc, row_bias, bias_axes = None, None, None
    if bias is not None and not is_of_keys(bias):
        bias = bias_for_tma(bias)
        b_desc = descriptor(bias, CONSUMER_ROWS, config.block_n)
        bias_axes = bias_axes_of(bias)
    else:
        row_bias = bias_of_keys(bias)
    marks = empty_marks(problem, output)
    programs, counter = tiles, None
    if config.schedule != "grid":
        programs = min(tiles, multiprocessors(query.device))
    if config.schedule == "dynamic" and tiles > programs:
        counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    with device_guard(query):
        _attention_fwd_kernel[(programs,)](
            head_descriptor(query, CONSUMER_ROWS, problem), head_descriptor(key, config.block_n, problem),
            head_descriptor(value, config.block_n, problem), b_desc, head_descriptor(output, CONSUMER_ROWS, problem),
            lse, statistics, marks, row_bias, bias_axes, packed_rules(problem), strided(PerHead, problem.sinks),
            *list_arguments(lists), *problem.sizes(), problem.scale,
            tiles_m, tiles, heads_abreast, -(batch * heads) % heads_abreast, counter,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=head_block(query.shape[3], value.shape[3]),
            STAGES=config.stages, STAGE_OUTPUT=config.stage_output, PING_PONG=config.ping_pong,
            num_warps=4,
        )  # fmt: skip
    if marks is not None:
        launch_careful_fwd(problem, output, lse, statistics, marks)
