"""The gradient of an additive mask: dS, summed over exactly the axes along which the mask broadcasts.

A program owns one tile of the gradient and recomputes dS for every batch entry, head and tile of scores that fall on
it, in a fixed order: nothing is expanded, nothing is added by atomics. Where a mask is so small that few programs would
own it, several programs share a tile, and their sums are added up afterwards, again in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import bias_config
from fastattn_kernels.common.arguments import RUN_TIME, At, Heads, Sizes, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.device import multiprocessors
from fastattn_kernels.common.dropout import dropout_factor
from fastattn_kernels.common.gradients import WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import LOG2_E
from fastattn_kernels.common.packed import Packing, line_of, span_of
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import probabilities, score_gradient, softcapped_scores
from fastattn_kernels.common.tiles import head_of, load_statistics, load_tile, product
from fastattn_kernels.common.visits import is_visited, key_edges


class _Shares(NamedTuple):
    """The shares of the gradient of a bias, ``[shares, B, H, L, S]``, which are added up afterwards."""

    ptr: Any
    stride_share: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


@triton.jit(
    do_not_specialize=[*RUN_TIME, "steps", "shares", "own_heads", "own_m", "own_n", "sum_heads", "sum_m", "sum_n"]
)
def _attention_bias_bwd_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, d_bias, rules, dropout, d_weights,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    steps, shares, own_heads, own_m, own_n, sum_heads, sum_m, sum_n,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
):  # fmt: skip
    """One share of one tile of the bias's gradient. ``own_...`` counts the bias's heads and tiles, ``sum_...`` what is
    summed over; one of the two is 1. SUM_M, SUM_N: the tile is a single row, a single column.

    Packed sequences stand in the place of batch entries, as long as the bias is, or all of them together where it
    broadcasts; tiles past their ends are passed by.
    """
    pid = tl.program_id(0).to(tl.int64)
    share = pid % shares
    tile_n = pid // shares % own_n
    tile_m = pid // shares // own_n % own_m
    own_head = pid // shares // own_n // own_m % own_heads
    own_batch = pid // shares // own_n // own_m // own_heads
    packing = Packing(offsets, sequences, longest_q, longest_k, bottom_right)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(steps * share // shares, steps * (share + 1) // shares):
        # an axis is either owned or summed over: one of the two terms is 0, here and in the next three lines
        col_tile = tile_n + step % sum_n
        row_tile = tile_m + step // sum_n % sum_m
        head = (own_head + step // sum_n // sum_m % sum_heads).to(tl.int64)
        batch = (own_batch + step // sum_n // sum_m // sum_heads).to(tl.int64)
        at = At(batch, head)
        row_start = (row_tile * BLOCK_M).to(tl.int32)
        col_start = (col_tile * BLOCK_N).to(tl.int32)
        span = span_of(batch, Sizes(seqlen_q, seqlen_k, lower, upper, shift), packing)
        sizes = span.sizes
        is_seen = is_visited(col_tile, key_edges(row_start, at, sizes, rules, BLOCK_M, BLOCK_N))
        if sequences is not None:
            is_seen &= row_start < sizes.seqlen_q
        if is_seen:
            first_row, first_key = span.first_row, span.first_key
            row_end, key_end = sizes.seqlen_q, sizes.seqlen_k
            row = row_start + tl.arange(0, BLOCK_M)
            rows = row[:, None]
            cols = col_start + tl.arange(0, BLOCK_N)[None, :]
            batch_head = batch * heads + head
            head_q, head_k = head_of(query, batch, head, first_row), head_of(key, batch, head // group, first_key)
            head_do, head_v = head_of(d_output, batch, head, first_row), head_of(value, batch, head // group, first_key)
            q = load_tile(head_q, row_start, row_end, BLOCK_M, BLOCK_D, HEAD_DIM, True)
            k = load_tile(head_k, col_start, key_end, BLOCK_N, BLOCK_D, HEAD_DIM, True)
            do = load_tile(head_do, row_start, row_end, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
            v = load_tile(head_v, col_start, key_end, BLOCK_N, BLOCK_DV, VALUE_DIM, True)
            rows_of = line_of(batch_head, at, first_row, span.all_rows, 1)
            statistics_of = line_of(batch_head, at, first_row, span.all_rows, 2)
            row_max, inverse_sum = load_statistics(statistics_ptr + statistics_of, row, row_end, span.all_rows)
            delta = tl.load(delta_ptr + rows_of + row, mask=row < row_end, other=0.0)
            qk = product(
                q, head_q, row_start, row_end, k, head_k, col_start, key_end, BLOCK_M, BLOCK_N, BLOCK_D, HEAD_DIM,
                PRECISION, 128,
            )  # fmt: skip
            scores = softcapped_scores(qk, scale * LOG2_E, rules)
            p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, True)
            factor = None
            if dropout is not None:
                factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
            dp = product(
                do, head_do, row_start, row_end, v, head_v, col_start, key_end, BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM,
                PRECISION, 128,
            )  # fmt: skip
            total += score_gradient(p, factor, dp, delta[:, None], rows, cols, at, sizes, rules, d_weights, True)

    d_bias_ptr = d_bias.ptr + (share * d_bias.stride_share + own_batch * d_bias.stride_b + own_head * d_bias.stride_h)
    if SUM_M:
        total = tl.sum(total, 0)[None, :]
        rows = tl.zeros([1, 1], tl.int64)
    else:
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    if SUM_N:
        total = tl.sum(total, 1)[:, None]
        cols = tl.zeros([1, 1], tl.int64)
    else:
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    if sequences is None:
        inside = (rows < (1 if SUM_M else seqlen_q)) & (cols < (1 if SUM_N else seqlen_k))
    else:
        inside = (rows < (1 if SUM_M else longest_q)) & (cols < (1 if SUM_N else longest_k))
    ptrs = d_bias_ptr + rows * d_bias.stride_m + cols * d_bias.stride_n
    tl.store(ptrs, total.to(d_bias_ptr.dtype.element_ty), mask=inside)


def launch_attention_bias_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    config: Config | None = None,
) -> Tensor:
    """The gradient of ``problem.bias``, in its shape and dtype."""
    query, key, value, bias = problem.query, problem.key, problem.value, problem.bias
    assert bias is not None
    heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    batch, (seqlen_q, seqlen_k) = problem.entries, problem.longest
    wanted = (batch, heads, seqlen_q, seqlen_k)
    if delta.numel() == 0 or 0 in wanted:
        return bias.new_zeros(bias.shape)
    load = problem.load(d_weights)
    config = config or bias_config(query.device, query.dtype, head_dim, value_dim, load)
    whole = (batch, heads, triton.cdiv(seqlen_q, config.block_m), triton.cdiv(seqlen_k, config.block_n))
    # an axis of length 1 may count as owned or as summed over: there is one tile of it in either case
    sums = [1 if have == want else n for have, want, n in zip(bias.shape, wanted, whole)]
    owned = [n // s for n, s in zip(whole, sums)]
    programs = owned[0] * owned[1] * owned[2] * owned[3]
    steps = sums[0] * sums[1] * sums[2] * sums[3]
    shares = int(max(1, min(steps, 2 * multiprocessors(query.device) // programs)))
    partial = torch.empty(
        (shares, *bias.shape), dtype=bias.dtype if shares == 1 else torch.float32, device=query.device
    )
    launch(
        _attention_bias_bwd_kernel, (programs * shares,), query,
        strided(Heads, query), strided(Heads, key), strided(Heads, value), strided(Heads, d_output), statistics,
        delta, _Shares(partial, *partial.stride()), problem.rules(), problem.dropout(),
        weights_argument(d_weights), *problem.sizes(), problem.scale,
        steps, shares, *owned[1:], *sums[1:], *problem.packing(),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
        PRECISION=dot_precision(query.dtype), SUM_M=bias.shape[2] != seqlen_q, SUM_N=bias.shape[3] != seqlen_k,
        **config.launch_options(),
    )  # fmt: skip
    return partial[0] if shares == 1 else partial.sum(0).to(bias.dtype)
