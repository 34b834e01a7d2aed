"""dK and dV of a tile of keys, from all query rows that see it; see ``backward``."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.backward_call import BackwardCall, constants_of, inputs_of
from fastattn_kernels.common.arguments import RUN_TIME, At, Blocks, Heads, OnlyIf, Sizes, TileLists, strided
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.dropout import dropout_factor
from fastattn_kernels.common.gradients import Gradients, WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import rows_not_finite
from fastattn_kernels.common.masking import in_unit
from fastattn_kernels.common.packed import Packing, count_tiles, find_tile, line_of, place_of
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.scores import probabilities, product_gradient, score_gradient, softcapped_scores
from fastattn_kernels.common.tile_map import list_arguments
from fastattn_kernels.common.tiles import head_of, is_off, load_statistics, load_tile, product, store_tile, weighted_sum
from fastattn_kernels.common.visits import count_visits, list_of, row_edges, visited_tile


@triton.jit
def _add_grad_of_queries(dq_sums_ptr, ds, k, row, seqlen_q, blocks):
    """Add ``dS K``, without the scale, to one head's float32 dQ, in whatever order programs come to it."""
    # [M, D]: its transpose, of which wgmma could do tiles of fewer than 64 rows, spills on sm_80 (16 to 400 bytes)
    dq = tl.dot(tl.trans(ds), k, input_precision=blocks.PRECISION)
    col = tl.arange(0, blocks.D)[None, :]
    ptrs = dq_sums_ptr + row.to(tl.int64)[:, None] * blocks.HEAD_DIM + col
    tl.atomic_add(ptrs, dq, mask=(row < seqlen_q)[:, None] & (col < blocks.HEAD_DIM), sem="relaxed")


@triton.jit
def _grad_of_keys(
    dk, dv, k, v, key, value, col_start, batch, kv_head, span, call, rules, dq_sums_ptr, visits, edges, tiles,
    blocks, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what the tiles of rows that see these keys whole (if PARTIAL: in part) give, head after
    head; and to dQ, where there is one to add to, what these keys give.

    One loop over heads and rows: nothing is summed between programs, and two nested loops would spill (96 bytes more on
    sm_90 at head size 128). Tiles are transposed, ``[N, M]``, so that P and dS are left operands in registers.
    """
    sizes, dropout = span.sizes, call.dropout
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    unit = in_unit(call.scale, rules)
    cols = col_start + tl.arange(0, blocks.N)[:, None]
    # The pipeliner computes the first addresses ahead of the loop, also where the loop is empty, and a division by zero
    # there is undefined in LLVM. Any other guard of the division spilled 8 to 40 bytes on sm_90. In the backward in one
    # pass this one spills too (8 bytes at head size 128), so it is left out there: a GPU divides by zero unharmed.
    if dq_sums_ptr is not None or visits > 0:
        for step in tl.range(0, call.group * visits):
            member = step // visits
            tile = visited_tile(step - member * visits, edges, tiles, tl.cdiv(seqlen_q, blocks.M), PARTIAL)
            start = tile * blocks.M
            head = kv_head * call.group + member
            at = At(batch, head)
            batch_head = batch * call.heads + head
            row = start + tl.arange(0, blocks.M)
            rows = row[None, :]
            query = head_of(call.query, batch, head, span.first_row)
            d_output = head_of(call.d_output, batch, head, span.first_row)
            q = load_tile(query, start, seqlen_q, blocks.M, blocks.D, blocks.HEAD_DIM, True)
            do = load_tile(d_output, start, seqlen_q, blocks.M, blocks.DV, blocks.VALUE_DIM, True)
            rows_of = line_of(batch_head, at, span.first_row, span.all_rows, 1)
            statistics_ptr = call.statistics_ptr + line_of(batch_head, at, span.first_row, span.all_rows, 2)
            row_max, inverse_sum = load_statistics(statistics_ptr, row, seqlen_q, span.all_rows)
            delta = tl.load(call.delta_ptr + rows_of + row, mask=row < seqlen_q, other=0.0)
            qk = product(
                k, key, col_start, seqlen_k, q, query, start, seqlen_q, blocks.N, blocks.M, blocks.D, blocks.HEAD_DIM,
                blocks.PRECISION,
                256,  # strips of keys would stay in registers, since the loop does not change them
            )  # fmt: skip
            scores = softcapped_scores(qk, unit, rules)
            p = probabilities(scores, row_max[None, :], inverse_sum[None, :], rows, cols, at, sizes, rules, PARTIAL)
            factor = None
            dropped = p
            if dropout is not None:
                factor = dropout_factor(rows, cols, batch_head.to(tl.int32), dropout)
                dropped = p * factor
            dv = weighted_sum(dropped.to(do.dtype), do, dv, blocks.CAREFUL, blocks.PRECISION)
            dp = product(
                v, value, col_start, seqlen_k, do, d_output, start, seqlen_q, blocks.N, blocks.M, blocks.DV,
                blocks.VALUE_DIM, blocks.PRECISION, 256,
            )  # fmt: skip
            ds = score_gradient(p, factor, dp, delta[None, :], rows, cols, at, sizes, rules, call.d_weights, PARTIAL)
            ds = product_gradient(ds, scores, rows, cols, at, sizes, rules).to(q.dtype)
            dk = weighted_sum(ds, q, dk, blocks.CAREFUL, blocks.PRECISION)
            if dq_sums_ptr is not None:
                _add_grad_of_queries(dq_sums_ptr + rows_of * blocks.HEAD_DIM, ds, k, row, seqlen_q, blocks)
    return dk, dv


@triton.jit
def grad_of_tile_of_keys(entry, col_tile, span, call, rules, d_key, d_value, marks_ptr, dq_sums_ptr, blocks):
    """dK and dV of one tile of keys, from all query rows that see it; a key is marked, unless ``marks_ptr`` is None,
    where one of the two is not finite."""
    sizes = span.sizes
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    kv_heads = call.heads // call.group
    col_start = col_tile * blocks.N
    at, batch_head = place_of(entry, kv_heads, span)
    batch, kv_head = at.batch, at.head
    first_key = span.first_key
    key, value = head_of(call.key, batch, kv_head, first_key), head_of(call.value, batch, kv_head, first_key)
    k = load_tile(key, col_start, seqlen_k, blocks.N, blocks.D, blocks.HEAD_DIM, True)
    v = load_tile(value, col_start, seqlen_k, blocks.N, blocks.DV, blocks.VALUE_DIM, True)

    dk = tl.zeros([blocks.N, blocks.D], tl.float32)
    dv = tl.zeros([blocks.N, blocks.DV], tl.float32)
    tiles = None
    if call.lists.ptr is not None:
        tiles = list_of(call.lists, at, col_tile, tl.cdiv(seqlen_k, blocks.N), tl.cdiv(seqlen_q, blocks.M))
    edges = row_edges(col_start, at, sizes, rules, blocks.M, blocks.N)
    full, partial = count_visits(edges, tiles)
    dk, dv = _grad_of_keys(
        dk, dv, k, v, key, value, col_start, batch, kv_head, span, call, rules, dq_sums_ptr, partial, edges, tiles,
        blocks, True,
    )  # fmt: skip
    dk, dv = _grad_of_keys(
        dk, dv, k, v, key, value, col_start, batch, kv_head, span, call, rules, dq_sums_ptr, full, edges, tiles, blocks,
        False,
    )  # fmt: skip
    dk *= call.scale
    d_key, d_value = head_of(d_key, batch, kv_head, first_key), head_of(d_value, batch, kv_head, first_key)
    store_tile(d_key, col_start, seqlen_k, dk, blocks.N, blocks.D, blocks.HEAD_DIM)
    store_tile(d_value, col_start, seqlen_k, dv, blocks.N, blocks.DV, blocks.VALUE_DIM)
    if marks_ptr is not None:
        col = col_start + tl.arange(0, blocks.N)
        marks = rows_not_finite(dk) | rows_not_finite(dv)
        tl.store(marks_ptr + line_of(batch_head, at, first_key, span.all_keys, 1) + col, marks, mask=col < seqlen_k)


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_dkdv_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, d_key, d_value, marks_ptr, rules, dropout, d_weights,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, dq_sums_ptr=None, only_if=None,
):  # fmt: skip
    """dK and dV of one tile of keys.

    With ``dq_sums_ptr``, to zeros ``[B, H, L, D]``, it is the whole backward in one pass; see ``backward_one_pass``.
    """
    if only_if is not None:
        if is_off(only_if):
            return
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    call = BackwardCall(
        query, key, value, d_output, statistics_ptr, delta_ptr, dropout, d_weights, lists, heads, group, scale
    )
    packing = Packing(offsets, sequences, longest_q, longest_k, bottom_right)
    # under a diagonal the first keys are seen most: longest first
    tiles_n = count_tiles(seqlen_k, sequences, BLOCK_N)
    number = tl.program_id(0) % tiles_n
    col_tile, span = find_tile(number, Sizes(seqlen_q, seqlen_k, lower, upper, shift), packing, BLOCK_N, False)
    if sequences is not None:
        if col_tile < 0:
            return
    grad_of_tile_of_keys(
        tl.program_id(0) // tiles_n, col_tile, span, call, rules, d_key, d_value, marks_ptr, dq_sums_ptr,
        Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, False),
    )  # fmt: skip


def launch_dkdv(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    marks_of_keys: Tensor | None,
    lists: Tensor | None,
    config: Config,
    only_if: OnlyIf | None = None,
    *,
    dq_sums: Tensor | None = None,
) -> None:
    """Write dK, dV and the marks of their keys; and add dQ, without the scale, to ``dq_sums``, contiguous float32
    ``[B, H, L, D]``, unless None."""
    key = problem.key
    if not gradients.d_key.numel() and not gradients.d_value.numel():
        return
    tiles = problem.tiles_of_keys(config.block_n)
    if problem.packed is not None:
        gradients.d_key.zero_()  # of keys in no sequence, or not in use
        gradients.d_value.zero_()
        if not tiles:
            return
    launch(
        _attention_bwd_dkdv_kernel, (tiles,), key,
        *inputs_of(problem, d_output, statistics, delta), strided(Heads, gradients.d_key),
        strided(Heads, gradients.d_value), marks_of_keys,
        problem.rules(), problem.dropout(), weights_argument(d_weights), *list_arguments(lists), *problem.sizes(),
        problem.scale, *problem.packing(), dq_sums_ptr=dq_sums, only_if=only_if, **constants_of(problem, config),
    )  # fmt: skip
