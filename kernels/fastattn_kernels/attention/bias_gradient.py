"""Gradients of what scores are made of beside products: sums over exactly the axes along which it broadcasts.

Of an additive mask they are sums of dS. Of a number that a user's function of scores reads they are sums of what a
derivative of that function makes of dS, over the axes by which the function does not address it.

A program owns one tile of the gradient and recomputes dS for every batch entry, head and tile of scores that fall on
it, in a fixed order: nothing is expanded, nothing is added by atomics. Where a gradient is so small that few programs
would own it, several programs share a tile, and their sums are added up afterwards, again in a fixed order.
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
from fastattn_kernels.common.masking import in_unit
from fastattn_kernels.common.packed import Packing, line_of, span_of
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import probabilities, score_gradient, softcapped_scores, through_function
from fastattn_kernels.common.tiles import head_of, load_statistics, load_tile, product
from fastattn_kernels.common.visits import is_visited, key_edges


class _Shares(NamedTuple):
    """The shares of a gradient, ``[shares, B, H, L, S]``, which are added up afterwards."""

    ptr: Any
    stride_share: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


@triton.jit(
    do_not_specialize=[
        *RUN_TIME, "first", "end", "steps", "shares", "own_heads", "own_m", "own_n", "sum_heads", "sum_m", "sum_n",
    ]
)  # fmt: skip
def _attention_bias_bwd_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, gradient, rules, dropout, d_weights, first, end,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    steps, shares, own_heads, own_m, own_n, sum_heads, sum_m, sum_n,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    DERIVATIVE: tl.constexpr,
):  # fmt: skip
    """One share of one tile of the gradient. ``own_...`` counts the gradient's heads and tiles, ``sum_...`` what is
    summed over; one of the two is 1. SUM_M, SUM_N: the tile is a single row, a single column. DERIVATIVE: what makes of
    dS what is summed; None: nothing does. Only the rows from ``first`` to before ``end`` count, unless these are None.

    Packed sequences stand in the place of batch entries, as long as the gradient is, or all of them together where it
    has no axis of them; tiles past their ends are passed by.
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
        if first is not None:
            row_start += first
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
            scores = softcapped_scores(qk, in_unit(scale, rules), rules)
            p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, True)
            factor = None
            if dropout is not None:
                factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
            dp = product(
                do, head_do, row_start, row_end, v, head_v, col_start, key_end, BLOCK_M, BLOCK_N, BLOCK_DV, VALUE_DIM,
                PRECISION, 128,
            )  # fmt: skip
            ds = score_gradient(p, factor, dp, delta[:, None], rows, cols, at, sizes, rules, d_weights, True)
            if DERIVATIVE is not None:
                ds = through_function(DERIVATIVE, ds, scores, rows, cols, at, sizes, rules)
            if end is not None:
                ds = tl.where(rows < end, ds, 0.0)
            total += ds

    of_share = share * gradient.stride_share + own_batch * gradient.stride_b + own_head * gradient.stride_h
    gradient_ptr = gradient.ptr + of_share
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
    all_rows, all_cols = seqlen_q, seqlen_k
    if sequences is not None:
        all_rows, all_cols = longest_q, longest_k
    if end is not None:
        all_rows = end - first
    inside = (rows < (1 if SUM_M else all_rows)) & (cols < (1 if SUM_N else all_cols))
    ptrs = gradient_ptr + rows * gradient.stride_m + cols * gradient.stride_n
    tl.store(ptrs, total.to(gradient_ptr.dtype.element_ty), mask=inside)


def launch_attention_bias_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    config: Config | None = None,
) -> Tensor:
    """The gradient of ``problem.bias``, in its shape and dtype."""
    bias = problem.bias
    assert bias is not None
    saved = problem, d_output, statistics, delta, d_weights
    return _launch(*saved, tuple(bias.shape), bias.dtype, None, None, config)


def launch_attention_captured_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    partial: Any,
    footprint: tuple[bool, bool, bool, bool],
    rows: tuple[int, int] | None = None,
    config: Config | None = None,
) -> Tensor:
    """The gradient of one of the numbers that ``problem.score_mod`` reads, for each pair or each of those with which it
    is the same number.

    Args:
        problem: the call's inputs.
        d_output: ``[B, H, L, Dv]``, any strides.
        statistics: the forward's.
        delta: ``[B, H, L]``, with what the returned weights add to it.
        d_weights: the gradient of the returned weights; None: zero.
        partial: a function of Triton with the arguments of ``functions.Modifier.gradient``, that returns the gradient
            of the number from that of the score behind the function.
        footprint: whether the number depends on the batch entry, the head, the query, the key; over the other axes the
            gradients are summed.
        rows: the first row that counts, and the one behind the last; None: all of them. In packed sequences rows are
            counted within each.
        config: the tile; None: the one that ``bias_config`` chooses.

    Returns:
        Contiguous float32 ``[B | 1, H | 1, rows | 1, S | 1]``; of packed sequences ``[N | 1, H | 1, rows | 1,
        keys of the longest | 1]``, with zeros past the ends of each.
    """
    first, end = (0, problem.longest[0]) if rows is None else rows
    wanted = (problem.entries, problem.query.shape[1], end - first, problem.longest[1])
    shape = tuple(size if has else 1 for size, has in zip(wanted, footprint))
    saved = problem, d_output, statistics, delta, d_weights
    return _launch(*saved, shape, torch.float32, rows, partial, config)


def _launch(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: tuple[int, int] | None,
    derivative: Any,
    config: Config | None,
) -> Tensor:
    """A gradient of this shape and dtype: of all rows, or of a range of them."""
    query, key, value = problem.query, problem.key, problem.value
    heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    batch, (seqlen_q, seqlen_k) = problem.entries, problem.longest
    first, end = rows or (None, None)
    if first is not None and end is not None:
        seqlen_q = end - first
    wanted = (batch, heads, seqlen_q, seqlen_k)
    if delta.numel() == 0 or 0 in wanted:
        return torch.zeros(shape, dtype=dtype, device=query.device)
    load = problem.load(d_weights)
    config = config or bias_config(query.device, query.dtype, head_dim, value_dim, load)
    whole = (batch, heads, triton.cdiv(seqlen_q, config.block_m), triton.cdiv(seqlen_k, config.block_n))
    # an axis of length 1 may count as owned or as summed over: there is one tile of it in either case
    sums = [1 if have == want else n for have, want, n in zip(shape, wanted, whole)]
    owned = [n // s for n, s in zip(whole, sums)]
    programs = owned[0] * owned[1] * owned[2] * owned[3]
    steps = sums[0] * sums[1] * sums[2] * sums[3]
    shares = int(max(1, min(steps, 2 * multiprocessors(query.device) // programs)))
    partial = torch.empty((shares, *shape), dtype=dtype if shares == 1 else torch.float32, device=query.device)
    launch(
        _attention_bias_bwd_kernel, (programs * shares,), query,
        strided(Heads, query), strided(Heads, key), strided(Heads, value), strided(Heads, d_output), statistics,
        delta, _Shares(partial, *partial.stride()), problem.rules(), problem.dropout(),
        weights_argument(d_weights), first, end, *problem.sizes(), problem.scale,
        steps, shares, *owned[1:], *sums[1:], *problem.packing(),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
        PRECISION=dot_precision(query.dtype), SUM_M=shape[2] != seqlen_q, SUM_N=shape[3] != seqlen_k,
        DERIVATIVE=derivative, **config.launch_options(),
    )  # fmt: skip
    return partial[0] if shares == 1 else partial.sum(0).to(dtype)
