"""Backward in two passes without atomics, bitwise deterministic: a program owns a tile of dK and dV, or one of dQ.

Both recompute P from each row's statistics (arXiv:2307.08691, algorithm 2); the workspace is delta, O(L).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels._device import device_guard
from fastattn_kernels._masking import (
    INFINITY,
    LOG2_E,
    dropout_factor,
    key_range,
    load_dropout,
    masked_scores,
    row_range,
)
from fastattn_kernels._tiles import any_not_finite, load_statistics, load_tile, store_tile, weighted_sum
from fastattn_kernels.attention_config import (
    BackwardConfig,
    backward_config,
    careful_config,
    dot_precision,
    head_block,
)
from fastattn_kernels.attention_problem import Problem, WeightsGradient


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_lb, stride_lh, stride_lm,
    heads, seqlen_q,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dO * O) - dLSE``: the mean that softmax's gradient subtracts."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row_start = tl.program_id(0) % tiles * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    out_ptr += batch * stride_ob + head * stride_oh
    do_ptr += batch * stride_gb + head * stride_gh
    out = load_tile(out_ptr, row_start, seqlen_q, stride_om, stride_od, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    do = load_tile(do_ptr, row_start, seqlen_q, stride_gm, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows = row_start + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        dlse_ptr += batch * stride_lb + head * stride_lh
        dlse = tl.load(dlse_ptr + rows.to(tl.int64) * stride_lm, mask=rows < seqlen_q, other=0.0)
        delta -= dlse.to(tl.float32)
    tl.store(delta_ptr + batch_head.to(tl.int64) * seqlen_q + rows, delta, mask=rows < seqlen_q)


@triton.jit
def load_weights_gradient(d_weights, rows, cols, rules):
    """A tile of the gradient of the returned weights, as the share of this head."""
    dw_ptr, stride_m, stride_n, share = d_weights
    inside = (rows < rules[0]) & (cols < rules[1])
    ptrs = dw_ptr + rows.to(tl.int64) * stride_m + cols.to(tl.int64) * stride_n
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * share


@triton.jit
def probabilities(
    qk, row_max, inverse_sum, unit, rows, cols, rules, BOUND: tl.constexpr, CROSSING: tl.constexpr
):  # fmt: skip
    """P of a tile in either orientation; the rows' statistics broadcast against it."""
    scores = masked_scores(qk, unit, rows, cols, rules, BOUND, CROSSING)
    p = tl.exp2(scores - row_max) * inverse_sum
    if BOUND or CROSSING or rules[3][0] is not None or rules[4][0] is not None or rules[5][0] is not None:
        p = tl.where(scores == -INFINITY, 0.0, p)  # the statistics of a row may be NaN
    return p


@triton.jit
def _score_gradient(p, factor, dp, delta, rows, cols, rules, d_weights, BOUND: tl.constexpr, CROSSING: tl.constexpr):
    """dS of a tile, from P, the factor that dropout puts on it (or None), dO V^T and delta."""
    if d_weights is not None:
        dp += load_weights_gradient(d_weights, rows, cols, rules)
    if factor is not None:
        dp = tl.where(factor == 0.0, 0.0, dp * factor)
    ds = p * (dp - delta)
    if BOUND or CROSSING or rules[3][0] is not None or rules[4][0] is not None or rules[5][0] is not None:
        ds = tl.where(p == 0.0, 0.0, ds)  # what dP is of a masked-out value may be NaN or inf, and 0 * NaN is NaN
    return ds


@triton.jit
def _grad_of_keys(
    dk, dv, k, v, unit, queries, gradients, statistics_ptr, delta_ptr, begin, end, cols, batch, kv_head, heads, group,
    seqlen_q, seqlen_k, diagonal, mask, bias, padding, dropout, weights_gradient,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CROSSING: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what the query rows ``begin .. end`` of all heads of the group give, head after head.

    One loop over heads and rows: nothing is summed between programs, and two nested loops would spill (96 bytes more on
    sm_90 at head size 128). Tiles are transposed, ``[N, M]``, so that P and dS are left operands in registers.
    """
    q_ptr, stride_qh, stride_qm, stride_qd = queries
    do_ptr, stride_gh, stride_gm, stride_gd = gradients
    # without masks, keys past the end only reach rows of dK and dV that are not stored
    BOUND: tl.constexpr = mask[0] is not None or bias[0] is not None or padding[0] is not None
    steps = tl.cdiv(end - begin, BLOCK_M)
    for step in tl.range(0, group * steps):
        member = step // steps
        start = begin + (step - member * steps) * BLOCK_M
        head = kv_head * group + member
        rules = (seqlen_q, seqlen_k, diagonal, mask, bias, padding, batch, head)
        row = start + tl.arange(0, BLOCK_M)
        rows = row[None, :]
        head_q, head_do = q_ptr + head * stride_qh, do_ptr + head * stride_gh
        q = load_tile(head_q, start, seqlen_q, stride_qm, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
        do = load_tile(head_do, start, seqlen_q, stride_gm, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
        batch_head = batch * heads + head
        row_max, inverse_sum = load_statistics(statistics_ptr + 2 * batch_head * seqlen_q, row, seqlen_q)
        delta = tl.load(delta_ptr + batch_head * seqlen_q + row, mask=row < seqlen_q, other=0.0)
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = probabilities(qk, row_max[None, :], inverse_sum[None, :], unit, rows, cols, rules, BOUND, CROSSING)
        factor = None
        dropped = p
        if dropout is not None:
            factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
            dropped = p * factor
        dv = weighted_sum(dropped.to(do.dtype), do, dv, CAREFUL, PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        d_weights = None
        if weights_gradient is not None:
            dw_ptr, stride_wh, stride_wm, stride_wn, share = weights_gradient
            d_weights = (dw_ptr + head * stride_wh, stride_wm, stride_wn, share)
        ds = _score_gradient(p, factor, dp, delta[None, :], rows, cols, rules, d_weights, BOUND, CROSSING)
        dk = weighted_sum(ds.to(q.dtype), q, dk, CAREFUL, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads", "group"])
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    dw_ptr, stride_wb, stride_wh, stride_wm, stride_wn, share,
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_padding_b, stride_padding_n,
    heads, group, seqlen_q, seqlen_k, diagonal, scale, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one BLOCK_N tile of keys, from all query rows that see it. CAREFUL: only if they are not finite."""
    tiles = tl.cdiv(seqlen_k, BLOCK_N)
    kv_heads = heads // group
    batch_head = tl.program_id(0) // tiles
    col_start = tl.program_id(0) % tiles * BLOCK_N  # under a diagonal the first keys are seen most: longest first
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    cols = col_start + tl.arange(0, BLOCK_N)[:, None]
    dropout = None
    if seed_ptr is not None:
        dropout = load_dropout(seed_ptr, dropout_p)
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh
    if CAREFUL:
        stored_dk = load_tile(dk_ptr, col_start, seqlen_k, stride_dkn, stride_dkd, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        stored_dv = load_tile(dv_ptr, col_start, seqlen_k, stride_dvn, stride_dvd, BLOCK_N, BLOCK_DV, VALUE_DIM, True)
        if not (any_not_finite(stored_dk) | any_not_finite(stored_dv)):
            return
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    k = load_tile(k_ptr, col_start, seqlen_k, stride_kn, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, True)
    v = load_tile(v_ptr, col_start, seqlen_k, stride_vn, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM, True)
    unit = scale * LOG2_E

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    queries = (q_ptr + batch * stride_qb, stride_qh, stride_qm, stride_qd)
    gradients = (do_ptr + batch * stride_gb, stride_gh, stride_gm, stride_gd)
    weights_gradient = None
    if dw_ptr is not None:
        weights_gradient = (dw_ptr + batch * stride_wb, stride_wh, stride_wm, stride_wn, share)
    mask = (mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n)
    bias = (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n)
    padding = (padding_ptr, stride_padding_b, stride_padding_n)
    begin, full_begin = row_range(col_start, seqlen_q, diagonal, BLOCK_M, BLOCK_N)
    if diagonal is not None:
        dk, dv = _grad_of_keys(
            dk, dv, k, v, unit, queries, gradients, statistics_ptr, delta_ptr, begin, full_begin, cols,
            batch, kv_head, heads, group, seqlen_q, seqlen_k, diagonal, mask, bias, padding, dropout, weights_gradient,
            BLOCK_M, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, CAREFUL, PRECISION,
        )  # fmt: skip
    dk, dv = _grad_of_keys(
        dk, dv, k, v, unit, queries, gradients, statistics_ptr, delta_ptr, full_begin, seqlen_q, cols,
        batch, kv_head, heads, group, seqlen_q, seqlen_k, diagonal, mask, bias, padding, dropout, weights_gradient,
        BLOCK_M, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, CAREFUL, PRECISION,
    )  # fmt: skip
    store_tile(dk_ptr, col_start, seqlen_k, stride_dkn, stride_dkd, dk * scale, BLOCK_N, BLOCK_D, HEAD_DIM)
    store_tile(dv_ptr, col_start, seqlen_k, stride_dvn, stride_dvd, dv, BLOCK_N, BLOCK_DV, VALUE_DIM)


@triton.jit
def _grad_of_queries(
    dq, q, do, row_max, inverse_sum, delta, unit, keys, values, begin, end, rows, batch_head, rules, dropout, d_weights,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTIAL: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dQ what keys ``begin .. end`` give. PARTIAL: tiles may cross the diagonal or the last key."""
    k_ptr, stride_kn, stride_kd = keys
    v_ptr, stride_vn, stride_vd = values
    seqlen_k = rules[1]
    for start in tl.range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(k_ptr, start, seqlen_k, stride_kn, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, PARTIAL)
        v = load_tile(v_ptr, start, seqlen_k, stride_vn, stride_vd, BLOCK_N, BLOCK_DV, VALUE_DIM, PARTIAL)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = probabilities(qk, row_max[:, None], inverse_sum[:, None], unit, rows, cols, rules, PARTIAL, PARTIAL)
        factor = None
        if dropout is not None:
            factor = dropout_factor(rows, cols, batch_head, dropout)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = _score_gradient(p, factor, dp, delta[:, None], rows, cols, rules, d_weights, PARTIAL, PARTIAL)
        dq = weighted_sum(ds.to(k.dtype), k, dq, CAREFUL, PRECISION)
    return dq


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads", "group"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, statistics_ptr, delta_ptr, dq_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    dw_ptr, stride_wb, stride_wh, stride_wm, stride_wn, share,
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_padding_b, stride_padding_n,
    heads, group, seqlen_q, seqlen_k, diagonal, scale, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dQ of one BLOCK_M tile of rows, from all keys that it sees. CAREFUL: only if it is not finite."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row_start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # longest first, as in the forward
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    dq_ptr += batch * stride_dqb + head * stride_dqh
    if CAREFUL:
        stored = load_tile(dq_ptr, row_start, seqlen_q, stride_dqm, stride_dqd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
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
    d_weights = None
    if dw_ptr is not None:
        d_weights = (dw_ptr + batch * stride_wb + head * stride_wh, stride_wm, stride_wn, share)
    keys = (k_ptr + batch * stride_kb + head // group * stride_kh, stride_kn, stride_kd)
    values = (v_ptr + batch * stride_vb + head // group * stride_vh, stride_vn, stride_vd)
    q_ptr += batch * stride_qb + head * stride_qh
    do_ptr += batch * stride_gb + head * stride_gh
    row = row_start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, row_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    do = load_tile(do_ptr, row_start, seqlen_q, stride_gm, stride_gd, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    rows_of = batch_head.to(tl.int64) * seqlen_q
    row_max, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q)
    delta = tl.load(delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
    unit = scale * LOG2_E

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full_end, end = key_range(row_start, seqlen_k, diagonal, BLOCK_M, BLOCK_N)
    dq = _grad_of_queries(
        dq, q, do, row_max, inverse_sum, delta, unit, keys, values, 0, full_end, row[:, None], batch_head,
        rules, dropout, d_weights,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, False, CAREFUL, PRECISION,
    )  # fmt: skip
    dq = _grad_of_queries(
        dq, q, do, row_max, inverse_sum, delta, unit, keys, values, full_end, end, row[:, None], batch_head,
        rules, dropout, d_weights,
        BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, True, CAREFUL, PRECISION,
    )  # fmt: skip
    store_tile(dq_ptr, row_start, seqlen_q, stride_dqm, stride_dqd, dq * scale, BLOCK_M, BLOCK_D, HEAD_DIM)


def launch_attention_delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """``rowsum(dO * O) - dLSE``, ``[B, H, L]`` float32."""
    batch, heads, seqlen_q, value_dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    if delta.numel() == 0:
        return delta
    block_m = 64
    with device_guard(out):
        _delta_kernel[(triton.cdiv(seqlen_q, block_m) * batch * heads,)](
            out, d_out, d_lse, delta,
            *out.stride(), *d_out.stride(), *((0, 0, 0) if d_lse is None else d_lse.stride()),
            heads, seqlen_q, VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), BLOCK_M=block_m,
        )  # fmt: skip
    return delta


def launch_attention_bwd(
    problem: Problem,
    d_out: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    config: BackwardConfig | None = None,
) -> None:
    """Write dQ, dK and dV (any strides) from the forward's statistics and delta."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_k, value_dim = key.shape[1], key.shape[2], value.shape[3]
    weights_arguments = (None, 0, 0, 0, 0, 1.0) if d_weights is None else d_weights.arguments()
    numbers = (heads, heads // max(kv_heads, 1), seqlen_q, seqlen_k, problem.diagonal, problem.scale, problem.dropout_p)
    sizes = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_DV": head_block(value_dim),
        "PRECISION": dot_precision(query.dtype),
    }
    config = config or backward_config(query.device, query.dtype, head_dim, value_dim, problem.load(d_weights))
    careful_tiles = BackwardConfig(careful_config(query.dtype), careful_config(query.dtype))
    for careful in (False, True) if problem.masks_pairs() else (False,):
        tiles = careful_tiles if careful else config
        with device_guard(query):
            if dk.numel() or dv.numel():
                _attention_bwd_dkdv_kernel[(triton.cdiv(seqlen_k, tiles.dkdv.block_n) * batch * kv_heads,)](
                    query, key, value, d_out, statistics, delta, dk, dv, problem.seed,
                    *query.stride(), *key.stride(), *value.stride(), *d_out.stride(), *dk.stride(), *dv.stride(),
                    *weights_arguments, *problem.rule_arguments(), *numbers, **sizes,
                    CAREFUL=careful, **tiles.dkdv.launch_options(),
                )  # fmt: skip
            if dq.numel():
                _attention_bwd_dq_kernel[(triton.cdiv(seqlen_q, tiles.dq.block_m) * batch * heads,)](
                    query, key, value, d_out, statistics, delta, dq, problem.seed,
                    *query.stride(), *key.stride(), *value.stride(), *d_out.stride(), *dq.stride(),
                    *weights_arguments, *problem.rule_arguments(), *numbers, **sizes,
                    CAREFUL=careful, **tiles.dq.launch_options(),
                )  # fmt: skip
