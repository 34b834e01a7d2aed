"""Who does what: the tiles of rows that a program works through, and the tiles of keys that each of them visits.

Every partition of a kernel runs this code by itself, and all must come to the same answer: a producer that loads one
tile more or less than the consumers read is a deadlock.
"""

from triton.experimental.gluon import language as gl

from fastattn_kernels import _visits
from fastattn_kernels.hopper._compat import gluon, shared

count_visits = shared(_visits.count_visits)
key_edges = shared(_visits.key_edges)
list_of = shared(_visits.list_of)
visited_tile = shared(_visits.visited_tile)


@gluon.jit
def opaque(x):
    """``x``, an int32 that the compiler knows nothing of. It would compute what depends on kernel arguments alone at
    the kernel's entry, before the partitions have their registers, and spill it there."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def row_tile_of(tile, schedule):
    """``(tile of rows, head of all batch entries')`` of a number that counts tiles of rows over all heads.

    ``heads_abreast`` heads advance together, so many that their keys and values fit in the L2 cache; and the last rows,
    which see the most keys under a diagonal, come first, so that the tiles given out last are short.
    """
    tiles_m, _, batch_heads, heads_abreast, section_tiles = schedule
    tile = opaque(tile)
    section = tile // section_tiles
    inside = tile - section * section_tiles
    abreast = gl.minimum(heads_abreast, batch_heads - section * heads_abreast)
    from_the_end = inside // abreast
    return opaque(tiles_m) - 1 - from_the_end, section * heads_abreast + (inside - from_the_end * abreast)


@gluon.jit
def visits_of(row_tile, at, sizes, rules, lists, tiles_m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Which tiles of keys a tile of rows visits, as ``(visits, partial, all)``: those seen in part come first here.

    At least one: rows that see nothing visit one tile of keys all the same, in which the predicate hides everything, so
    that no partition has a loop that may be empty.
    """
    tile_lists, lists_per_batch, lists_per_head = lists
    tiles_n = gl.cdiv(sizes[1], BLOCK_N)
    edges = key_edges(row_tile * BLOCK_M, at, sizes, rules, BLOCK_M, BLOCK_N)
    if tile_lists is not None:
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, at, row_tile, tiles_m, tiles_n)
        full, partial = count_visits(edges, tiles)
    else:
        tiles = 0  # 3.6 returns no tuple that holds a None
        full, partial = count_visits(edges, None)
    full, partial = full.to(gl.int32), partial.to(gl.int32)  # a prefix of 64 bits made them wide
    partial = gl.where(full + partial == 0, 1, partial)
    return (edges, tiles, tiles_n), partial, full + partial


@gluon.jit
def partial_tile(position, visits, LISTED: gl.constexpr):
    """The tile of keys at ``position`` among those seen in part; where there is none, any that exists."""
    edges, tiles, tiles_n = visits
    tile = visited_tile(position, edges, tiles if LISTED else None, tiles_n, True)
    return gl.minimum(gl.maximum(tile, 0), tiles_n - 1).to(gl.int32)


@gluon.jit
def full_tile(position, visits, LISTED: gl.constexpr):
    """The tile of keys at ``position`` among those seen whole."""
    edges, tiles, tiles_n = visits
    return visited_tile(position, edges, tiles if LISTED else None, tiles_n, False).to(gl.int32)


@gluon.jit
def any_tile(position, partial, visits, LISTED: gl.constexpr):
    """The tile of keys at ``position`` among all that are visited, those seen in part first."""
    if position < partial:
        tile = partial_tile(position, visits, LISTED)
    else:
        tile = full_tile(position - partial, visits, LISTED)
    return tile


@gluon.jit
def ring(count, STAGES: gl.constexpr):
    """``(slot, parity)`` of the ``count``-th use of a ring of buffers."""
    return count % STAGES, (count // STAGES) & 1
