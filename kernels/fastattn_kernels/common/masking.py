"""Who sees whom: THE predicate, and the scores that it masks.

``rows`` are query indices and ``cols`` key indices, shaped to broadcast: ``[M, 1]`` with ``[1, N]``, or ``[1, M]`` with
``[N, 1]`` in the transposed tiles of the backward. Three tuples travel together through every kernel:

- ``at``: (batch, head), 64 bits wide;
- ``sizes``: (seqlen_q, seqlen_k, lower, upper, shift). Row ``i`` sees keys ``i + lower <= j <= i + upper``, and stands
  at key position ``i + shift``;
- ``rules``: (mask, bias, padding, documents, prefix, slopes, softcap, None), each a tuple of a pointer and its strides
  (0 on axes that broadcast; ``problem`` builds it, and says why it ends in None), softcap a number.

What is None is a constant to the compiler: what it would have ruled is not compiled at all.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# A finite bias below this is -inf in base 2; it stays finite, because a row that sees only such keys is not empty.
LOWEST_BIAS = tl.constexpr(-3.0e38)


@triton.jit
def _offsets(strides, at, rows, cols):
    """Element offsets of a tile in a tensor of strides (batch, head, row, key)."""
    stride_b, stride_h, stride_m, stride_n = strides
    return at[0] * stride_b + at[1] * stride_h + rows.to(tl.int64) * stride_m + cols.to(tl.int64) * stride_n


@triton.jit
def visible(rows, cols, at, sizes, rules):
    """Boolean tile: which ``rows`` may see which ``cols``. Nobody sees past the last key; rows past the last query see
    what it sees, so that they, which are never stored, neither spoil a tile nor need checks of their own."""
    seqlen_q, seqlen_k, lower, upper, _ = sizes
    mask, _, padding, documents, prefix, _, _, _ = rules
    rows = tl.minimum(rows, seqlen_q - 1)
    inside = cols < seqlen_k
    seen = inside & (rows >= 0)
    if upper is not None:
        seen = seen & (cols <= rows + upper)
    if lower is not None:
        seen = seen & (cols >= rows + lower)
    if prefix is not None:
        seen = seen | (inside & (cols < tl.load(prefix[0] + at[0] * prefix[1])))
    if mask is not None:
        mask_ptr, strides = mask
        seen = seen & (tl.load(mask_ptr + _offsets(strides, at, rows, cols), mask=inside, other=0) != 0)
    if padding is not None:
        padding_ptr, stride_b, stride_n = padding
        seen = seen & (
            tl.load(padding_ptr + at[0] * stride_b + cols.to(tl.int64) * stride_n, mask=inside, other=1) == 0
        )
    if documents is not None:
        query_ptr, stride_qb, stride_qm, key_ptr, stride_kb, stride_kn = documents
        of_rows = tl.load(query_ptr + at[0] * stride_qb + rows.to(tl.int64) * stride_qm)
        of_cols = tl.load(key_ptr + at[0] * stride_kb + cols.to(tl.int64) * stride_kn, mask=inside, other=0)
        seen = seen & (of_rows == of_cols)
    return seen


@triton.jit
def distance(rows, cols, shift):
    """How many keys lie between a row's own position and ``cols``, float32."""
    return tl.abs(rows + shift - cols).to(tl.float32)


@triton.jit
def tanh(x):
    """``tanh`` to float32's precision on every target: the exponential's form cancels near 0, where a series serves."""
    squared = x * x
    # fitted to (tanh(x) / x - 1) / x^2 on |x| < 0.65: relative error 7e-9 of the whole
    series = -0.00551516 * squared + 0.02046942
    series = series * squared - 0.05368802
    series = series * squared + 0.1333083
    series = series * squared - 0.3333326
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    return tl.where(magnitude < 0.65, x + x * squared * series, tl.where(x < 0.0, -large, large))


@triton.jit
def capped(scores, softcap):
    """Scores in base 2, bent smoothly to stay within the softcap (in natural units)."""
    limit = softcap * LOG2_E
    return limit * tanh(scores / limit)


@triton.jit
def capped_slope(scores, softcap):
    """The derivative of :func:`capped`, from what it returned."""
    t = scores / (softcap * LOG2_E)
    return 1.0 - t * t


@triton.jit
def masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL: tl.constexpr):
    """Scores in base 2 (any unit where there is neither bias nor slopes), with what is added to them, and ``-inf``
    where ``rows`` may not see ``cols``. Only a PARTIAL tile holds such pairs; but a bias may hide some anywhere."""
    seqlen_q, seqlen_k, _, _, shift = sizes
    _, bias, _, _, _, slopes, _, _ = rules
    if slopes is not None:
        slopes_ptr, stride_b, stride_h = slopes
        slope = tl.load(slopes_ptr + at[0] * stride_b + at[1] * stride_h).to(tl.float32)
        scores -= slope * LOG2_E * distance(rows, cols, shift)
    if bias is not None:
        bias_ptr, strides = bias
        ptrs = bias_ptr + _offsets(strides, at, tl.minimum(rows, seqlen_q - 1), cols)
        if PARTIAL:
            b = tl.load(ptrs, mask=cols < seqlen_k, other=0.0).to(tl.float32)
        else:
            b = tl.load(ptrs).to(tl.float32)
        in_base_2 = tl.where(b < 0.0, tl.maximum(b * LOG2_E, LOWEST_BIAS), b * LOG2_E)  # NaN stays
        scores = tl.where(b == -INFINITY, -INFINITY, scores + in_base_2)  # not a sum: NaN - inf would be NaN
    if PARTIAL:
        scores = tl.where(visible(rows, cols, at, sizes, rules), scores, -INFINITY)
    return scores
