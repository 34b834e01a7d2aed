"""The weights themselves, averaged over heads or one set a head, and what their gradient needs, from rows' statistics.

Averaged weights are summed over heads inside the tile: memory O(B L S) and never O(B H L S), in a fixed order. Their
gradient enters the backward as an addition to dP (attention_bwd) and to delta (here).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels._device import device_guard
from fastattn_kernels._masking import (
    LOG2_E,
    dropout_factor,
    dropout_keep,
    key_range,
    load_dropout,
)
from fastattn_kernels._tiles import load_statistics, load_tile
from fastattn_kernels.attention_bwd import load_weights_gradient, probabilities
from fastattn_kernels.attention_config import Config, dot_precision, head_block, weights_config
from fastattn_kernels.attention_problem import Problem, WeightsGradient


@triton.jit
def _weights(
    q, k, row_max, inverse_sum, unit, rows, cols, batch_head, rules, dropout, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of weights after dropout, ``[M, N]``."""
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(qk, row_max[:, None], inverse_sum[:, None], unit, rows, cols, rules, True, True)
    if dropout is not None:
        p *= dropout_factor(rows, cols, batch_head, dropout)
    return p


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads", "group", "heads_per_program"])
def _attention_weights_kernel(
    q_ptr, k_ptr, statistics_ptr, weights_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_wb, stride_wh, stride_wm, stride_wn,
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_padding_b, stride_padding_n,
    heads, group, seqlen_q, seqlen_k, diagonal, scale, dropout_p, heads_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_N]`` tile of weights, the mean of ``heads_per_program`` heads (1, or all of them)."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    col_start = pid % tiles_n * BLOCK_N
    row_start = pid // tiles_n % tiles_m * BLOCK_M
    outer = pid // tiles_n // tiles_m
    outer_heads = heads // heads_per_program
    batch = (outer // outer_heads).to(tl.int64)
    first_head = outer % outer_heads * heads_per_program
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    cols = col_start + tl.arange(0, BLOCK_N)[None, :]
    dropout = None
    if seed_ptr is not None:
        dropout = load_dropout(seed_ptr, dropout_p)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = first_head
    if diagonal is not None:  # a tile that nothing can see runs no head
        first = tl.where(col_start <= row_start + BLOCK_M - 1 + diagonal, first_head, first_head + heads_per_program)
    for head in tl.range(first, first_head + heads_per_program):
        head64 = tl.cast(head, tl.int64)
        batch_head = (batch * heads + head).to(tl.int32)
        rules = (
            seqlen_q, seqlen_k, diagonal,
            (mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n),
            (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n),
            (padding_ptr, stride_padding_b, stride_padding_n),
            batch, head64,
        )  # fmt: skip
        head_q = q_ptr + batch * stride_qb + head64 * stride_qh
        head_k = k_ptr + batch * stride_kb + head64 // group * stride_kh
        q = load_tile(head_q, row_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
        k = load_tile(head_k, col_start, seqlen_k, stride_kn, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        row_max, inverse_sum = load_statistics(statistics_ptr + 2 * batch_head.to(tl.int64) * seqlen_q, row, seqlen_q)
        total += _weights(q, k, row_max, inverse_sum, scale * LOG2_E, rows, cols, batch_head, rules, dropout, PRECISION)
    weights_ptr += batch * stride_wb + first_head.to(tl.int64) * stride_wh + col_start.to(tl.int64) * stride_wn
    inside = (rows < seqlen_q) & (cols < seqlen_k)
    local_cols = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    ptrs = weights_ptr + rows.to(tl.int64) * stride_wm + local_cols * stride_wn
    tl.store(ptrs, (total / heads_per_program).to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads", "group"])
def _attention_weights_delta_kernel(
    q_ptr, k_ptr, statistics_ptr, delta_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    dw_ptr, stride_wb, stride_wh, stride_wm, stride_wn, share,
    mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    padding_ptr, stride_padding_b, stride_padding_n,
    heads, group, seqlen_q, seqlen_k, diagonal, scale, dropout_p,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``delta += rowsum(dW * W)``: the returned weights' part of the mean that softmax's gradient subtracts."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row_start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
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
    d_weights = (dw_ptr + batch * stride_wb + head * stride_wh, stride_wm, stride_wn, share)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    rows_of = batch_head.to(tl.int64) * seqlen_q
    q = load_tile(q_ptr, row_start, seqlen_q, stride_qm, stride_qd, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    row_max, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q)
    delta = tl.load(delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
    _, end = key_range(row_start, seqlen_k, diagonal, BLOCK_M, BLOCK_N)
    for start in tl.range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(k_ptr, start, seqlen_k, stride_kn, stride_kd, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        p = _weights(q, k, row_max, inverse_sum, scale * LOG2_E, rows, cols, batch_head, rules, dropout, PRECISION)
        dw = load_weights_gradient(d_weights, rows, cols, rules)
        delta += tl.sum(tl.where(p == 0.0, 0.0, p * dw), 1)
    tl.store(delta_ptr + rows_of + row, delta, mask=row < seqlen_q)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k"])
def _dropout_keep_kernel(
    keep_ptr, seed_ptr, seqlen_q, seqlen_k, dropout_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which weights dropout keeps, written out as bytes: for tests and for second derivatives."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    batch_head = pid // tiles_n // tiles_m
    rows = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    keep = dropout_keep(rows, cols, batch_head, load_dropout(seed_ptr, dropout_p))
    ptrs = keep_ptr + (batch_head.to(tl.int64) * seqlen_q + rows) * seqlen_k + cols
    tl.store(ptrs, keep.to(tl.uint8), mask=(rows < seqlen_q) & (cols < seqlen_k))


def launch_attention_weights(
    problem: Problem, statistics: Tensor, weights: Tensor, average: bool, config: Config | None = None
) -> None:
    """Write the weights: ``[B, L, S]`` averaged over heads, or ``[B, H, L, S]``; any strides."""
    if weights.numel() == 0:
        return
    query, key = problem.query, problem.key
    batch, heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    config = config or weights_config(query.device, query.dtype, head_dim)
    strides = (weights.stride(0), 0, *weights.stride()[1:]) if average else weights.stride()
    tiles = triton.cdiv(seqlen_q, config.block_m) * triton.cdiv(seqlen_k, config.block_n)
    with device_guard(query):
        _attention_weights_kernel[(tiles * batch * (1 if average else heads),)](
            query, key, statistics, weights, problem.seed, *query.stride(), *key.stride(), *strides,
            *problem.rule_arguments(), heads, heads // key.shape[1],
            seqlen_q, seqlen_k, problem.diagonal, problem.scale, problem.dropout_p, heads if average else 1,
            HEAD_DIM=head_dim, BLOCK_D=head_block(head_dim),
            PRECISION=dot_precision(query.dtype), **config.launch_options(),
        )  # fmt: skip


def launch_attention_weights_delta(
    problem: Problem, statistics: Tensor, d_weights: WeightsGradient, delta: Tensor, config: Config | None = None
) -> None:
    """Add ``rowsum(dW * W)`` to ``delta``, ``[B, H, L]`` contiguous float32."""
    if delta.numel() == 0:
        return
    query, key = problem.query, problem.key
    batch, heads, seqlen_q, head_dim = query.shape
    config = config or weights_config(query.device, query.dtype, head_dim)
    with device_guard(query):
        _attention_weights_delta_kernel[(triton.cdiv(seqlen_q, config.block_m) * batch * heads,)](
            query, key, statistics, delta, problem.seed, *query.stride(), *key.stride(),
            *d_weights.arguments(), *problem.rule_arguments(), heads, heads // max(key.shape[1], 1),
            seqlen_q, key.shape[2], problem.diagonal, problem.scale, problem.dropout_p,
            HEAD_DIM=head_dim, BLOCK_D=head_block(head_dim),
            PRECISION=dot_precision(query.dtype), **config.launch_options(),
        )  # fmt: skip


def launch_dropout_keep(seed: Tensor, dropout_p: float, keep: Tensor) -> None:
    """Write into ``keep``, boolean ``[B, H, L, S]`` contiguous, which weights dropout keeps."""
    if keep.numel() == 0:
        return
    batch, heads, seqlen_q, seqlen_k = keep.shape
    block = 32
    with device_guard(keep):
        grid = triton.cdiv(seqlen_q, block) * triton.cdiv(seqlen_k, block) * batch * heads
        _dropout_keep_kernel[(grid,)](
            keep.view(torch.uint8), seed, seqlen_q, seqlen_k, dropout_p, BLOCK_M=block, BLOCK_N=block
        )
