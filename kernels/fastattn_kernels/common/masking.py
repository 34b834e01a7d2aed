"""Which queries see which keys, and the scores that this masks: the one predicate of every kernel.

``rows`` are query indices and ``cols`` key indices, shaped to broadcast: ``[M, 1]`` with ``[1, N]``, or ``[1, M]`` with
``[N, 1]`` in the transposed tiles of the backward. ``at``, ``sizes`` and ``rules`` (:mod:`.arguments`) travel together
through every kernel.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# A finite bias below this would be -inf in base 2. It is set to this instead: -inf would hide the key, and a row whose
# every key has such a bias (finfo.min, as padding is often written) would see nothing.
LOWEST_BIAS = tl.constexpr(-3.0e38)


@triton.jit
def pair_pointers(pairs, at, rows, cols):
    """Pointers to a tile of a tensor ``[B, H, L, S]``.

    Offsets are added up before they are added to the pointer: the other way round, dK and dV would spill on gfx942 (4
    registers at head size 128).
    """
    of_head = at.batch * pairs.stride_b + at.head * pairs.stride_h
    return pairs.ptr + (of_head + rows.to(tl.int64) * pairs.stride_m + cols.to(tl.int64) * pairs.stride_n)


@triton.jit
def visible(rows, cols, at, sizes, rules):
    """Boolean tile: which ``rows`` may see which ``cols``.

    Nobody sees past the last key. Rows past the last query, whose results are never stored, see what the last one sees:
    so they need no check of their own, and make no tile that is seen whole one that is seen in part.
    """
    rows = tl.minimum(rows, sizes.seqlen_q - 1)
    inside = cols < sizes.seqlen_k
    seen = inside & (rows >= 0)
    if sizes.upper is not None:
        seen = seen & (cols <= rows + sizes.upper)
    if sizes.lower is not None:
        seen = seen & (cols >= rows + sizes.lower)
    if rules.prefix is not None:
        seen = seen | (inside & (cols < tl.load(rules.prefix.ptr + at.batch * rules.prefix.stride_b)))
    if rules.mask is not None:
        seen = seen & (tl.load(pair_pointers(rules.mask, at, rows, cols), mask=inside, other=0) != 0)
    if rules.padding is not None:
        padding = rules.padding
        ptrs = padding.ptr + at.batch * padding.stride_b + cols.to(tl.int64) * padding.stride_n
        seen = seen & (tl.load(ptrs, mask=inside, other=1) == 0)
    if rules.documents is not None:
        documents = rules.documents
        query_ptrs = documents.query_ptr + at.batch * documents.query_stride_b
        of_rows = tl.load(query_ptrs + rows.to(tl.int64) * documents.query_stride_m)
        key_ptrs = documents.key_ptr + at.batch * documents.key_stride_b
        of_cols = tl.load(key_ptrs + cols.to(tl.int64) * documents.key_stride_n, mask=inside, other=0)
        seen = seen & (of_rows == of_cols)
    return seen


@triton.jit
def distance(rows, cols, shift):
    """How many keys lie between a row's own position and ``cols``, float32."""
    return tl.abs(rows + shift - cols).to(tl.float32)


@triton.jit
def tanh(x):
    """``tanh`` to float32's precision on every target; near 0, where the exponential's form cancels, by a series."""
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
    """Scores with what is added to them, and ``-inf`` where ``rows`` may not see ``cols``: in base 2, or in any unit
    where there is neither a bias nor ALiBi. Only a PARTIAL tile holds such pairs; but a bias may hide some anywhere."""
    if rules.alibi_slopes is not None:
        slopes = rules.alibi_slopes
        slope = tl.load(slopes.ptr + at.batch * slopes.stride_b + at.head * slopes.stride_h).to(tl.float32)
        scores -= slope * LOG2_E * distance(rows, cols, sizes.shift)
    if rules.bias is not None:
        ptrs = pair_pointers(rules.bias, at, tl.minimum(rows, sizes.seqlen_q - 1), cols)
        if PARTIAL:
            b = tl.load(ptrs, mask=cols < sizes.seqlen_k, other=0.0).to(tl.float32)
        else:
            b = tl.load(ptrs).to(tl.float32)
        in_base_2 = tl.where(b < 0.0, tl.maximum(b * LOG2_E, LOWEST_BIAS), b * LOG2_E)  # NaN stays
        scores = tl.where(b == -INFINITY, -INFINITY, scores + in_base_2)  # not a sum: NaN - inf would be NaN
    if PARTIAL:
        scores = tl.where(visible(rows, cols, at, sizes, rules), scores, -INFINITY)
    return scores
