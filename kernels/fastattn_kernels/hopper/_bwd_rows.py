"""What the backward reads of every row, and dQ as the one-pass form leaves it: two small kernels of plain Triton."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels._device import device_guard
from fastattn_kernels._masking import INFINITY
from fastattn_kernels._tiles import head_of, load_statistics
from fastattn_kernels.attention_problem import strided

# Rows of a head are padded to whole tiles of any height, which also aligns every head for TMA.
PADDED_TO = 128


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

    Copied, because TMA reads from multiples of 16 bytes alone, which rows of any length do not keep to.
    """
    batch, heads, seqlen_q = delta.shape
    padded = int(triton.cdiv(seqlen_q, PADDED_TO)) * PADDED_TO
    numbers = delta.new_empty(3 if has_bias else 2, batch, heads, padded)
    with device_guard(delta):
        _row_numbers_kernel[(batch * heads * padded // PADDED_TO,)](
            numbers, statistics, delta, seqlen_q, padded, batch * heads * padded, HAS_BIAS=has_bias, BLOCK=PADDED_TO
        )
    return numbers


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _finish_dq_kernel(
    pieces_ptr, d_query, scale, heads, seqlen_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One 64 x 64 piece of dQ, from the order in which an accumulator lies in registers; scaled and rounded."""
    piece = tl.program_id(0).to(tl.int64)
    own = (piece % 2).to(tl.int32)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = piece // 2 // tiles
    start = (piece // 2 % tiles).to(tl.int32) * BLOCK_M
    dq = tl.load(pieces_ptr + piece * 4096 + tl.arange(0, 4096))
    # [column block, warp, row, column pair, row half, column], whose rows are (warp, row half, row)
    dq = dq.reshape(8, 4, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(64, 64) * scale
    ptr, stride_m, stride_d = head_of(d_query, batch_head // heads, batch_head % heads)
    if BLOCK_D == 128:
        row = start + tl.arange(0, 64)
        col = own * 64 + tl.arange(0, 64)
    else:
        row = start + own * 64 + tl.arange(0, 64)
        col = tl.arange(0, 64)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_d
    tl.store(ptrs, dq.to(ptr.dtype.element_ty), mask=(row < seqlen_q)[:, None] & (col < HEAD_DIM)[None, :])


def empty_dq_pieces(delta: Tensor, block_m: int) -> Tensor:
    """Zeros, float32 ``[rows of pieces, 256]``: two 64 x 64 pieces for every tile of rows, 16 rows each."""
    batch, heads, seqlen_q = delta.shape
    return delta.new_zeros(int(triton.cdiv(seqlen_q, block_m)) * batch * heads * 32, 256)


def finish_dq(pieces: Tensor, d_query: Tensor, scale: float, block_d: int, block_m: int) -> None:
    """Write dQ from its pieces."""
    _, heads, seqlen_q, head_dim = d_query.shape
    with device_guard(d_query):
        _finish_dq_kernel[(pieces.shape[0] // 16,)](
            pieces, strided(d_query), scale, heads, seqlen_q, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m
        )
