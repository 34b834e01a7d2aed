"""Which tiles of rows a program works through, and which tiles each tile of rows or of keys visits.

Every partition of a kernel runs this code by itself, and all must come to the same answer: a producer that loads one
tile more or less than the consumers read is a deadlock.

A tile visits at least one other. One that sees nothing, or that nobody sees, meets one all the same, in which the
predicate hides everything. So no partition has a loop that may be empty, and neither the first product nor the rings of
buffers need a condition: an ``if`` around a product in flight would make ptxas serialise them all.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fastattn_kernels.attention.hopper.compat import gluon, shared
from fastattn_kernels.common import visits as _visits

count_visits = shared(_visits.count_visits)
key_edges = shared(_visits.key_edges)
list_of = shared(_visits.list_of)
row_edges = shared(_visits.row_edges)
visited_tile = shared(_visits.visited_tile)


class Schedule(NamedTuple):
    """How a forward's tiles of rows are numbered: tiles of a head, of all heads, and what :func:`row_tile_at` takes."""

    tiles_m: Any
    tiles: Any
    heads_abreast: Any
    absent: Any


class Visits(NamedTuple):
    """What a tile visits: by edges or by its list (one of the two counts), among ``others`` tiles of the other axis."""

    edges: Any
    tiles: Any
    others: Any


@gluon.jit
def opaque(x):
    """``x``, an int32, in a way that hides from the compiler where it comes from. What depends on kernel arguments
    alone is otherwise computed at the kernel's entry, before the partitions have their registers, and spilled there."""
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
    return _row_tile_at(opaque(tile), opaque(schedule.tiles_m), schedule.heads_abreast, schedule.absent)


@gluon.jit
def from_mailbox(box, slot, LAYOUT: gl.constexpr):
    """The number that the producer left in a slot of a ring of single numbers."""
    return gl.max(box.index(slot).load(LAYOUT), 0)


@gluon.jit
def hand_out_tile(counter_ptr, box, box_full, tile, rounds):
    """The producer's next tile of rows, of which the consumers are told. Without a counter, of P programs each takes
    every P-th tile, which all partitions work out by themselves; with one, it takes the next that nobody has taken.

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
def _visits_by(edges, lists, at, own, owns, others):
    """``(visits, in part, whole)`` of the ``own``-th of ``owns`` tiles: what is visited, and how many tiles of each."""
    if lists.ptr is not None:
        tiles = list_of(lists, at, own, owns, others)
        full, partial = count_visits(edges, tiles)
    else:
        tiles = own  # not used: Triton 3.6 cannot return a tuple that holds a None
        full, partial = count_visits(edges, None)
    full, partial = full.to(gl.int32), partial.to(gl.int32)  # a prefix of 64 bits made them wide
    partial = gl.where(full + partial == 0, 1, partial)
    return Visits(edges, tiles, others), partial, full


@gluon.jit
def keys_visited(row_tile, at, sizes, rules, lists, tiles_m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """``(visits, in part, whole)``: the tiles of keys that a tile of rows visits."""
    edges = key_edges(row_tile * BLOCK_M, at, sizes, rules, BLOCK_M, BLOCK_N)
    return _visits_by(edges, lists, at, row_tile, tiles_m, gl.cdiv(sizes.seqlen_k, BLOCK_N))


@gluon.jit
def rows_visited(col_tile, at, sizes, rules, lists, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """``(visits, in part, whole)``: the tiles of rows that a tile of keys visits."""
    edges = row_edges(col_tile * BLOCK_N, at, sizes, rules, BLOCK_M, BLOCK_N)
    return _visits_by(edges, lists, at, col_tile, tiles_n, gl.cdiv(sizes.seqlen_q, BLOCK_M))


@gluon.jit
def tile_of(position, visits, LISTED: gl.constexpr, PARTIAL: gl.constexpr):
    """The tile at ``position`` among those seen whole, or if PARTIAL in part; where there is none in part, any tile."""
    tile = visited_tile(position, visits.edges, visits.tiles if LISTED else None, visits.others, PARTIAL)
    if PARTIAL:
        tile = gl.minimum(gl.maximum(tile, 0), visits.others - 1)
    return tile.to(gl.int32)


@gluon.jit
def any_tile(position, partial, visits, LISTED: gl.constexpr):
    """The tile at ``position`` among all that are visited, those seen in part first."""
    if position < partial:
        tile = tile_of(position, visits, LISTED, True)
    else:
        tile = tile_of(position - partial, visits, LISTED, False)
    return tile
