"""Who does what: the tiles of rows that a program works through, and the tiles of keys that each of them visits.

Every partition of a kernel runs this code by itself, and all must come to the same answer: a producer that loads one
tile more or less than the consumers read is a deadlock.
"""

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fastattn_kernels.attention.hopper.compat import gluon, shared
from fastattn_kernels.common import visits as _visits

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
def ring(count, STAGES: gl.constexpr):
    """``(slot, parity)`` of the ``count``-th use of a ring of buffers."""
    return count % STAGES, (count // STAGES) & 1


@triton.jit
def row_tile_at(tile, tiles_m, heads_abreast, absent):
    """``(tile of rows, head of all batch entries')`` of a number that counts tiles of rows over all heads.

    ``heads_abreast`` heads advance together, a section, so many that their keys and values fit in the L2 cache. Within
    a section the last rows come first, which see the most keys under a diagonal. Where the heads do not fill all
    sections, it is the first one that lacks the ``absent`` ones: a last section of few heads would keep few programs
    busy for long.
    """
    section = (tile + absent * tiles_m) // (heads_abreast * tiles_m)
    abreast = heads_abreast - tl.where(section == 0, absent, 0)
    first_head = tl.where(section == 0, 0, section * heads_abreast - absent)
    inside = tile - first_head * tiles_m
    from_the_end = inside // abreast
    return tiles_m - 1 - from_the_end, first_head + (inside - from_the_end * abreast)


_row_tile_at = shared(row_tile_at)


@gluon.jit
def row_tile_of(tile, schedule):
    """:func:`row_tile_at` of a kernel's ``schedule``."""
    tiles_m, _, heads_abreast, absent = schedule
    return _row_tile_at(opaque(tile), opaque(tiles_m), heads_abreast, absent)


@gluon.jit
def from_mailbox(box, slot, LAYOUT: gl.constexpr):
    """The number that the producer left there."""
    return gl.max(box.index(slot).load(LAYOUT), 0)


@gluon.jit
def hand_out_tile(counter_ptr, box, box_full, tile, rounds):
    """The producer's next tile of rows, and word of it to the consumers. Without a counter each program takes every so
    many-th one and all partitions know; with one, it takes the first that nobody has.

    A slot of the box is written again two rounds later. By then the producer has waited for the queries' buffer, which
    the consumers give back long after they have read the slot: so there is no barrier that says "empty".
    """
    if counter_ptr is None:
        tile += gl.num_programs(0)
    else:
        slot, _ = ring(rounds, box.type.shape[0])
        tile = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        box.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(box_full.index(slot), count=1)
    return tile


@gluon.jit
def take_tile(counter_ptr, box, box_full, tile, rounds, LAYOUT: gl.constexpr):
    """The tile that :func:`hand_out_tile` handed out in the same round."""
    if counter_ptr is None:
        tile += gl.num_programs(0)
    else:
        slot, parity = ring(rounds, box.type.shape[0])
        mbarrier.wait(box_full.index(slot), parity)
        tile = from_mailbox(box, slot, LAYOUT)
    return tile


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
