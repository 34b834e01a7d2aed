"""New keys and values into the slots of a cache, in place.

This is a launch of its own. Every tile of rows of every head of a group reads the new keys, and programs of one launch
cannot wait for one another, so that the kernel that attends cannot count on what another of its programs has written.
To turn the new keys itself, each of its programs would need, in the loop over tiles, a second source of keys. The
launch moves a few kilobytes, and costs what a launch does: about two microseconds.
"""

import triton
import triton.language as tl

from fastattn_kernels.attention.decode.problem import OF_CACHES, CacheProblem
from fastattn_kernels.attention.decode.rotary import load_turned
from fastattn_kernels.attention.decode.slots import load_pages, load_slots, places_of, slot_pointers, tokens_held
from fastattn_kernels.common.arguments import RUN_TIME, Heads, strided
from fastattn_kernels.common.config import head_block
from fastattn_kernels.common.launch import launch

# Tokens of heads that a program moves: few, so that many programs share what little there is to wait for.
_BLOCK = 8


@triton.jit(do_not_specialize=[*RUN_TIME, *OF_CACHES])
def _append_kernel(
    key, value, key_cache, value_cache, seqlens, table, rotary, positions, kv_heads, new, room, pages, tiles,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PAGE_SIZE: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pairs of a token and a head of one sequence, keys turned and rounded once; what does not fit into the
    room is dropped."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // kv_heads, (row % kv_heads).to(tl.int64)
    slot = tokens_held(seqlens, batch, room) + token
    fits = (token < new) & (slot < room)
    page = load_pages(slot, fits, batch, table, PAGE_SIZE)
    entry, index, fits = places_of(slot, page, fits, batch, table, pages, PAGE_SIZE)
    key_ptrs = slot_pointers(key, batch, head, token)
    if rotary is None:
        k = load_slots(key_ptrs, key.stride_d, fits, BLOCK_D, HEAD_DIM)
    else:
        k = load_turned(
            key_ptrs, key.stride_d, fits, slot, rotary, positions, BLOCK_D, HEAD_DIM, ROTARY_DIM, INTERLEAVED
        )
    v = load_slots(slot_pointers(value, batch, head, token), value.stride_d, fits, BLOCK_DV, VALUE_DIM)
    cols, value_cols = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_ptrs = slot_pointers(key_cache, entry, head, index) + cols.to(tl.int64) * key_cache.stride_d
    v_ptrs = slot_pointers(value_cache, entry, head, index) + value_cols.to(tl.int64) * value_cache.stride_d
    tl.store(k_ptrs, k.to(key_cache.ptr.dtype.element_ty), mask=fits[:, None] & (cols < HEAD_DIM))
    tl.store(v_ptrs, v.to(value_cache.ptr.dtype.element_ty), mask=fits[:, None] & (value_cols < VALUE_DIM))


def launch_append(problem: CacheProblem) -> None:
    """Write the new keys, turned, and values into the caches; nothing where nothing is new."""
    key, value = problem.key, problem.value
    if key is None or value is None:
        return
    batch, kv_heads, length, head_dim = key.shape
    tiles = triton.cdiv(length * kv_heads, _BLOCK)
    if not batch * tiles:
        return
    seqlens, _, table = problem.of_sequences()
    tensors = (strided(Heads, tensor) for tensor in (key, value, problem.key_cache, problem.value_cache))
    launch(
        _append_kernel, (batch * tiles,), key,
        *tensors, seqlens, table, *problem.rotary(), kv_heads, length, problem.room, problem.key_cache.shape[0], tiles,
        HEAD_DIM=head_dim, VALUE_DIM=value.shape[3], BLOCK_D=head_block(head_dim),
        BLOCK_DV=head_block(value.shape[3]), BLOCK_M=_BLOCK, **problem.constants(), num_warps=4,
    )  # fmt: skip
