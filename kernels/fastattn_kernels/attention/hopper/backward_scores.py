"""P and dS of a tile in the backward, in registers, from the products of queries and keys and of dO and V.

Unlike the plain kernels these never ask whether dP is NaN where P is 0. Where it is, NaN leaks into the whole tile of a
gradient, and the careful launch computes that tile again.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.compat import shared
from fastattn_kernels.attention.hopper.mask_bits import load_words, unpack_words
from fastattn_kernels.common import masking
from fastattn_kernels.common.masking import INFINITY, LOG2_E, LOWEST_BIAS

tanh = shared(masking.tanh)
visible = shared(masking.visible)

_NAN_STAYS = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def probabilities(products, pivot, inverse_sum, bias, unit, softcap):
    """``(P, P times the slope of the softcap)``; rows' statistics broadcast against the tile, in either orientation.

    Without a bias the pivot is the row's LSE in base 2 and there is no inverse sum. Its rounding costs P what it costs
    the score: |score| ulps of float32, when eager attention rounds the scores to 16 bits. A bias may be finfo.min, and
    an ulp of that swallows the sum: hence two numbers.
    """
    if softcap is not None:
        limit = softcap * LOG2_E
        tangent = tanh(products * (unit / limit))  # in place of capped and its slope: two divisions less
        scores = tangent * limit
        slope = gl.fma(-tangent, tangent, 1.0)
    else:
        scores = products * unit
        slope: gl.constexpr = 1.0
    if bias is None:
        p = gl.exp2(scores - pivot)
    else:
        in_base_2 = gl.maximum(bias * LOG2_E, LOWEST_BIAS, propagate_nan=_NAN_STAYS)
        p = gl.exp2(scores + in_base_2 - pivot) * inverse_sum
        p = gl.where(bias == -INFINITY, 0.0, p)
    return p, p * slope


@gluon.jit
def score_gradient(bent, dp, delta, dtype: gl.constexpr):
    """dS, rounded, from P times the slope of the softcap."""
    return (bent * (dp - delta)).to(dtype)


@gluon.jit
def seen_by_bits(words, batch, head, own, other_start, SCORES: gl.constexpr, COLS: gl.constexpr):
    """Boolean tile of a packed mask: ``own`` are its rows, all inside the mask, ``other_start`` its first column."""
    of_head = words.ptr + batch.to(gl.int64) * words.stride_b + head.to(gl.int64) * words.stride_h
    offsets = own.to(gl.int64) * words.stride_row
    return unpack_words(load_words(of_head, offsets, other_start * words.stride_word, COLS), SCORES, COLS)


@gluon.jit
def as_operand(tile, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """P or dS, rounded, as the left operand of a product: in registers."""
    return gl.convert_layout(tile.to(dtype), OPERAND)
