"""A tile of the kernel that owns keys, transposed, ``[keys, rows]``: what its consumers read of shared memory, and P.

Rows come in units of 64, so that S and dP are 32 registers each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.backward_scores import probabilities, score_gradient, seen_by_bits, visible
from fastattn_kernels.attention.hopper.schedule import from_mailbox
from fastattn_kernels.common.arguments import At, Rules

# Keys of a consumer.
KEYS = gl.constexpr(64)


@gluon.jit
def unit_of(tiles, slot, unit: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The ``unit``-th 64 rows of a tile ``[ROWS, COLS]`` in a ring."""
    tile = tiles.index(slot).reshape([ROWS, COLS])
    if ROWS > 64:
        tile = tile.slice(unit * 64, 64, dim=0)
    if TRANSPOSED:
        tile = tile.permute((1, 0))
    return tile


@gluon.jit
def rows_of(rows, slot, unit: gl.constexpr, LAYOUT: gl.constexpr):
    """A number for each of the ``unit``-th 64 rows of a tile."""
    ROWS: gl.constexpr = rows.type.shape[1]
    row = rows.index(slot)
    if ROWS > 64:
        row = row.slice(unit * 64, 64, dim=0)
    return row.load(LAYOUT)[None, :]


@gluon.jit
def _bias_of_keys(row_bias, batch, head, cols, seqlen_k):
    """A bias that broadcasts over rows, ``[keys, 1]``."""
    of_head = batch.to(gl.int64) * row_bias.stride_b + head.to(gl.int64) * row_bias.stride_h
    offsets = of_head + cols.to(gl.int64) * row_bias.stride_n
    return gl.load(row_bias.ptr + offsets, mask=cols < seqlen_k, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def transposed_probabilities(
    products, rows, b_tiles, row_bias, mailbox, slot, batch, cols, unit, sizes, rules,
    OWN: gl.constexpr, UNIT: gl.constexpr, SCORES: gl.constexpr, BLOCK_M: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """``(P, P times the slope of the softcap)`` of the UNIT-th 64 rows of a tile."""
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    seqlen_k = sizes.seqlen_k
    if b_tiles is not None:
        tile = b_tiles.index(2 * slot + OWN).reshape([BLOCK_M, KEYS]).slice(UNIT * 64, 64, dim=0)
        bias = tile.permute((1, 0)).load(SCORES).to(gl.float32)
    elif row_bias is not None:
        bias = _bias_of_keys(row_bias, batch, from_mailbox(mailbox.head, slot, COL), cols, seqlen_k)
    else:
        bias: gl.constexpr = None
    if rows.inverse_sums is not None:
        inverse_sum = rows_of(rows.inverse_sums, slot, UNIT, COL)
    else:
        inverse_sum: gl.constexpr = None
    pivot = rows_of(rows.pivots, slot, UNIT, COL)
    p, bent = probabilities(products, pivot, inverse_sum, bias, unit, rules.softcap)
    if PARTIAL:
        row = rows_of(rows.ids, slot, UNIT, COL)
        at = At(batch.to(gl.int64), batch)  # of these rules none depends on the head
        by_element = Rules(padding=rules.padding, documents=rules.documents, prefix=rules.prefix)
        seen = visible(row, cols[:, None], at, sizes, by_element)
        if rules.mask is not None:
            own = gl.minimum(cols, seqlen_k - 1)
            start = from_mailbox(mailbox.start, slot, COL) + UNIT * 64
            head = from_mailbox(mailbox.head, slot, COL)
            seen = seen & seen_by_bits(rules.mask, batch, head, own, start, SCORES, 64)
        p = gl.where(seen, p, 0.0)
        bent = gl.where(seen, bent, 0.0)
    return p, bent


@gluon.jit
def transposed_score_gradient(bent, dp, rows, slot, UNIT: gl.constexpr, SCORES: gl.constexpr, dtype: gl.constexpr):
    """dS of the UNIT-th 64 rows of a tile, from dP and what :func:`transposed_probabilities` gave."""
    return score_gradient(bent, dp, rows_of(rows.deltas, slot, UNIT, gl.SliceLayout(0, SCORES)), dtype)


@gluon.jit
def in_fragment_order(dq):
    """A 64 x 64 accumulator as it lies in registers, [8 column blocks][4 warps][8 x 4 lanes][2 rows][2 columns]: four
    consecutive floats a thread, so that stores of 16 bytes meet no bank of shared memory twice."""
    return dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([16, 256])
