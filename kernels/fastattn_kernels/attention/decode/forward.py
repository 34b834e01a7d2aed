"""A few queries against all slots of a cache that they see, which several programs divide among them.

A tile's rows are the queries of all heads of a group, query by query, so that keys and values are read once for a head
of keys. The slots that a tile sees are divided evenly among programs, in whole tiles, when the length is known: on the
device. What a program makes of its share is attention by itself, and ``merge`` weighs the shares against each other.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.decode.config import decode_config, splits_for
from fastattn_kernels.attention.decode.merge import launch_merge
from fastattn_kernels.attention.decode.problem import OF_CACHES, CacheProblem, Rotary
from fastattn_kernels.attention.decode.rotary import load_turned
from fastattn_kernels.attention.decode.slots import (
    load_pages,
    load_slots,
    places_of,
    slot_pointers,
    tokens_held,
)
from fastattn_kernels.attention.forward import TINY, attend_tile
from fastattn_kernels.common.arguments import (
    RUN_TIME,
    At,
    Blocks,
    Heads,
    PerBatch,
    PerHead,
    PerKey,
    Rules,
    Sizes,
    strided,
)
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.device import multiprocessors
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import rows_not_finite
from fastattn_kernels.common.masking import INFINITY, LN_2, LOG2_E, in_unit
from fastattn_kernels.common.tiles import weighted_sum

_MOST_SPLITS = 65535  # programs along a grid's second axis: there can be no more


class _Call(NamedTuple):
    """What every program of a launch is told, beside its own place."""

    query: Heads
    key: Heads
    value: Heads
    output: Heads
    lse_ptr: Any
    statistics_ptr: Any
    seqlens: PerBatch
    leftpad: PerBatch | None
    table: PerKey | None
    rotary: Rotary | None
    rules: Rules
    sinks: PerHead | None
    batches: Any
    kv_heads: Any
    group: Any
    seqlen_q: Any
    new: Any
    room: Any
    seen_room: Any
    pages: Any
    positions: Any
    lower: Any
    upper: Any
    scale: Any
    splits: Any
    all_rows: Any


@triton.jit
def _pages_of_tile(tile, end_slot, batch, table, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of a tile's slots; one number where a page holds the tile."""
    slots = tile * BLOCK_N
    if PAGE_SIZE % BLOCK_N != 0:
        slots += tl.arange(0, BLOCK_N)
    return load_pages(slots, slots < end_slot, batch, table, PAGE_SIZE)


@triton.jit
def _attend_slots(
    acc, row_max, row_sum, q, unit, key, value, table, pages, kv_head, rows, at, first_slot, end_slot, sizes, rules,
    first_tile, end_tile, blocks, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles of slots.

    All tiles are masked: on so few rows the predicate costs nothing, while a loop of its own for tiles seen in part
    would begin with an empty pipeline, and wait for memory once more. The block table is read a tile ahead, so that
    nobody waits for an address; left to the compiler's pipeline, it would take half of its stages from the keys.
    """
    next_page = _pages_of_tile(first_tile, end_slot, at.batch, table, PAGE_SIZE, blocks.N)
    for tile in tl.range(first_tile, end_tile):
        page = next_page
        next_page = _pages_of_tile(tile + 1, end_slot, at.batch, table, PAGE_SIZE, blocks.N)
        slots = tile * blocks.N + tl.arange(0, blocks.N)
        belongs = (slots >= first_slot) & (slots < end_slot)
        entry, index, belongs = places_of(slots, page, belongs, at.batch, table, pages, PAGE_SIZE)
        # What holds nothing for these rows counts as lying behind the last key: the one predicate then hides it.
        cols = tl.where(belongs, slots, sizes.seqlen_k)[None, :]
        k = load_slots(slot_pointers(key, entry, kv_head, index), key.stride_d, belongs, blocks.D, blocks.HEAD_DIM)
        qk = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)
        p, acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, qk, unit, rows, cols, at, 0, sizes, rules, None, True
        )
        v = load_slots(
            slot_pointers(value, entry, kv_head, index), value.stride_d, belongs, blocks.DV, blocks.VALUE_DIM
        )
        acc = weighted_sum(p.to(v.dtype), v, acc, blocks.CAREFUL, blocks.PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_share(
    number, split, call, blocks, SHARE_N: tl.constexpr, PAGE_SIZE: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write what one program makes of its share of the slots that a tile of rows sees: output and LSE or, if SPLIT,
    output and statistics for the merge; return whether the output holds NaN or inf.

    Shares are whole tiles of SHARE_N slots, of which each is one tile of the loop or several.
    """
    group, seqlen_q = call.group, call.seqlen_q
    tiles_m = tl.cdiv(seqlen_q * group, blocks.M)
    entry = number // tiles_m
    batch = (entry // call.kv_heads).to(tl.int64)
    kv_head = (entry % call.kv_heads).to(tl.int64)
    first_row = number % tiles_m * blocks.M
    row = first_row + tl.arange(0, blocks.M)
    query_of_row, is_row = row // group, row < seqlen_q * group
    head = kv_head * group + row % group
    rows = query_of_row[:, None]
    first_query = first_row // group
    last_query = tl.minimum((first_row + blocks.M - 1) // group, seqlen_q - 1)

    held = tokens_held(call.seqlens, batch, call.room)
    shift = held + call.new - seqlen_q  # where the queries stand, even if there is no room for them
    at = At(batch, head[:, None], shift)
    lower, upper = None, None
    if call.lower is not None:
        lower = call.lower + shift
    if call.upper is not None:
        upper = call.upper + shift
    # rows behind the last query of the tile see what that one does
    sizes = Sizes(last_query + 1, tl.minimum(held + call.new, call.seen_room), lower, upper, shift)
    # the slots that some row of the tile sees: no other is read, whatever it holds
    first_slot, end_slot = 0, sizes.seqlen_k
    if call.leftpad is not None:
        first_slot = tl.maximum(tl.load(call.leftpad.ptr + batch * call.leftpad.stride_b), 0).to(tl.int32)
    if sizes.lower is not None:
        first_slot = tl.maximum(first_slot, first_query + sizes.lower)
    if sizes.upper is not None:
        end_slot = tl.minimum(end_slot, last_query + sizes.upper + 1)
    begin = first_slot // SHARE_N
    visits = tl.maximum(tl.cdiv(tl.maximum(end_slot, 0), SHARE_N) - begin, 0).to(tl.int64)
    first_tile = (begin + (visits * split // call.splits).to(tl.int32)) * (SHARE_N // blocks.N)
    end_tile = (begin + (visits * (split + 1) // call.splits).to(tl.int32)) * (SHARE_N // blocks.N)

    q_ptrs = slot_pointers(call.query, batch, head, query_of_row)
    if call.rotary is None:
        q = load_slots(q_ptrs, call.query.stride_d, is_row, blocks.D, blocks.HEAD_DIM)
    else:
        q = load_turned(
            q_ptrs, call.query.stride_d, is_row, held + query_of_row, call.rotary, call.positions, blocks.D,
            blocks.HEAD_DIM, ROTARY_DIM, INTERLEAVED,
        ).to(call.query.ptr.dtype.element_ty)  # fmt: skip
    # max(scale * qk) = scale * max(qk) holds for scale > 0: a negative one's sign moves into q, which is exact
    q = tl.where(call.scale < 0, -q, q)
    unit = tl.maximum(in_unit(tl.abs(call.scale), call.rules), TINY)
    acc = tl.zeros([blocks.M, blocks.DV], tl.float32)
    row_max = tl.full([blocks.M], -INFINITY, tl.float32)
    if call.sinks is not None:  # a key that every row has seen before the first: the first program's, and nobody else's
        sinks = call.sinks
        sink_ptrs = sinks.ptr + batch * sinks.stride_b + head * sinks.stride_h
        sink = tl.load(sink_ptrs, mask=is_row, other=0.0).to(tl.float32)
        row_max = tl.where(split == 0, tl.maximum(row_max, sink * LOG2_E), row_max)
    row_sum = tl.where(row_max == -INFINITY, 0.0, 1.0)
    acc, row_max, row_sum = _attend_slots(
        acc, row_max, row_sum, q, unit, call.key, call.value, call.table, call.pages, kv_head, rows, at, first_slot,
        end_slot, sizes, call.rules, first_tile, end_tile, blocks, PAGE_SIZE,
    )  # fmt: skip

    o = acc * tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None]  # a row that sees nothing is zero
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    line = (batch * call.kv_heads * group + head) * seqlen_q + query_of_row
    is_written = is_row
    if SPLIT:
        statistics_ptr = call.statistics_ptr + tl.cast(split, tl.int64) * 2 * call.all_rows
        tl.store(statistics_ptr + line, row_max, mask=is_row)
        tl.store(statistics_ptr + call.all_rows + line, row_sum, mask=is_row)
        is_written = is_row & (row_sum != 0.0)  # the merge does not read a share in which a row sees nothing
    else:
        tl.store(call.lse_ptr + line, (pivot + tl.log2(row_sum)) * LN_2, mask=is_row)
    cols = tl.arange(0, blocks.DV)[None, :]
    o_ptrs = slot_pointers(call.output, split * call.batches + batch, head, query_of_row)
    tl.store(
        o_ptrs + cols.to(tl.int64) * call.output.stride_d,
        o.to(call.output.ptr.dtype.element_ty),
        mask=is_written[:, None] & (cols < blocks.VALUE_DIM),
    )
    return tl.max(rows_not_finite(o), 0) > 0


@triton.jit(do_not_specialize=[*RUN_TIME, *OF_CACHES, "seen_room"])
def _attention_decode_kernel(
    query, key, value, output, lse_ptr, statistics_ptr, seqlens, leftpad, table, rotary, positions, rules, sinks,
    batches, kv_heads, group, seqlen_q, new, room, seen_room, pages, lower, upper, scale, splits, all_rows,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, AGAIN_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One share of the slots that a tile of rows sees. If AGAIN_N is not 0, some rows may see what others do not, and a
    share whose output is not finite is computed again at once, carefully, in tiles of AGAIN_N slots."""
    number, split = tl.program_id(0), tl.program_id(1)
    is_suspect = _attend_share(
        number, split,
        _Call(
            query, key, value, output, lse_ptr, statistics_ptr, seqlens, leftpad, table, rotary, rules, sinks,
            batches, kv_heads, group, seqlen_q, new, room, seen_room, pages, positions, lower, upper, scale, splits,
            all_rows,
        ),
        Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False),
        BLOCK_N, PAGE_SIZE, ROTARY_DIM, INTERLEAVED, SPLIT,
    )  # fmt: skip
    if AGAIN_N > 0:
        if is_suspect:
            _attend_share(
                number, split,
                _Call(
                    query, key, value, output, lse_ptr, statistics_ptr, seqlens, leftpad, table, rotary, rules, sinks,
                    batches, kv_heads, group, seqlen_q, new, room, seen_room, pages, positions, lower, upper, scale,
                    splits, all_rows,
                ),
                Blocks(BLOCK_M, AGAIN_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, True),
                BLOCK_N, PAGE_SIZE, ROTARY_DIM, INTERLEAVED, SPLIT,
            )  # fmt: skip


class Division(NamedTuple):
    """How a problem is divided: the tile, how many tiles of rows there are, and among how many programs their slots."""

    config: Config
    tiles: int
    splits: int


def division_of(problem: CacheProblem, num_splits: int = 0, config: Config | None = None) -> Division:
    """How :func:`launch_attention_decode` divides a problem, given the same words."""
    query, cache, value = problem.query, problem.key_cache, problem.value_cache
    config = config or decode_config(
        query.device, query.dtype, query.shape[3], value.shape[3], problem.rows, problem.load()
    )
    tiles = query.shape[0] * cache.shape[1] * triton.cdiv(problem.rows, config.block_m)
    splits = num_splits or splits_for(tiles, problem.seen_room, multiprocessors(query.device))
    # A share without a tile would be a program, and a part of the workspace, for nothing.
    most = max(1, min(_MOST_SPLITS, triton.cdiv(problem.seen_room, config.block_n)))
    return Division(config, tiles, min(splits, most))


def launch_attention_decode(
    problem: CacheProblem, output: Tensor, lse: Tensor, num_splits: int = 0, config: Config | None = None
) -> None:
    """Write output and LSE of queries over a cache that holds the new keys already (``append.launch_append``).

    Args:
        problem: the call's inputs.
        output: ``[B, H, L, Dv]``, any strides.
        lse: ``[B, H, L]``, contiguous float32.
        num_splits: among how many programs the slots of a tile of rows are divided; 0: :func:`splits_for` says it.
        config: the tile; None: the one that :func:`decode_config` chooses.
    """
    if lse.numel() == 0:
        return
    query, value = problem.query, problem.value_cache
    (batch, heads, length, head_dim), value_dim = query.shape, value.shape[3]
    config, tiles, splits = division_of(problem, num_splits, config)
    part, statistics = output, None
    if splits > 1:
        shape = splits * batch, heads, length
        part = torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
        statistics = torch.empty(splits, 2, *lse.shape, dtype=torch.float32, device=query.device)
    tensors = (strided(Heads, tensor) for tensor in (query, problem.key_cache, value, part))
    launch(
        _attention_decode_kernel, (tiles, splits), query,
        *tensors, lse, statistics, *problem.of_sequences(), *problem.rotary(), problem.rules(),
        strided(PerHead, problem.sinks), batch, problem.key_cache.shape[1], problem.group, length,
        0 if problem.key is None else length, problem.room, problem.seen_room, problem.key_cache.shape[0],
        problem.lower, problem.upper, problem.scale, splits, lse.numel(),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
        PRECISION=dot_precision(query.dtype), **config.launch_options(),
        AGAIN_N=min(config.block_n, 16) if problem.hides_from_some() else 0,
        **problem.constants(), SPLIT=splits > 1,
    )  # fmt: skip
    if statistics is not None:
        launch_merge(part, statistics, output, lse)
