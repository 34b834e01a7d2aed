"""Which tiles a thread block of the backward visits: of rows if it owns keys, of keys if it owns rows.

At least one: a tile that sees nothing, or that nobody sees, meets one other all the same, in which the predicate hides
everything. So the first product and the rings of buffers need no condition; an ``if`` around a product in flight would
make ptxas serialise them all.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.compat import shared
from fastattn_kernels.common import visits as _visits

count_visits = shared(_visits.count_visits)
key_edges = shared(_visits.key_edges)
list_of = shared(_visits.list_of)
row_edges = shared(_visits.row_edges)
visited_tile = shared(_visits.visited_tile)


@gluon.jit
def visits_of(
    own, at, sizes, rules, lists, OWNS_KEYS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """``(visits, in part, whole, all)`` of the ``own`` tile of keys or rows: what :func:`tile_of` wants, and counts."""
    tile_lists, lists_per_batch, lists_per_head = lists
    tiles_m = gl.cdiv(sizes[0], BLOCK_M)
    tiles_n = gl.cdiv(sizes[1], BLOCK_N)
    if OWNS_KEYS:
        edges = row_edges(own * BLOCK_N, at, sizes, rules, BLOCK_M, BLOCK_N)
        owns = tiles_n
        others = tiles_m
    else:
        edges = key_edges(own * BLOCK_M, at, sizes, rules, BLOCK_M, BLOCK_N)
        owns = tiles_m
        others = tiles_n
    if tile_lists is not None:
        tiles = list_of(tile_lists, lists_per_batch, lists_per_head, at, own, owns, others)
        full, partial = count_visits(edges, tiles)
    else:
        tiles = own  # Triton 3.6 returns no None
        full, partial = count_visits(edges, None)
    full = full.to(gl.int32)  # a prefix of 64 bits made them wide
    partial = gl.where(full + partial == 0, 1, partial).to(gl.int32)
    return (edges, tiles, others), partial, full, partial + full


@gluon.jit
def tile_of(position, visits, lists, PARTIAL: gl.constexpr):
    """The tile at ``position`` among those seen in part, or whole; any, where there is none."""
    edges, tiles, others = visits
    if lists[0] is not None:
        tile = visited_tile(position, edges, tiles, others, PARTIAL)
    else:
        tile = visited_tile(position, edges, None, others, PARTIAL)
    return gl.minimum(gl.maximum(tile, 0), others - 1).to(gl.int32)
