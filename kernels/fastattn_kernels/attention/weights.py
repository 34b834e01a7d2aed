"""The weights themselves, averaged over heads or one set a head, and what their gradient needs, from rows' statistics.

Averaged weights are summed over heads inside the tile: memory O(B L S) and never O(B H L S), in a fixed order. Their
gradient enters the backward as an addition to dP (``common.scores``) and to delta (here).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.config import weights_config
from fastattn_kernels.common.arguments import RUN_TIME, At, Dropout, Heads, Pairs, Sizes, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.dropout import dropout_factor, dropout_keep
from fastattn_kernels.common.gradients import WeightsGradient
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import in_unit, pair_pointers
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import load_weights_gradient, probabilities, softcapped_scores
from fastattn_kernels.common.tiles import head_of, is_off, load_statistics, load_tile
from fastattn_kernels.common.visits import count_visits, is_visited, key_edges, visited_whole_or_in_part


@triton.jit
def _weights(
    q, k, row_max, inverse_sum, unit, rows, cols, at, batch_head, sizes, rules, dropout, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of weights after dropout, ``[M, N]``."""
    scores = softcapped_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), unit, rules)
    p = probabilities(scores, row_max[:, None], inverse_sum[:, None], rows, cols, at, sizes, rules, True)
    if dropout is not None:
        p *= dropout_factor(rows, cols, batch_head, dropout)
    return p


@triton.jit(do_not_specialize=[*RUN_TIME, "heads_per_program"])
def _attention_weights_kernel(
    query, key, statistics_ptr, weights, rules, dropout,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, heads_per_program,
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
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    edges = key_edges(row_start, At(batch, first_head.to(tl.int64)), sizes, rules, BLOCK_M, BLOCK_N)
    # a tile that nothing can see runs no head
    first = tl.where(is_visited(col_start // BLOCK_N, edges), first_head, first_head + heads_per_program)
    for head in tl.range(first, first_head + heads_per_program):
        head64 = tl.cast(head, tl.int64)
        batch_head = (batch * heads + head).to(tl.int32)
        q = load_tile(head_of(query, batch, head64), row_start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
        k = load_tile(head_of(key, batch, head64 // group), col_start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        row_max, inverse_sum = load_statistics(statistics_ptr + 2 * batch_head.to(tl.int64) * seqlen_q, row, seqlen_q)
        total += _weights(
            q, k, row_max, inverse_sum, in_unit(scale, rules), rows, cols, At(batch, head64), batch_head, sizes, rules,
            dropout, PRECISION,
        )  # fmt: skip
    ptrs = pair_pointers(weights, At(batch, first_head.to(tl.int64)), rows, cols)
    inside = (rows < seqlen_q) & (cols < seqlen_k)
    tl.store(ptrs, (total / heads_per_program).to(weights.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_weights_delta_kernel(
    query, key, statistics_ptr, delta_ptr, rules, dropout, d_weights,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    only_if=None,
):  # fmt: skip
    """``delta += rowsum(dW * W)``: the returned weights' part of the mean that softmax's gradient subtracts."""
    if only_if is not None:
        if is_off(only_if):
            return
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles_m
    row_start = (tiles_m - 1 - tl.program_id(0) % tiles_m) * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    at = At(batch, head)
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    row = row_start + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    rows_of = batch_head.to(tl.int64) * seqlen_q
    key = head_of(key, batch, head // group)
    q = load_tile(head_of(query, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_D, HEAD_DIM, True)
    row_max, inverse_sum = load_statistics(statistics_ptr + 2 * rows_of, row, seqlen_q)
    delta = tl.load(delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
    edges = key_edges(row_start, at, sizes, rules, BLOCK_M, BLOCK_N)
    full, partial = count_visits(edges, None)
    for position in tl.range(0, full + partial):
        start = visited_whole_or_in_part(position, full, edges, None, 0) * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(key, start, seqlen_k, BLOCK_N, BLOCK_D, HEAD_DIM, True)
        p = _weights(
            q, k, row_max, inverse_sum, in_unit(scale, rules), rows, cols, at, batch_head, sizes, rules, dropout,
            PRECISION,
        )  # fmt: skip
        dw = load_weights_gradient(d_weights, rows, cols, at, sizes)
        delta += tl.sum(tl.where(p == 0.0, 0.0, p * dw), 1)
    tl.store(delta_ptr + rows_of + row, delta, mask=row < seqlen_q)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k"])
def _dropout_keep_kernel(keep_ptr, dropout, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights dropout keeps, written out as bytes: for tests and for second derivatives."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    batch_head = pid // tiles_n // tiles_m
    rows = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    keep = dropout_keep(rows, cols, batch_head, dropout)
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
    launch(
        _attention_weights_kernel, (tiles * batch * (1 if average else heads),), query,
        strided(Heads, query), strided(Heads, key), statistics, Pairs(weights, *strides), problem.rules(),
        problem.dropout(), *problem.sizes(), problem.scale, heads if average else 1,
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
    launch(
        _attention_weights_delta_kernel, (triton.cdiv(seqlen_q, config.block_m) * batch * heads,), query,
        strided(Heads, query), strided(Heads, key), statistics, delta, problem.rules(), problem.dropout(),
        d_weights.argument(), *problem.sizes(), problem.scale,
        HEAD_DIM=head_dim, BLOCK_D=head_block(head_dim),
        PRECISION=dot_precision(query.dtype), only_if=d_weights.only_if_used(), **config.launch_options(),
    )  # fmt: skip


def launch_dropout_keep(seed: Tensor, dropout_p: float, keep: Tensor) -> None:
    """Write into ``keep``, boolean ``[B, H, L, S]`` contiguous, which weights dropout keeps."""
    if keep.numel() == 0:
        return
    batch, heads, seqlen_q, seqlen_k = keep.shape
    block = 32
    grid = triton.cdiv(seqlen_q, block) * triton.cdiv(seqlen_k, block) * batch * heads
    launch(
        _dropout_keep_kernel,
        (grid,),
        keep,
        keep.view(torch.uint8),
        Dropout(seed, dropout_p),
        seqlen_q,
        seqlen_k,
        BLOCK_M=block,
        BLOCK_N=block,
    )
