"""From products of queries and keys to probabilities, in registers: what is added, what is hidden, online softmax.

A warpgroup holds ``[64, BLOCK_N]`` scores. Without a bias they stay products of queries and keys, and ``unit`` brings
them to base 2 in the multiply-add of the exponent. With a bias they are scores in half of base 2, and the exponent
costs a subtraction and a multiplication. In base 2, a bias near the lowest float32 would be -inf, and it has to stay
finite. In natural units, sums with a large bias would be rounded otherwise than where the backward recomputes them in
base 2: a bias of -1e8 for all keys of a row moved their exponents by 16.
"""

from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.compat import gluon, shared
from fastattn_kernels.attention.hopper.mask_bits import ROWS, load_words, unpack_words
from fastattn_kernels.attention.hopper.schedule import opaque
from fastattn_kernels.common import masking
from fastattn_kernels.common.arguments import Rules
from fastattn_kernels.common.masking import INFINITY, LN_2, LOWEST_BIAS

visible = shared(masking.visible)
accurate_tanh = shared(masking.tanh)

HALF_LOG2_E = gl.constexpr(0.5 * 1.4426950408889634)


@gluon.jit
def tanh(x, dtype: gl.constexpr):
    """``tanh`` as exact as the results need for inputs of ``dtype``: the hardware's for bfloat16, an accurate one else.

    The hardware's has 11 bits and a tenth of the instructions, and makes the loop 1.6 times as fast (modelled). At a
    softcap of 50 and large scores, the results' error with it is a ninth of eager bfloat16's, which rounds scores to 8
    bits. In float16 it would be as large as eager's, ten times as large as with an accurate ``tanh``.
    """
    if dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
    else:
        y = accurate_tanh(x)
    return y


@gluon.jit
def softmax_step(scores, row_max, row_sum, unit, HALVED: gl.constexpr):
    """``(P, row_max, row_sum, correction)`` after one more tile; P is not divided by the sum yet, and what was summed
    up before is to be multiplied by the correction. The maximum is in base 2, or if HALVED in half of it."""
    # a row with no visible key keeps max = -inf; a finite pivot avoids -inf - -inf
    if HALVED:
        new_max = gl.maximum(row_max, gl.max(scores, 1))
        pivot = gl.where(new_max == -INFINITY, 0.0, new_max)
        p = gl.exp2((scores - pivot[:, None]) * 2.0)
        correction = gl.exp2((row_max - pivot) * 2.0)
    else:
        new_max = gl.maximum(row_max, gl.max(scores, 1) * unit)
        pivot = gl.where(new_max == -INFINITY, 0.0, new_max)
        p = gl.exp2(scores * unit - pivot[:, None])
        correction = gl.exp2(row_max - pivot)
    return p, new_max, row_sum * correction + gl.sum(p, 1), correction


@gluon.jit
def load_addends(
    col_start, slot, at, row_start, sizes, rules, b_s, row_bias,
    INDEX: gl.constexpr, SCORES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """What joins a tile of scores: ``(bias, words of masks)``, 0 where there is none. Loaded while the product is on
    its way; a tile of bias came with the keys, and their barrier has been waited for."""
    mask, padding = rules.mask, rules.padding
    batch, head = at.batch, at.head
    if b_s is not None:
        bias = b_s.index(slot * CONSUMERS + INDEX).reshape([ROWS, BLOCK_N]).load(SCORES)
    elif row_bias is not None:  # one load a thread, shared out later
        cols = gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
        bias_ptr = row_bias.ptr + (batch * row_bias.stride_b + head * row_bias.stride_h + opaque(col_start))
        bias = gl.load(bias_ptr + cols, mask=cols < sizes.seqlen_k - col_start, other=0.0).to(gl.float32)
    else:
        bias = 0  # Triton 3.6 cannot return a tuple that holds a None
    if PARTIAL and (mask is not None or padding is not None):
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        if mask is not None:
            # 64 bits wide up to the tile, 32 inside it: that saves registers
            offset = batch * mask.stride_b + head * mask.stride_h + row_start.to(gl.int64) * mask.stride_row
            row = gl.minimum(rows, sizes.seqlen_q - 1 - row_start)
            words = load_words(mask.ptr + offset, row * mask.stride_row, col_start, BLOCK_N)
            if padding is not None:
                words = words & load_words(padding.ptr + batch * padding.stride_b, rows * 0, col_start, BLOCK_N)
        else:
            words = load_words(padding.ptr + batch * padding.stride_b, rows * 0, col_start, BLOCK_N)
    else:
        words = 0
    return bias, words


@gluon.jit
def within_bounds(row_start, col_start, sizes, SCORES: gl.constexpr, BLOCK_N: gl.constexpr):
    """:func:`visible` where nothing but lengths and bounds hides keys, in half of its instructions: a causal tile runs
    1.5 times as fast at 64 columns to a head (modelled).

    Bits 1 and 2 of a column say which of a row's four threads holds it; the other bits are the same in all threads, and
    so constants to the compiler, one for each register. Compared are these constants, with a number that each row has;
    bits 1 and 2 are subtracted from that number once, and not added to every column."""
    lower, upper = sizes.lower, sizes.upper
    rows = gl.minimum(row_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES)), sizes.seqlen_q - 1)
    cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))[None, :]
    end = rows * 0 + (sizes.seqlen_k - col_start)
    if upper is not None:
        end = gl.minimum(end, rows + (upper + 1 - col_start))
    seen = (cols & ~6) < end[:, None] - (cols & 6)
    if lower is not None:
        seen = seen & ((cols & ~6) >= (rows + (lower - col_start))[:, None] - (cols & 6))
    return seen


@gluon.jit
def probabilities(
    scores, col_start, addends, row_max, row_sum, at, row_start, sizes, rules, factors,
    dtype: gl.constexpr, SCORES: gl.constexpr, HALVED: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """One step of online softmax on products of queries and keys; see :func:`softmax_step`."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    bias, words = addends
    inner, unit = factors
    if rules.softcap is not None:
        scores = tanh(scores * inner, dtype)
    if HALVED:
        bias = bias.to(gl.float32) * HALF_LOG2_E
        if len(bias.shape) == 1:
            bias = gl.convert_layout(bias, gl.SliceLayout(0, SCORES))[None, :]
        scores = scores * (unit * 0.5) + bias
    if PARTIAL:
        BITS: gl.constexpr = rules.mask is not None or rules.padding is not None
        if BITS:  # 0 past the last key
            scores = gl.where(unpack_words(words, SCORES, BLOCK_N), scores, -INFINITY)
        if rules.documents is None and rules.prefix is None:
            if not BITS or sizes.lower is not None or sizes.upper is not None:
                scores = gl.where(within_bounds(row_start, col_start, sizes, SCORES, BLOCK_N), scores, -INFINITY)
        else:
            rows = row_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))[:, None]
            cols = col_start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))[None, :]
            seen = visible(rows, cols, at, sizes, Rules(documents=rules.documents, prefix=rules.prefix))
            scores = gl.where(seen, scores, -INFINITY)
    return softmax_step(scores, row_max, row_sum, unit, HALVED)


@gluon.jit
def row_results(row_max, row_sum, HALVED: gl.constexpr):
    """``(pivot, inverse sum, LSE)`` of rows: the statistics, whose pivot is in base 2, and the natural LSE."""
    pivot = gl.where(row_max == -INFINITY, 0.0, row_max)
    inverse_sum = gl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    log_sum = gl.log2(row_sum) * LN_2
    if HALVED:
        lse = pivot * (2.0 * LN_2) + log_sum
        # cut off where the scores are that the backward recomputes in base 2
        pivot = gl.maximum(pivot * 2.0, LOWEST_BIAS)
    else:
        lse = pivot * LN_2 + log_sum
    return pivot, inverse_sum, lse


# P is carried to the next step as packed pairs. As 16-bit elements, each half of a register would be a value of its own
# to the compiler, taken apart after the conversion and put together again for the product: 64 byte permutations for
# each thread and step.
@gluon.jit
def pack(p, dtype: gl.constexpr):
    """Pairs of neighbouring columns, rounded to ``dtype``, as int32."""
    low, high = p.reshape([p.shape[0], p.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    return pairs


@gluon.jit
def unpack(pairs, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """The left operand of a product, from what :func:`pack` made; no instruction."""
    low = pairs.to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    p = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(p, OPERAND)
