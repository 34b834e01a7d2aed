"""Scores, probabilities recomputed from a row's statistics, and the gradient of the scores, tile by tile.

Every kernel behind the forward goes this way: the backward's passes, the gradients of biases, the returned weights.
"""

import triton
import triton.language as tl

from fastattn_kernels.common.masking import INFINITY, capped, capped_slope, in_unit, indices, masked_scores


@triton.jit
def softcapped_scores(products, unit, rules):
    """Scores from products of queries and keys, after the softcap, before ``score_mod`` makes something of them and
    anything is added: in the unit of ``masking.in_unit``, as ``unit``, the scale, is."""
    scores = products * unit
    if rules.softcap is not None:
        scores = capped(scores, in_unit(rules.softcap, rules))
    return scores


@triton.jit
def probabilities(scores, row_max, inverse_sum, rows, cols, at, sizes, rules, PARTIAL: tl.constexpr):
    """P of a tile of :func:`softcapped_scores`, in either orientation; the rows' statistics broadcast against it."""
    scores = masked_scores(scores, rows, cols, at, sizes, rules, PARTIAL)
    p = tl.exp2(scores - row_max) * inverse_sum
    if PARTIAL or rules.bias is not None or rules.score_mod is not None:
        p = tl.where(scores == -INFINITY, 0.0, p)  # the statistics of a row may be NaN
    return p


@triton.jit
def load_weights_gradient(d_weights, rows, cols, at, sizes):
    """A tile of the gradient of the returned weights, as the share of this head."""
    inside = (rows < sizes.seqlen_q) & (cols < sizes.seqlen_k)
    # From the pointer on, not as ``pair_pointers`` adds up: float32's dQ would take 12 more registers (sm_90, D64).
    ptrs = d_weights.ptr + at.batch * d_weights.stride_b + at.head * d_weights.stride_h
    ptrs += rows.to(tl.int64) * d_weights.stride_m
    d = tl.load(ptrs + cols.to(tl.int64) * d_weights.stride_n, mask=inside, other=0.0)
    return d.to(tl.float32) * d_weights.share


@triton.jit
def score_gradient(p, factor, dp, delta, rows, cols, at, sizes, rules, d_weights, PARTIAL: tl.constexpr):
    """dS of a tile, from P, the factor that dropout puts on it (or None), dO V^T and delta."""
    if d_weights is not None:
        dp += load_weights_gradient(d_weights, rows, cols, at, sizes)
    if factor is not None:
        dp = tl.where(factor == 0.0, 0.0, dp * factor)
    ds = p * (dp - delta)
    if PARTIAL or rules.bias is not None or rules.score_mod is not None:
        # dP of a masked-out value may be NaN or inf, and P, which is 0 there, would not hide it: 0 * NaN is NaN
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def product_gradient(ds, scores, rows, cols, at, sizes, rules):
    """The gradient of the scaled products of queries and keys, from dS and the :func:`softcapped_scores`: back through
    ``score_mod`` and the softcap."""
    # A score of NaN whose gradient is 0 is masked out: 0 * NaN would be NaN.
    if rules.score_mod is not None:
        ds = through_function(rules.score_mod.gradient, ds, scores, rows, cols, at, sizes, rules)
    if rules.softcap is not None:
        ds = tl.where(ds == 0.0, 0.0, ds * capped_slope(scores, in_unit(rules.softcap, rules)))
    return ds


@triton.jit
def through_function(derivative, ds, scores, rows, cols, at, sizes, rules):
    """What a derivative of ``score_mod``, a function of Triton, makes of dS: a tile, 0 where dS is 0."""
    batch, head, query, key = indices(rows, cols, at, sizes)
    d = derivative(ds, scores, batch, head, query, key, rules.score_mod.captured)
    return tl.where(ds == 0.0, 0.0, tl.broadcast_to(tl.cast(d, tl.float32), ds.shape))
