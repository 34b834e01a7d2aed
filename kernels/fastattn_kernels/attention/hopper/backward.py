"""Backward on Hopper: dK and dV of a tile of keys, and in the one-pass form dQ too (arXiv:2307.08691, algorithm 2).

A thread block owns 128 keys of one head. Two consumers, a warpgroup each, keep dK and dV of 64 keys in registers and
walk the tiles of rows; one producer warp feeds them Q and dO by TMA. A step, in the order in which a consumer goes:

    S^T  = K Q^T    one step ahead, under what ends the step before
    dP^T = V dO^T   exp2 runs under it
    dV  += P^T dO   the arithmetic of dS runs under it
    dK  += dS^T Q   dS on its way to the other consumer runs under it
    dQ   = dS K     one pass only, over all 128 keys: a consumer makes a 64 x 64 piece of it, so that dQ leaves once

What limits it is shared memory (128 bytes a clock), not the tensor cores: a product m64n64k16 takes all of that when
both operands lie there. Hence P and dS as operands in registers, and one store of dQ for the two consumers.

The order in which products are retired decides whether ptxas keeps them asynchronous. After every edit look for C75xx
(wgmma serialised) in ptxas's output, and for LDL and STL (spills) in the loops.
"""

import torch
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

from fastattn_kernels.attention.backward import launch_careful_bwd
from fastattn_kernels.attention.hopper.backward_dq import launch_attention_dq
from fastattn_kernels.attention.hopper.backward_problem import (
    bias_arguments,
    pieces_descriptor,
    row_descriptor,
    rules_of_keys,
    suits_tma,
    writable_by_tma,
)
from fastattn_kernels.attention.hopper.backward_rows import empty_dq_pieces, finish_dq, row_numbers
from fastattn_kernels.attention.hopper.backward_scores import as_operand
from fastattn_kernels.attention.hopper.backward_transposed import (
    KEYS,
    in_fragment_order,
    transposed_probabilities,
    transposed_score_gradient,
    unit_of,
)
from fastattn_kernels.attention.hopper.compat import shared, tma_load, tma_reduce_add, tma_store, tma_store_wait
from fastattn_kernels.attention.hopper.config import (
    LARGEST_BACKWARD_HEAD,
    BackwardConfig,
    backward_config,
    head_block,
)
from fastattn_kernels.attention.hopper.partitions import (
    Buffers,
    Descriptors,
    GradientDescriptors,
    KeyOwnerBarriers,
    Mailbox,
    Meeting,
    NumberDescriptors,
    QueryGradientBuffers,
    RowNumbers,
)
from fastattn_kernels.attention.hopper.problem import descriptor, head_descriptor
from fastattn_kernels.attention.hopper.problem import refusals as forward_refusals
from fastattn_kernels.attention.hopper.schedule import from_mailbox, ring, rows_visited, tile_of
from fastattn_kernels.common import marks as marking
from fastattn_kernels.common.arguments import RUN_TIME, At, Sizes, TileLists
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import empty_gradient_marks
from fastattn_kernels.common.masking import LN_2, LOG2_E
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap, list_arguments

rows_not_finite = shared(marking.rows_not_finite)

# Keys of a thread block.
BLOCK_N = gl.constexpr(128)


@gluon.jit
def _own_tile(seqlen_k, kv_heads):
    """``(batch, head of keys, tile of keys, at)`` of this program. Every partition works it out by itself, since what a
    partition inherits stays in registers through its loops. Under a diagonal the first keys are seen most: longest
    first."""
    tiles_n = gl.cdiv(seqlen_k, BLOCK_N)
    batch_head = gl.program_id(0) // tiles_n
    batch = batch_head // kv_heads
    kv_head = batch_head - batch * kv_heads
    return batch, kv_head, gl.program_id(0) - batch_head * tiles_n, At(batch.to(gl.int64), kv_head.to(gl.int64))


@gluon.jit
def _producer(
    descriptors, of_rows, buffers, rows, mailbox, full, empty, rules, lists, bias_axes, sizes, heads, group,
    padded_rows, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Feeds the consumers: this block's keys and values once, then tile after tile of queries and dO, first those of
    all heads that see the keys in part, then the others."""
    query, key, value, d_output, bias = descriptors
    q_tiles, do_tiles, k_tiles, v_tiles, b_tiles = buffers
    kv_full, q_full, do_full = full
    STAGES: gl.constexpr = q_tiles.type.shape[0]
    LISTED: gl.constexpr = lists.ptr is not None
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    batch, kv_head, col_tile, at = _own_tile(sizes.seqlen_k, heads // group)
    tiles_m, tiles_n = gl.cdiv(sizes.seqlen_q, BLOCK_M), gl.cdiv(sizes.seqlen_k, BLOCK_N)
    visits, in_part, whole = rows_visited(col_tile, at, sizes, rules, lists, tiles_n, BLOCK_M, BLOCK_N)
    mbarrier.expect(kv_full.index(0), 2 * (key.block_type.nbytes + value.block_type.nbytes))
    for c in gl.static_range(2):
        tma_load(key, [batch, kv_head, col_tile * BLOCK_N + c * KEYS, 0], kv_full.index(0), k_tiles.index(c))
        tma_load(value, [batch, kv_head, col_tile * BLOCK_N + c * KEYS, 0], kv_full.index(0), v_tiles.index(c))
    step = 0
    for phase in gl.static_range(2):
        for member in range(0, group):
            head = kv_head * group + member
            for position in range(0, in_part if phase == 0 else whole):
                tile = tile_of(position, visits, LISTED, phase == 0)
                start = tile * BLOCK_M
                row = (batch * heads + head) * padded_rows + start
                slot, parity = ring(step, STAGES)
                mbarrier.wait(empty.index(slot), parity ^ 1)  # of Q, and so of dO: that is done with before
                # The consumers read these numbers, since working them out would take registers that they do not have.
                # They read them after do_full: by then the producer's threads have met, and all have stored theirs.
                rows.ids.index(slot).store(start + gl.arange(0, BLOCK_M, layout=WARP))
                mailbox.start.index(slot).store(gl.full([1], start, gl.int32, WARP))
                mailbox.head.index(slot).store(gl.full([1], head, gl.int32, WARP))
                piece = ((batch * heads + head) * tiles_m + tile) * 32
                mailbox.piece.index(slot).store(gl.full([1], piece, gl.int32, WARP))
                nbytes: gl.constexpr = query.block_type.nbytes + 4 * BLOCK_M
                if of_rows.inverse_sums is None:
                    mbarrier.expect(q_full.index(slot), nbytes)
                elif bias is None:
                    mbarrier.expect(q_full.index(slot), nbytes + 4 * BLOCK_M)
                else:
                    mbarrier.expect(q_full.index(slot), nbytes + 4 * BLOCK_M + 2 * bias.block_type.nbytes)
                if of_rows.inverse_sums is not None:
                    tma_load(of_rows.inverse_sums, [row], q_full.index(slot), rows.inverse_sums.index(slot))
                if bias is not None:
                    for c in gl.static_range(2):
                        tma_load(
                            bias,
                            [batch * bias_axes.batch, head * bias_axes.head, start, col_tile * BLOCK_N + c * KEYS],
                            q_full.index(slot), b_tiles.index(2 * slot + c),
                        )  # fmt: skip
                tma_load(query, [batch, head, start, 0], q_full.index(slot), q_tiles.index(slot))
                tma_load(of_rows.pivots, [row], q_full.index(slot), rows.pivots.index(slot))
                mbarrier.expect(do_full.index(slot), d_output.block_type.nbytes + 4 * BLOCK_M)
                tma_load(d_output, [batch, head, start, 0], do_full.index(slot), do_tiles.index(slot))
                tma_load(of_rows.deltas, [row], do_full.index(slot), rows.deltas.index(slot))
                step += 1


@gluon.jit
def _next_scores(
    k, q_tiles, q_full, zeros, step, steps, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr
):  # fmt: skip
    """Start S of the step after this one. The last step, which has none, computes its own once more, unused."""
    slot, parity = ring(gl.minimum(step + 1, steps - 1), STAGES)
    mbarrier.wait(q_full.index(slot), parity)
    q = unit_of(q_tiles, slot, 0, BLOCK_M, BLOCK_D, True)
    return warpgroup_mma(k, q, zeros, use_acc=False, is_async=True)


@gluon.jit
def _stage(gradient, tile, BLOCK_D: gl.constexpr):
    """Round a gradient into shared memory."""
    tile.reshape([KEYS, BLOCK_D]).store(gradient.to(tile.dtype))


@gluon.jit
def _consumer(
    OWN: gl.constexpr, gradients, buffers, rows, dq_buffers, mailbox, full, empty, meeting, row_bias, rules, lists,
    sizes, heads, group, scale, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, those of consumer OWN."""
    d_query, d_key, d_value, marks_ptr = gradients
    q_tiles, do_tiles, k_tiles, v_tiles, b_tiles = buffers
    ds_tiles, dq_tiles = dq_buffers
    kv_full, q_full, do_full = full
    ds_full, finished = meeting
    seqlen_k = sizes.seqlen_k
    dtype: gl.constexpr = q_tiles.dtype
    STAGES: gl.constexpr = q_tiles.type.shape[0]
    ONE_PASS: gl.constexpr = d_query is not None
    OTHER: gl.constexpr = 1 - OWN
    UNITS: gl.constexpr = BLOCK_M // 64
    # V as an operand in registers halves what dP reads of shared memory; at head size 128 there are none left
    V_IN_REGISTERS: gl.constexpr = BLOCK_D == 64
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    GRADIENT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADIENT, 2)
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    batch, kv_head, col_tile, at = _own_tile(seqlen_k, heads // group)
    tiles_n = gl.cdiv(seqlen_k, BLOCK_N)
    _, in_part, whole = rows_visited(col_tile, at, sizes, rules, lists, tiles_n, BLOCK_M, BLOCK_N)
    masked_steps = group * in_part
    steps = group * (in_part + whole)
    unit = scale * LOG2_E
    cols = col_tile * BLOCK_N + OWN * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORES))
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, GRADIENT)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, GRADIENT)
    zeros = gl.zeros([KEYS, 64], gl.float32, SCORES)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(q_full.index(0), 0)
    v_own = v_tiles.index(OWN).reshape([KEYS, BLOCK_D])
    if V_IN_REGISTERS:
        v_own = v_own.load(gl.DotOperandLayout(0, SCORES, 2))
    first_q = unit_of(q_tiles, 0, 0, BLOCK_M, BLOCK_D, True)
    s = warpgroup_mma(k_tiles.index(OWN).reshape([KEYS, BLOCK_D]), first_q, zeros, use_acc=False, is_async=True)
    for phase in gl.static_range(2):
        for step in range(0 if phase == 0 else masked_steps, masked_steps if phase == 0 else steps):
            slot, parity = ring(step, STAGES)
            pair = step & 1
            # Always 0, which the compiler cannot know. With a constant it would hoist the descriptors of K's and V's
            # products out of the loop, 48 registers of them, and spill the gradients.
            zero = step >> 30
            k = k_tiles.index(OWN + zero).reshape([KEYS, BLOCK_D])
            v = v_own
            if not V_IN_REGISTERS:
                v = v_tiles.index(OWN + zero).reshape([KEYS, BLOCK_D])
            mbarrier.wait(do_full.index(slot), parity)
            for u in gl.static_range(UNITS):  # 64 rows at a time: S and dP are 32 registers each
                q = unit_of(q_tiles, slot, u, BLOCK_M, BLOCK_D, False)
                do = unit_of(do_tiles, slot, u, BLOCK_M, BLOCK_D, False)
                do_transposed = unit_of(do_tiles, slot, u, BLOCK_M, BLOCK_D, True)
                # not "issue dP, then wait(1)": a product in flight across the back edge must be retired by a full wait,
                # or ptxas serialises every one of the function (C7514)
                products = warpgroup_mma_wait(0, deps=[s])
                dp = warpgroup_mma(v, do_transposed, zeros, use_acc=False, is_async=True)
                p, bent = transposed_probabilities(
                    products, rows, b_tiles, row_bias, mailbox, slot, batch, cols, unit, sizes, rules,
                    OWN, u, SCORES, BLOCK_M, phase == 0,
                )  # fmt: skip
                dv = warpgroup_mma(as_operand(p, dtype, OPERAND), do, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                ds = transposed_score_gradient(bent, dp, rows, slot, u, SCORES, dtype)
                if ONE_PASS:
                    # There are two buffers of dS, used in turn. When the other consumer announces this step's dS, it
                    # has retired its dQ of the step before last, which was the last to read this buffer: no barrier has
                    # to say "empty".
                    own_ds = ds_tiles.index(pair * 2 + OWN)
                    if UNITS > 1:
                        own_ds = own_ds.slice(u * 64, 64, dim=1)
                    own_ds.store(ds)
                if u == UNITS - 1:
                    # dS before the products of both consumers; rows and bias read before TMA writes there again
                    fence_async_shared()
                    if ONE_PASS:
                        mbarrier.arrive(ds_full.index(pair * 2 + OWN), count=1)
                dk = warpgroup_mma(as_operand(ds, dtype, OPERAND), q, dk, is_async=True)
                # Wait for dV here: P's registers must be free before the accumulator of dQ takes some (else C7512).
                dv = warpgroup_mma_wait(1, deps=[dv])
                if u < UNITS - 1:
                    next_q = unit_of(q_tiles, slot, u + 1, BLOCK_M, BLOCK_D, True)
                    s = warpgroup_mma(k, next_q, zeros, use_acc=False, is_async=True)
                    dk = warpgroup_mma_wait(1, deps=[dk])
            if ONE_PASS:
                piece = from_mailbox(mailbox.piece, slot, COL) + OWN * 16
                own_ds = ds_tiles.index(pair * 2 + OWN)
                other_ds = ds_tiles.index(pair * 2 + OTHER)
                own_k = k
                other_k = k_tiles.index(OTHER + zero).reshape([KEYS, BLOCK_D])
                if BLOCK_D == 128:  # this consumer's 64 columns, or its 64 rows of 128
                    own_k = own_k.slice(OWN * 64, 64, dim=1)
                    other_k = other_k.slice(OWN * 64, 64, dim=1)
                else:
                    own_ds = own_ds.slice(OWN * 64, 64, dim=1)
                    other_ds = other_ds.slice(OWN * 64, 64, dim=1)
                dq = warpgroup_mma(own_ds.permute((1, 0)), own_k, zeros, use_acc=False, is_async=True)
                mbarrier.wait(ds_full.index(pair * 2 + OTHER), (step >> 1) & 1)
                dq = warpgroup_mma(other_ds.permute((1, 0)), other_k, dq, is_async=True)
                dk = warpgroup_mma_wait(2, deps=[dk])
                mbarrier.arrive(empty.index(slot), count=1)
                s = _next_scores(k, q_tiles, q_full, zeros, step, steps, STAGES, BLOCK_M, BLOCK_D)
                dq = warpgroup_mma_wait(1, deps=[dq])
                tma_store_wait(0)  # the addition before this one has read its tile
                dq_tiles.index(OWN).store(in_fragment_order(dq))
                fence_async_shared()
                tma_reduce_add(d_query, [piece, 0], dq_tiles.index(OWN))
            else:
                s = _next_scores(k, q_tiles, q_full, zeros, step, steps, STAGES, BLOCK_M, BLOCK_D)
                dk = warpgroup_mma_wait(1, deps=[dk])  # under the next S
                mbarrier.arrive(empty.index(slot), count=1)
    warpgroup_mma_wait(0, deps=[s])
    if ONE_PASS:
        mbarrier.arrive(finished.index(OWN), count=1)  # this consumer has read the other's keys for the last time
        mbarrier.wait(finished.index(OTHER), 0)
    # Keys and values are not needed any more: their gradients are staged in their place. ``unit * LN_2`` is the scale,
    # from the register that the loop has anyway.
    dk = dk * (unit * LN_2)
    _stage(dk, k_tiles.index(OWN), BLOCK_D)
    _stage(dv, v_tiles.index(OWN), BLOCK_D)
    fence_async_shared()
    batch, kv_head, col_tile, _ = _own_tile(seqlen_k, heads // group)
    tma_store(d_key, [batch, kv_head, col_tile * BLOCK_N + OWN * KEYS, 0], k_tiles.index(OWN))
    tma_store(d_value, [batch, kv_head, col_tile * BLOCK_N + OWN * KEYS, 0], v_tiles.index(OWN))
    if marks_ptr is not None:
        col = col_tile * BLOCK_N + OWN * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, GRADIENT))
        marks = rows_not_finite(dk) | rows_not_finite(dv)
        keys_of = (batch * (heads // group) + kv_head).to(gl.int64) * seqlen_k
        gl.store(marks_ptr + keys_of + col, marks.to(gl.int8), mask=col < seqlen_k)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=[*RUN_TIME, "padded_rows"])
def _attention_bwd_kernel(
    query, key, value, d_output, d_query, d_key, d_value, marks_ptr, pivots, deltas, inverse_sums, bias, bias_axes,
    row_bias, rules, tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift,
    scale, padded_rows, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one head, from all rows of its group that see them; and, where there is a ``d_query``,
    what those keys give to dQ. Unless ``marks_ptr`` is None, a key is marked where its dK or dV is not finite."""
    dtype: gl.constexpr = query.dtype
    k_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, KEYS, BLOCK_D], key.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, KEYS, BLOCK_D], value.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], query.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], d_output.layout)
    pivot_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], pivots.layout)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], deltas.layout)
    if inverse_sums is not None:
        sum_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], inverse_sums.layout)
    else:
        sum_rows: gl.constexpr = None
    if bias is not None:
        b_tiles = gl.allocate_shared_memory(bias.dtype, [2 * STAGES, 1, 1, BLOCK_M, KEYS], bias.layout)
    else:
        b_tiles: gl.constexpr = None
    if d_query is not None:
        ds_tiles = gl.allocate_shared_memory(dtype, [4, KEYS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
        dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 16, 256], d_query.layout)
    else:
        ds_tiles: gl.constexpr = None
        dq_tiles: gl.constexpr = None
    row_ids = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    box: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    start_box = gl.allocate_shared_memory(gl.int32, [STAGES, 1], box)
    head_box = gl.allocate_shared_memory(gl.int32, [STAGES, 1], box)
    piece_box = gl.allocate_shared_memory(gl.int32, [STAGES, 1], box)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(ds_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(finished.index(i), count=1)
    descriptors = Descriptors(query, key, value, d_output, bias)
    of_rows = NumberDescriptors(pivots, deltas, inverse_sums)
    gradients = GradientDescriptors(d_query, d_key, d_value, marks_ptr)
    buffers = Buffers(q_tiles, do_tiles, k_tiles, v_tiles, b_tiles)
    rows = RowNumbers(pivot_rows, delta_rows, sum_rows, row_ids)
    dq_buffers = QueryGradientBuffers(ds_tiles, dq_tiles)
    mailbox = Mailbox(start_box, head_box, piece_box)
    full = KeyOwnerBarriers(kv_full, q_full, do_full)
    meeting = Meeting(ds_full, finished)
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    gl.warp_specialize(
        [
            (_consumer, (
                0, gradients, buffers, rows, dq_buffers, mailbox, full, empty, meeting, row_bias, rules, lists, sizes,
                heads, group, scale, BLOCK_M, BLOCK_D,
            )),
            (_consumer, (
                1, gradients, buffers, rows, dq_buffers, mailbox, full, empty, meeting, row_bias, rules, lists, sizes,
                heads, group, scale, BLOCK_M, BLOCK_D,
            )),
            (_producer, (
                descriptors, of_rows, buffers, rows, mailbox, full, empty, rules, lists, bias_axes, sizes, heads, group,
                padded_rows, BLOCK_M,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def refusals(problem: Problem) -> list[str]:
    """Why the Hopper backward does not take a problem; empty if it does."""
    reasons = forward_refusals(problem)
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    if max(head_dim, value_dim) > LARGEST_BACKWARD_HEAD:
        most = LARGEST_BACKWARD_HEAD
        reasons.append(f"head_dim={head_dim}, value_dim={value_dim}: the Hopper backward takes at most {most}")
    if head_dim % 8:
        reasons.append(f"head_dim={head_dim}: TMA would not store gradients of that many elements a row")
    return reasons


def launch_attention_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    config: BackwardConfig | None = None,
    deterministic: bool = True,
) -> None:
    """:func:`fastattn_kernels.attention.backward.launch_attention_bwd`, for problems without ``refusals``; not
    ``deterministic``: in one pass where that fits, which adds up dQ in no fixed order."""
    if delta.numel() == 0:
        return
    config = config or backward_config(problem, deterministic)
    marks = empty_gradient_marks(problem)
    # cloned even if it is contiguous: it may still begin at an odd address
    d_output = d_output if suits_tma(d_output) else d_output.clone(memory_format=torch.contiguous_format)
    with writable_by_tma(gradients.d_query, gradients.d_key, gradients.d_value) as (d_query, d_key, d_value):
        pieces = empty_dq_pieces(delta, config.block_m) if config.one_pass else None
        _launch_dkdv(problem, d_output, statistics, delta, pieces, d_key, d_value, marks.of_keys, tile_map, config)
        if pieces is None:
            launch_attention_dq(problem, d_output, statistics, delta, d_query, marks.of_rows, tile_map, config)
        else:
            block_d = head_block(problem.query.shape[3], problem.value.shape[3])
            finish_dq(pieces, d_query, marks.of_rows, problem.scale, block_d)
    if problem.masks_pairs():
        launch_careful_bwd(problem, d_output, statistics, delta, None, gradients, marks)


def _launch_dkdv(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    pieces: Tensor | None,
    d_key: Tensor,
    d_value: Tensor,
    marks_of_keys: Tensor | None,
    tile_map: TileMap | None,
    config: BackwardConfig,
) -> None:
    """Write dK, dV and the marks of their keys; and add dQ to its pieces unless None."""
    query, key, value = problem.query, problem.key, problem.value
    numbers = row_numbers(statistics, delta, problem.bias is not None)
    pivots, deltas, *sums = (row_descriptor(of_rows, config.block_m) for of_rows in numbers)
    bias, bias_axes, row_bias = bias_arguments(problem)
    tile = Config(config.block_m, BLOCK_N.value, 4, config.stages)
    launch(
        _attention_bwd_kernel, (int(triton.cdiv(key.shape[2], tile.block_n)) * key.shape[0] * key.shape[1],), query,
        head_descriptor(query, tile.block_m, problem), head_descriptor(key, KEYS.value, problem),
        head_descriptor(value, KEYS.value, problem), head_descriptor(d_output, tile.block_m, problem),
        None if pieces is None else pieces_descriptor(pieces),
        head_descriptor(d_key, KEYS.value, problem), head_descriptor(d_value, KEYS.value, problem),
        marks_of_keys, pivots, deltas, sums[0] if sums else None,
        None if bias is None else descriptor(bias, tile.block_m, KEYS.value), bias_axes, row_bias,
        rules_of_keys(problem), *list_arguments(tile_map and tile_map.of_keys(tile)), *problem.sizes(),
        problem.scale, numbers.shape[3], BLOCK_D=head_block(query.shape[3], value.shape[3]),
        BLOCK_M=tile.block_m, STAGES=tile.num_stages, num_warps=4,
    )  # fmt: skip
