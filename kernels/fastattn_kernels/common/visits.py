"""Which tiles a loop visits: first those that are seen whole, without any predicate, then those seen in part.

Where nothing but lower, upper and prefix hides keys, arithmetic says which (:class:`Edges`). Where masks, padding,
documents or a user's function do, ``tile_map`` has written a list for every tile of rows or of keys, and ``tiles``
points to it: two counts, then the tiles seen whole from the front, and the others from the back.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Edges(NamedTuple):
    """Where tiles begin and end that are seen whole or in part, in ascending order.

    Seen whole: ``0 .. prefix_full`` and ``full_begin .. full_end``; seen in part: ``prefix_full .. prefix_end``,
    ``begin .. full_begin`` and ``full_end .. end``; not seen: all others.
    """

    prefix_full: Any
    prefix_end: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def key_edges(row_start, at, sizes, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The edges of the tiles of keys that the tile of rows that starts at ``row_start`` sees."""
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    lower, upper, prefix = sizes.lower, sizes.upper, rules.prefix
    last_row = tl.minimum(row_start + BLOCK_M, seqlen_q) - 1
    prefix_full, prefix_end, begin, full_begin = 0, 0, 0, 0
    full_end, end = seqlen_k // BLOCK_N, tl.cdiv(seqlen_k, BLOCK_N)
    if upper is not None:
        full_end = tl.minimum(full_end, tl.maximum(row_start + upper + 1, 0) // BLOCK_N)
        end = tl.minimum(end, tl.cdiv(tl.maximum(last_row + upper + 1, 0), BLOCK_N))
    if lower is not None:
        begin = tl.maximum(row_start + lower, 0) // BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_row + lower, 0), BLOCK_N)
    if prefix is not None:
        keys = tl.minimum(tl.load(prefix.ptr + at.batch * prefix.stride_b), seqlen_k)
        prefix_full, prefix_end = keys // BLOCK_N, tl.cdiv(keys, BLOCK_N)
        begin = tl.maximum(begin, prefix_end)
    end = tl.maximum(end, begin)
    if (
        rules.mask is not None or rules.padding is not None or rules.documents is not None or rules.mask_mod is not None
    ):  # fmt: skip
        prefix_full, full_end = 0, begin  # arithmetic knows of no tile that it is seen whole
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return Edges(prefix_full, prefix_end, begin, full_begin, full_end, end)


@triton.jit
def row_edges(col_start, at, sizes, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The edges of the tiles of rows that see the tile of keys that starts at ``col_start``."""
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    lower, upper, prefix = sizes.lower, sizes.upper, rules.prefix
    last_col = tl.minimum(col_start + BLOCK_N, seqlen_k) - 1
    begin, full_begin = 0, 0
    end = tl.cdiv(seqlen_q, BLOCK_M)
    full_end = end
    if upper is not None:
        begin = tl.maximum(col_start - upper, 0) // BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last_col - upper, 0), BLOCK_M)
    if lower is not None:
        end = tl.minimum(end, tl.cdiv(tl.maximum(last_col - lower + 1, 0), BLOCK_M))
        # the last tile of rows is whole where the last row is
        seeing = tl.maximum(col_start - lower + 1, 0)
        full_end = tl.where(seeing < seqlen_q, seeing // BLOCK_M, full_end)
    if prefix is not None:
        keys = tl.load(prefix.ptr + at.batch * prefix.stride_b)
        begin = tl.where(col_start < keys, 0, begin)
        full_begin = tl.where(last_col < keys, 0, full_begin)
        end = tl.where(col_start < keys, tl.cdiv(seqlen_q, BLOCK_M), end)
        full_end = tl.where(last_col < keys, end, full_end)
    end = tl.maximum(end, begin)
    if (
        rules.mask is not None or rules.padding is not None or rules.documents is not None or rules.mask_mod is not None
    ):  # fmt: skip
        full_end = begin
    # a tile that reaches past the last key is seen in part
    full_end = tl.where(col_start + BLOCK_N > seqlen_k, begin, full_end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return Edges(0, 0, begin, full_begin, full_end, end)


@triton.jit
def list_of(lists, at, tile, tiles, others):
    """Pointer to the list of one of ``tiles`` of rows (or keys), which holds two counts and then up to ``others``."""
    return lists.ptr + ((at.batch * lists.per_batch + at.head * lists.per_head) * tiles + tile) * (2 + others)


@triton.jit
def is_visited(tile, edges):
    """Whether a tile may be seen at all, as far as arithmetic knows."""
    return (tile < edges.prefix_end) | ((tile >= edges.begin) & (tile < edges.end))


@triton.jit
def count_visits(edges, tiles):
    """How many tiles are seen whole, and how many in part."""
    if tiles is not None:
        full = tl.load(tiles)
        partial = tl.load(tiles + 1)
    else:
        full = edges.prefix_full + edges.full_end - edges.full_begin
        in_prefix = edges.prefix_end - edges.prefix_full
        partial = in_prefix + edges.full_begin - edges.begin + edges.end - edges.full_end
    return full, partial


@triton.jit
def visited_tile(position, edges, tiles, tiles_length, PARTIAL: tl.constexpr):
    """The tile at ``position`` among those seen whole, or among the others if PARTIAL."""
    if tiles is not None:
        if PARTIAL:
            tile = tl.load(tiles + 1 + tiles_length - position)
        else:
            tile = tl.load(tiles + 2 + position)
    else:
        if PARTIAL:
            after_prefix = position - (edges.prefix_end - edges.prefix_full)
            after_begin = after_prefix - (edges.full_begin - edges.begin)
            tile = tl.where(after_begin < 0, edges.begin + after_prefix, edges.full_end + after_begin)
            tile = tl.where(after_prefix < 0, edges.prefix_full + position, tile)
        else:
            after_prefix = position - edges.prefix_full
            tile = tl.where(position < edges.prefix_full, position, after_prefix + edges.full_begin)
    return tile


@triton.jit
def visited_whole_or_in_part(position, full, edges, tiles, tiles_length):
    """The tile at ``position`` among all that are visited, the ``full`` ones first."""
    if tiles is not None:
        tile = tl.load(tiles + tl.where(position < full, 2 + position, 1 + tiles_length - (position - full)))
    else:
        whole = visited_tile(position, edges, tiles, tiles_length, False)
        in_part = visited_tile(position - full, edges, tiles, tiles_length, True)
        tile = tl.where(position < full, whole, in_part)
    return tile
