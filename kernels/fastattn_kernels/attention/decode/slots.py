"""Where the slots of a sequence lie in memory, in a cache in pages and in one without, and how they are read.

Slot ``t`` of a sequence lies in an *entry* of the cache, which is a page or a batch entry, at some index of dimension
2. Rows and keys of a call are all counted by slots, so that bounds, ALiBi and the bias need no translation.
"""

import triton
import triton.language as tl


@triton.jit
def tokens_held(seqlens, batch, room):
    """How many slots of a sequence were in use before the new tokens, inside the room whatever the number is."""
    return tl.minimum(tl.maximum(tl.load(seqlens.ptr + batch * seqlens.stride_b), 0), room).to(tl.int32)


@triton.jit
def load_pages(slots, belongs, batch, table, PAGE_SIZE: tl.constexpr):
    """In which pages slots lie, a tile of them or one; -1 of those that do not belong to it. Without a table: 0."""
    if table is None:
        page = 0
    else:
        ptrs = table.ptr + batch * table.stride_b + (slots // PAGE_SIZE).to(tl.int64) * table.stride_n
        page = tl.load(ptrs, mask=belongs, other=-1)
    return page


@triton.jit
def places_of(slots, page, belongs, batch, table, pages, PAGE_SIZE: tl.constexpr):
    """``(entry, index, belongs)`` of slots ``[N]``, given their pages or the one page of all: where they lie, and which
    of them do, of those that ``belongs`` names. A page that does not exist holds nothing."""
    if table is None:
        entry = batch
        index = slots
    else:
        entry = page.to(tl.int64)
        index = slots % PAGE_SIZE
        belongs = belongs & (page >= 0) & (page < pages)
    return entry, index, belongs


@triton.jit
def slot_pointers(cache, entry, head, index):
    """Pointers ``[N, 1]`` to the first elements of slots of a cache (``arguments.Heads``)."""
    return cache.ptr + (entry * cache.stride_b + head * cache.stride_h + index.to(tl.int64) * cache.stride_m)[:, None]


@triton.jit
def load_slots(ptrs, stride_d, belongs, COLS: tl.constexpr, USED_COLS: tl.constexpr):
    """A tile ``[N, COLS]`` from pointers ``[N, 1]`` on; zero in columns from USED_COLS on, and where nothing belongs
    to it."""
    cols = tl.arange(0, COLS)[None, :]
    ptrs += cols.to(tl.int64) * stride_d
    if USED_COLS < COLS:
        tile = tl.load(ptrs, mask=belongs[:, None] & (cols < USED_COLS), other=0.0)
    else:
        tile = tl.load(ptrs, mask=belongs[:, None], other=0.0)
    return tile
