"""What the backward reads of every row, and dQ as the one-pass form leaves it: two small kernels of plain Triton."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import Heads, strided
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import rows_not_finite
from fastattn_kernels.common.masking import INFINITY
from fastattn_kernels.common.tiles import head_of, load_statistics, store_tile

# Rows of a head are padded to whole tiles of any height, which also aligns every head for TMA.
PADDED_TO = 128
# Elements of a tile of dQ in the one-pass form: two pieces.
_TILE = tl.constexpr(2 * 64 * 64)


@triton.jit(do_not_specialize=["seqlen_q", "padded", "plane"])
def _row_numbers_kernel(
    numbers_ptr, statistics_ptr, delta_ptr, seqlen_q, padded, plane, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The numbers of BLOCK rows of one head; past the last row they are such that P and dS are 0."""
    tiles = padded // BLOCK
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    pivot, inverse_sum = load_statistics(statistics_ptr + 2 * batch_head * seqlen_q, row, seqlen_q)
    delta = tl.load(delta_ptr + batch_head * seqlen_q + row, mask=row < seqlen_q, other=0.0)
    ptrs = numbers_ptr + batch_head * padded + row
    if HAS_BIAS:
        tl.store(ptrs + 2 * plane, inverse_sum)
    else:
        # the LSE, see probabilities; +inf where a row sees nothing
        sees_nothing = inverse_sum == 0.0
        pivot = tl.where(sees_nothing, INFINITY, pivot - tl.log2(tl.where(sees_nothing, 1.0, inverse_sum)))
    tl.store(ptrs, pivot)
    tl.store(ptrs + plane, delta)


def row_numbers(statistics: Tensor, delta: Tensor, has_bias: bool) -> Tensor:
    """float32 ``[2, B, H, L padded]``: LSE in base 2 and delta; with a bias ``[3, ...]``: pivot, delta and inverse sum.

    Copied and padded, because TMA reads only from addresses that are multiples of 16 bytes: unpadded, heads whose
    length is no multiple of four would begin elsewhere.
    """
    batch, heads, seqlen_q = delta.shape
    padded = int(triton.cdiv(seqlen_q, PADDED_TO)) * PADDED_TO
    numbers = delta.new_empty(3 if has_bias else 2, batch, heads, padded)
    launch(
        _row_numbers_kernel,
        (batch * heads * padded // PADDED_TO,),
        delta,
        numbers,
        statistics,
        delta,
        seqlen_q,
        padded,
        batch * heads * padded,
        HAS_BIAS=has_bias,
        BLOCK=PADDED_TO,
    )
    return numbers


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _finish_dq_kernel(
    pieces_ptr, d_query, marks_ptr, scale, heads, seqlen_q, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dQ of a tile of rows, from two 64 x 64 pieces in the order in which an accumulator lies in registers; scaled and
    rounded. Its rows are marked unless ``marks_ptr`` is None."""
    BLOCK_M: tl.constexpr = _TILE // BLOCK_D
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    row_start = tl.program_id(0) % tiles * BLOCK_M
    dq = tl.load(pieces_ptr + tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)) * scale
    # [piece, column block, warp, row, column pair, row half, column], where (warp, row half, row) are a piece's rows
    dq = dq.reshape(2, 8, 4, 8, 4, 2, 2)
    if BLOCK_D == 128:  # side by side
        dq = dq.permute(2, 5, 3, 0, 1, 4, 6)
    else:  # one below the other
        dq = dq.permute(0, 2, 5, 3, 1, 4, 6)
    dq = dq.reshape(BLOCK_M, BLOCK_D)
    store_tile(
        head_of(d_query, batch_head // heads, batch_head % heads), row_start, seqlen_q, dq, BLOCK_M, BLOCK_D, HEAD_DIM
    )
    if marks_ptr is not None:
        row = row_start + tl.arange(0, BLOCK_M)
        tl.store(marks_ptr + batch_head * seqlen_q + row, rows_not_finite(dq), mask=row < seqlen_q)


def empty_dq_pieces(delta: Tensor, block_m: int) -> Tensor:
    """Zeros, float32 ``[rows of pieces, 256]``: two 64 x 64 pieces for every tile of rows, 16 rows each."""
    batch, heads, seqlen_q = delta.shape
    return delta.new_zeros(int(triton.cdiv(seqlen_q, block_m)) * batch * heads * 32, 256)


def finish_dq(pieces: Tensor, d_query: Tensor, marks: Tensor | None, scale: float, block_d: int) -> None:
    """Write dQ from its pieces, and the marks of its rows."""
    _, heads, seqlen_q, head_dim = d_query.shape
    launch(
        _finish_dq_kernel,
        (pieces.numel() // _TILE.value,),
        d_query,
        pieces,
        strided(Heads, d_query),
        marks,
        scale,
        heads,
        seqlen_q,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
    )
