"""The ONE rule of who sees whom: as a predicate for a tile, and as ranges of tiles for the loops.

``rows`` are query indices and ``cols`` key indices, shaped to broadcast: ``[M, 1]`` with ``[1, N]``, or ``[1, M]`` with
``[N, 1]`` in the transposed tiles of the backward. ``rules`` is the tuple of all that rules the scores of one batch
entry and head: ``(seqlen_q, seqlen_k, diagonal, mask, bias, padding, batch, head)``, where mask and bias are (pointer,
strides of batch, head, row, key) and padding is (pointer, strides of batch, key). A pointer (or the diagonal) that is
None is a constant to the compiler: what it would have ruled is not compiled at all. Kernels write the tuple out, since
triton 3.6 cannot return one that holds None from a function.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# A finite bias below this is -inf in base 2; it stays finite, because a row that sees only such keys is not empty.
LOWEST_BIAS = tl.constexpr(-3.0e38)


@triton.jit
def _load_2d(ptr, stride_m, stride_n, rows, cols, inside, OTHER: tl.constexpr, BOUND: tl.constexpr):
    """A tile of a mask or bias, read through its own strides (0 where it broadcasts)."""
    ptrs = ptr + rows.to(tl.int64) * stride_m + cols.to(tl.int64) * stride_n
    if BOUND:
        return tl.load(ptrs, mask=inside, other=OTHER)
    return tl.load(ptrs)


@triton.jit
def masked_scores(qk, unit, rows, cols, rules, BOUND: tl.constexpr, CROSSING: tl.constexpr):
    """Scores ``qk * unit + bias`` in base-2 units, ``-inf`` where ``rows`` may not see ``cols``.

    BOUND: the tile may reach past the last key. CROSSING: it may cross the diagonal.
    """
    seqlen_q, seqlen_k, diagonal, mask, bias, padding, batch, head = rules
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n = bias
    padding_ptr, stride_padding_b, stride_padding_n = padding
    inside = cols < seqlen_k
    # Rows past the end are never stored; reading the last row instead of them needs no bounds check.
    mask_rows = tl.minimum(rows, seqlen_q - 1)

    scores = qk * unit
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h
        b = _load_2d(bias_ptr, stride_bias_m, stride_bias_n, mask_rows, cols, inside, 0.0, BOUND).to(tl.float32)
        in_base_2 = tl.where(b < 0.0, tl.maximum(b * LOG2_E, LOWEST_BIAS), b * LOG2_E)  # NaN stays
        scores = tl.where(b == -INFINITY, -INFINITY, scores + in_base_2)  # not a sum: NaN - inf would be NaN
    if BOUND:
        scores = tl.where(inside, scores, -INFINITY)
    if CROSSING:
        if diagonal is not None:
            # rows past the end see nothing: 0 * NaN of a key that they alone would see must not reach its gradient
            scores = tl.where((cols <= rows + diagonal) & (rows < seqlen_q), scores, -INFINITY)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
        m = _load_2d(mask_ptr, stride_mask_m, stride_mask_n, mask_rows, cols, inside, 0, BOUND)
        scores = tl.where(m != 0, scores, -INFINITY)
    if padding_ptr is not None:
        padding_ptr += batch * stride_padding_b
        p = _load_2d(padding_ptr, 0, stride_padding_n, mask_rows * 0, cols, inside, 1, BOUND)
        scores = tl.where(p == 0, scores, -INFINITY)
    return scores


@triton.jit
def key_range(row_start, seqlen_k, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(full_end, end)``: by length and diagonal, keys before ``full_end`` are seen by every row of the tile that
    starts at ``row_start``, keys up to ``end`` by some, later ones by none. ``full_end`` is a multiple of BLOCK_N."""
    end = seqlen_k
    full_end = seqlen_k
    if diagonal is not None:
        end = tl.maximum(tl.minimum(row_start + BLOCK_M + diagonal, seqlen_k), 0)
        full_end = tl.maximum(tl.minimum(row_start + 1 + diagonal, seqlen_k), 0)
    return full_end // BLOCK_N * BLOCK_N, end


@triton.jit
def row_range(col_start, seqlen_q, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(begin, full_begin)``, multiples of BLOCK_M: by the diagonal, no row before ``begin`` sees any key of the tile
    that starts at ``col_start``, and every row from ``full_begin`` on sees all of them. Both at most ``seqlen_q``,
    rounded up."""
    begin = 0
    full_begin = 0
    if diagonal is not None:
        end = tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M
        begin = tl.minimum(tl.maximum(col_start - diagonal, 0) // BLOCK_M * BLOCK_M, end)
        last_col = col_start + BLOCK_N - 1
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last_col - diagonal, 0), BLOCK_M) * BLOCK_M, end)
    return begin, full_begin


@triton.jit
def dropout_keep(rows, cols, batch_head, dropout):
    """Which weights dropout keeps: a counter-based random number (Philox, Salmon et al. 2011) of the position alone,
    so that every kernel draws the same without storing anything."""
    seed, offset, dropout_p = dropout
    zeros = rows * 0 + cols * 0
    # 7 rounds are what the paper finds crush-resistant; 10 is its safety margin
    bits, _, _, _ = tl.philox(seed, zeros + cols, zeros + rows, zeros + batch_head, zeros + offset, n_rounds=7)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def load_dropout(seed_ptr, dropout_p):
    """``(seed, offset, p)``, the seed and offset read from the device: a CUDA graph may change them between replays."""
    return (tl.load(seed_ptr), tl.load(seed_ptr + 1).to(tl.int32), dropout_p)


@triton.jit
def dropout_scale(dropout_p):
    """What kept weights are multiplied by; 0 where all are dropped."""
    return tl.where(dropout_p < 1.0, 1.0 / tl.maximum(1.0 - dropout_p, 1e-30), 0.0)


@triton.jit
def dropout_factor(rows, cols, batch_head, dropout):
    """What dropout multiplies each weight by: 0 or :func:`dropout_scale`."""
    return tl.where(dropout_keep(rows, cols, batch_head, dropout), dropout_scale(dropout[2]), 0.0)
