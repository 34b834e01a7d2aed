"""A tile of the kernel that owns keys, transposed, ``[keys, rows]``: what its consumers read of shared memory, and P.

Rows come in units of 64, so that S and dP are 32 registers each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.backward_scores import probabilities, score_gradient, seen_by_bits, visible
from fastattn_kernels.attention.hopper.schedule import from_mailbox

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
    bias_ptr, stride_b, stride_h, _, stride_n = row_bias
    offsets = batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + cols.to(gl.int64) * stride_n
    return gl.load(bias_ptr + offsets, mask=cols < seqlen_k, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def transposed_probabilities(
    products, rows, b_tiles, row_bias, mailbox, slot, batch, cols, unit, sizes, rules,
    OWN: gl.constexpr, UNIT: gl.constexpr, SCORES: gl.constexpr, BLOCK_M: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """``(P, P times the slope of the softcap)`` of the UNIT-th 64 rows of a tile."""
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    pivot_rows, _, sum_rows, row_ids = rows
    start_box, head_box, _ = mailbox
    words, _, padding, documents, prefix, _, softcap, _ = rules
    seqlen_q, seqlen_k, _, _, _ = sizes
    if b_tiles is not None:
        tile = b_tiles.index(2 * slot + OWN).reshape([BLOCK_M, KEYS]).slice(UNIT * 64, 64, dim=0)
        bias = tile.permute((1, 0)).load(SCORES).to(gl.float32)
    elif row_bias is not None:
        bias = _bias_of_keys(row_bias, batch, from_mailbox(head_box, slot, COL), cols, seqlen_k)
    else:
        bias: gl.constexpr = None
    if sum_rows is not None:
        inverse_sum = rows_of(sum_rows, slot, UNIT, COL)
    else:
        inverse_sum: gl.constexpr = None
    p, bent = probabilities(products, rows_of(pivot_rows, slot, UNIT, COL), inverse_sum, bias, unit, softcap)
    if PARTIAL:
        row = rows_of(row_ids, slot, UNIT, COL)
        at = (batch.to(gl.int64), batch)
        seen = visible(row, cols[:, None], at, sizes, (None, None, padding, documents, prefix, None, None, None))
        if words is not None:
            own = gl.minimum(cols, seqlen_k - 1)
            start = from_mailbox(start_box, slot, COL) + UNIT * 64
            seen = seen & seen_by_bits(words, batch, from_mailbox(head_box, slot, COL), own, start, SCORES, 64)
        p = gl.where(seen, p, 0.0)
        bent = gl.where(seen, bent, 0.0)
    return p, bent


@gluon.jit
def transposed_score_gradient(bent, dp, rows, slot, UNIT: gl.constexpr, SCORES: gl.constexpr, dtype: gl.constexpr):
    """dS of the UNIT-th 64 rows of a tile, from dP and what :func:`transposed_probabilities` gave."""
    _, delta_rows, _, _ = rows
    return score_gradient(bent, dp, rows_of(delta_rows, slot, UNIT, gl.SliceLayout(0, SCORES)), dtype)


@gluon.jit
def in_fragment_order(dq):
    """A 64 x 64 accumulator as it lies in registers, [8 column blocks][4 warps][8 x 4 lanes][2 rows][2 columns]: four
    consecutive floats a thread, so that stores of 16 bytes meet no bank of shared memory twice."""
    return dq.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([16, 256])
