"""Which tiles a loop visits: first those that are seen whole, without any predicate, then those seen in part.

Where lower, upper and prefix alone rule, arithmetic says it (``edges``). Where masks, padding or documents do,
``tile_map`` has written a list for every tile of rows or of keys, and ``tiles`` points to it: the two counts,
then the tiles seen whole from the front and the others from the back.
"""

import triton
import triton.language as tl


@triton.jit
def key_edges(row_start, at, sizes, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys for the tile of rows that starts at ``row_start``: ``(prefix_full, prefix_end, begin, full_begin,
    full_end, end)``. Seen whole: ``0 .. prefix_full`` and ``full_begin .. full_end``; seen in part: ``prefix_full ..
    prefix_end``, ``begin .. full_begin`` and ``full_end .. end``; in ascending order, all others not at all."""
    seqlen_q, seqlen_k, lower, upper, _ = sizes
    mask, _, padding, documents, prefix, _, _, _ = rules
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
        keys = tl.minimum(tl.load(prefix[0] + at[0] * prefix[1]), seqlen_k)
        prefix_full, prefix_end = keys // BLOCK_N, tl.cdiv(keys, BLOCK_N)
        begin = tl.maximum(begin, prefix_end)
    end = tl.maximum(end, begin)
    if mask is not None or padding is not None or documents is not None:
        prefix_full, full_end = 0, begin  # nothing is known to be seen whole
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return prefix_full, prefix_end, begin, full_begin, full_end, end


@triton.jit
def row_edges(col_start, at, sizes, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of rows for the tile of keys that starts at ``col_start``, in the form of :func:`key_edges`."""
    seqlen_q, seqlen_k, lower, upper, _ = sizes
    mask, _, padding, documents, prefix, _, _, _ = rules
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
        keys = tl.load(prefix[0] + at[0] * prefix[1])
        begin = tl.where(col_start < keys, 0, begin)
        full_begin = tl.where(last_col < keys, 0, full_begin)
        end = tl.where(col_start < keys, tl.cdiv(seqlen_q, BLOCK_M), end)
        full_end = tl.where(last_col < keys, end, full_end)
    end = tl.maximum(end, begin)
    if mask is not None or padding is not None or documents is not None:
        full_end = begin
    # a tile that reaches past the last key is seen in part
    full_end = tl.where(col_start + BLOCK_N > seqlen_k, begin, full_end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return 0, 0, begin, full_begin, full_end, end


@triton.jit
def list_of(tile_lists, lists_per_batch, lists_per_head, at, tile, tiles, others):
    """Pointer to the list of one of ``tiles`` of rows (or keys), which holds two counts and then up to ``others``.
    There are as many lists as the masks tell apart: the per... is 0 where they do not."""
    return tile_lists + ((at[0] * lists_per_batch + at[1] * lists_per_head) * tiles + tile) * (2 + others)


@triton.jit
def count_visits(edges, tiles):
    """How many tiles are seen whole, and how many in part."""
    if tiles is not None:
        full = tl.load(tiles)
        partial = tl.load(tiles + 1)
    else:
        prefix_full, prefix_end, begin, full_begin, full_end, end = edges
        full = prefix_full + full_end - full_begin
        partial = prefix_end - prefix_full + full_begin - begin + end - full_end
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
        prefix_full, prefix_end, begin, full_begin, full_end, _ = edges
        if PARTIAL:
            after_prefix = position - (prefix_end - prefix_full)
            after_begin = after_prefix - (full_begin - begin)
            tile = tl.where(after_begin < 0, begin + after_prefix, full_end + after_begin)
            tile = tl.where(after_prefix < 0, prefix_full + position, tile)
        else:
            tile = tl.where(position < prefix_full, position, position - prefix_full + full_begin)
    return tile


@triton.jit
def visited_in_any_way(position, full, edges, tiles, tiles_length):
    """The tile at ``position`` among all that are visited, the ``full`` ones first."""
    if tiles is not None:
        tile = tl.load(tiles + tl.where(position < full, 2 + position, 1 + tiles_length - (position - full)))
    else:
        whole = visited_tile(position, edges, tiles, tiles_length, False)
        in_part = visited_tile(position - full, edges, tiles, tiles_length, True)
        tile = tl.where(position < full, whole, in_part)
    return tile
