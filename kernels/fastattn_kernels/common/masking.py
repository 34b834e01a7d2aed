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
# A finite bias below this, or a score that a user's function returns, would be -inf in base 2. It is set to this
# instead: -inf would hide the key, and a row whose every key has such a bias (finfo.min, as padding is often written)
# would see nothing.
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
def indices(rows, cols, at, sizes):
    """``(batch, head, query_index, key_index)`` for a user's function: in 32 bits, and instead of those of a tile that
    lie past the ends the last ones, so that what it reads by them is there."""
    rows = tl.minimum(rows, sizes.seqlen_q - 1)
    if at.first_slot is not None:
        rows = tl.minimum(rows + at.first_slot, sizes.seqlen_k - 1)
    cols = tl.minimum(cols, sizes.seqlen_k - 1)
    return at.batch.to(tl.int32), at.head.to(tl.int32), tl.maximum(rows, 0), tl.maximum(cols, 0)


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
    if rules.mask_mod is not None:
        batch, head, query, key = indices(rows, cols, at, sizes)
        allowed = rules.mask_mod.function(batch, head, query, key, rules.mask_mod.captured)
        seen = seen & tl.cast(allowed, tl.int1)
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
def in_unit(natural, rules):
    """A natural number in the unit of the scores in front of ``score_mod``: base 2, or natural where there is one, for
    it gets natural scores."""
    if rules.score_mod is None:
        natural = natural * LOG2_E
    return natural


@triton.jit
def capped(scores, limit):
    """Scores, bent smoothly to stay within the limit."""
    return limit * tanh(scores / limit)


@triton.jit
def capped_slope(scores, limit):
    """The derivative of :func:`capped`, from what it returned."""
    t = scores / limit
    return 1.0 - t * t


@triton.jit
def in_base_2(scores):
    """Natural scores in base 2, finite ones as finite ones; NaN stays. -inf has to be looked after by the caller."""
    return tl.where(scores < 0.0, tl.maximum(scores * LOG2_E, LOWEST_BIAS), scores * LOG2_E)


@triton.jit
def modified_scores(scores, rows, cols, at, sizes, rules):
    """What ``rules.score_mod`` makes of a tile of natural scores, in base 2; -inf hides a pair."""
    batch, head, query, key = indices(rows, cols, at, sizes)
    modified = rules.score_mod.function(scores, batch, head, query, key, rules.score_mod.captured)
    modified = tl.broadcast_to(tl.cast(modified, tl.float32), scores.shape)
    return tl.where(modified == -INFINITY, -INFINITY, in_base_2(modified))


@triton.jit
def masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL: tl.constexpr):
    """Scores in base 2, with what ``score_mod`` makes of them and what is added to them, and ``-inf`` where ``rows``
    may not see ``cols``: from those :func:`in_unit`, or in any unit where there is neither a ``score_mod`` nor a bias
    nor ALiBi. Only a PARTIAL tile holds such pairs; but a bias or a ``score_mod`` may hide some anywhere."""
    if rules.score_mod is not None:
        scores = modified_scores(scores, rows, cols, at, sizes, rules)
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
        finite = in_base_2(b)  # ahead of the comparison: behind it, dQ takes 19 more registers (sm_90, D64)
        scores = tl.where(b == -INFINITY, -INFINITY, scores + finite)  # not a sum: NaN - inf would be NaN
    if PARTIAL:
        scores = tl.where(visible(rows, cols, at, sizes, rules), scores, -INFINITY)
    return scores
