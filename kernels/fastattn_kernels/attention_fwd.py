"""Forward: one tile of queries against all keys it may see, by online softmax (arXiv:2205.14135, arXiv:2307.08691)."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels._device import device_guard
from fastattn_kernels._masking import (
    INFINITY,
    LN_2,
    LOG2_E,
    dropout_keep,
    dropout_scale,
    key_range,
    load_dropout,
    masked_scores,
)
from fastattn_kernels._tiles import any_not_finite, load_tile, store_statistics, store_tile, weighted_sum
from fastattn_kernels.attention_config import Config, careful_config, dot_precision, forward_config, head_block
from fastattn_kernels.attention_problem import Problem

# The smallest normal float32: scores times this are 0, as a scale of 0 wants, yet -inf times it stays -inf.
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, unit, keys, values, begin, end, rows, batch_head, rules, dropout,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``begin .. end``. PARTIAL: tiles may cross the diagonal or the last key."""
    k_ptr, stride_kn, stride_kd = keys
    v_ptr, stride_vn, stride_vd = values
    seqlen_k = rules[1]
    for start in tl.range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(k_ptr, start, seqlen_k, stride_kn, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if rules[4][0] is None:
            # unscaled: the scale then rides in the same multiply-add as the subtraction of the maximum
            scores = masked_scores(qk, 1.0, rows, cols, rules, PARTIAL, PARTIAL)
            new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
            # a row with no visible key keeps max = -inf; a finite pivot avoids -inf - -inf
            pivot = tl.where(new_max == -INFINITY, 0.0, new_max)
            p = tl.exp2(scores * unit - pivot[:, None])
        else:
            scores = masked_scores(qk, unit, rows, cols, rules, PARTIAL, PARTIAL)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            pivot = tl.where(new_max == -INFINITY, 0.0, new_max)
            p = tl.exp2(scores - pivot[:, None])
        correction = tl.exp2(row_max - pivot)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        if dropout is not None:
            p = tl.where(dropout_keep(rows, cols, batch_head, dropout), p, 0.0)
        v = load_tile(v_ptr, start, seqlen_k, stride_vn, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL)
        acc = weighted_sum(p.to(v.dtype), v, acc, CAREFUL, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads", "group"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, statistics_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_padding_b, stride_padding_n,
    heads, group, seqlen_q, seqlen_k, diagonal, scale, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M tile of queries of one head against all visible keys. CAREFUL: only if its output is not finite."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    # the last rows see the most keys under a diagonal: longest tiles first leave no long one for the end
    row_start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    out_ptr += batch * stride_ob + head * stride_oh
    if CAREFUL:
        stored = load_tile(out_ptr, row_start, seqlen_q, stride_om, stride_od, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
        if not any_not_finite(stored):
            return
    rules = (
        seqlen_q, seqlen_k, diagonal,
        (mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n),
        (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n),
        (padding_ptr, stride_padding_b, stride_padding_n),
        batch, head,
    )  # fmt: skip
    dropout = None
    if seed_ptr is not None:
        dropout = load_dropout(seed_ptr, dropout_p)
    keys = (k_ptr + batch * stride_kb + head // group * stride_kh, stride_kn, stride_kd)
    values = (v_ptr + batch * stride_vb + head // group * stride_vh, stride_vn, stride_vd)
    rows = row_start + tl.arange(0, BLOCK_M)[:, None]

    q_ptr += batch * stride_qb + head * stride_qh
    q = load_tile(q_ptr, row_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    # max(scale * qk) = scale * max(qk) wants scale > 0: a negative one's sign moves into q, which is exact
    q = tl.where(scale < 0, -q, q)
    unit = tl.maximum(tl.abs(scale) * LOG2_E, TINY)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -INFINITY, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    full_end, end = key_range(row_start, seqlen_k, diagonal, BLOCK_M, BLOCK_N)
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, keys, values, 0, full_end, rows, batch_head, rules, dropout,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, CAREFUL, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, unit, keys, values, full_end, end, rows, batch_head, rules, dropout,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, CAREFUL, PRECISION,
    )  # fmt: skip

    inverse_sum = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # a row that may see nothing is zero
    norm = inverse_sum
    if dropout is not None:
        norm = norm * dropout_scale(dropout_p)
    store_tile(out_ptr, row_start, seqlen_q, stride_om, stride_od, acc * norm[:, None], BLOCK_M, BLOCK_DV, VALUE_DIM)
    row = row_start + tl.arange(0, BLOCK_M)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    tl.store(lse_ptr + rows_of + row, (pivot + tl.log2(row_sum)) * LN_2, mask=row < seqlen_q)
    store_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q, pivot, inverse_sum)


def launch_attention_fwd(
    problem: Problem, out: Tensor, lse: Tensor, statistics: Tensor, config: Config | None = None
) -> None:
    """Write the output ``[B, H, L, Dv]`` (any strides), and, contiguous and float32, the natural LSE ``[B, H, L]`` and
    the statistics ``[B, H, 2, L]`` that the other launchers take."""
    if lse.numel() == 0:
        return
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    value_dim = value.shape[3]
    config = config or forward_config(query.device, query.dtype, head_dim, value_dim, problem.load())
    for careful in (False, True) if problem.masks_pairs() else (False,):
        tile = careful_config(query.dtype) if careful else config
        with device_guard(query):
            _attention_fwd_kernel[(triton.cdiv(seqlen_q, tile.block_m) * batch * heads,)](
                query, key, value, out, lse, statistics, problem.seed,
                *query.stride(), *key.stride(), *value.stride(), *out.stride(),
                *problem.rule_arguments(), heads, heads // max(key.shape[1], 1),
                seqlen_q, key.shape[2], problem.diagonal, problem.scale, problem.dropout_p,
                HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
                PRECISION=dot_precision(query.dtype), CAREFUL=careful, **tile.launch_options(),
            )  # fmt: skip
