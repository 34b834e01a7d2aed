"""Backward in one pass: the programs that own dK and dV also add their share of dQ, by atomics, to a float32 workspace.

Five matrix products instead of the two passes' seven; but each tile of dQ goes through the L2 cache once for every tile
of keys, and its sums are rounded in the order in which programs come to it: no two runs need agree in the last bit. The
two passes of ``backward`` are therefore the default.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.backward import _attention_bwd_dkdv_kernel, empty_gradient_marks, launch_careful_bwd
from fastattn_kernels.attention.config import Config, dot_precision, head_block, one_pass_config
from fastattn_kernels.common.device import device_guard
from fastattn_kernels.common.marks import rows_not_finite
from fastattn_kernels.common.problem import Problem, WeightsGradient, strided
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of, store_tile

# A wider head's dQ, dK and dV do not fit the registers together.
MOST_COLUMNS = 256
# Rows that a program of the finish rounds at once.
_FINISHED_ROWS = 64


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _finish_dq_kernel(
    d_query, sums_ptr, marks_ptr, heads, seqlen_q, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dQ from its sums: scaled, and rounded once; its rows are marked unless ``marks_ptr`` is None."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    row_start = tl.program_id(0) % tiles * BLOCK_M
    row = row_start + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)
    ptrs = sums_ptr + (batch_head * seqlen_q + row)[:, None] * HEAD_DIM + col[None, :]
    dq = tl.load(ptrs, mask=(row < seqlen_q)[:, None] & (col < HEAD_DIM)[None, :], other=0.0) * scale
    d_query = head_of(d_query, batch_head // heads, batch_head % heads)
    store_tile(d_query, row_start, seqlen_q, dq, BLOCK_M, BLOCK_D, HEAD_DIM)
    if marks_ptr is not None:
        tl.store(marks_ptr + batch_head * seqlen_q + row, rows_not_finite(dq), mask=row < seqlen_q)


def one_pass_refusals(problem: Problem, *, needs_slopes: bool) -> list[str]:
    """Why the backward of a problem cannot be done in one pass; nothing where it can.

    Args:
        problem: the call's inputs.
        needs_slopes: whether the gradient of ``problem.slopes`` is asked for.
    """
    refusals = []
    for name, tensor in (("head_dim", problem.query), ("value_dim", problem.value)):
        if tensor.shape[3] > MOST_COLUMNS:
            refusals.append(f"{name}={tensor.shape[3]}: one pass supports at most {MOST_COLUMNS}")
    if needs_slopes and problem.slopes is not None:
        refusals.append("the gradient of alibi_slopes sums over a row's keys, and one pass holds a tile of keys")
    if torch.are_deterministic_algorithms_enabled():
        refusals.append("torch.use_deterministic_algorithms is on, and one pass adds to dQ by atomics")
    return refusals


def launch_attention_bwd_one_pass(
    problem: Problem,
    d_out: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    tile_map: TileMap | None = None,
    config: Config | None = None,
) -> None:
    """What ``launch_attention_bwd`` writes, but for the gradient of slopes, and not the same to the last bit twice."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, seqlen_q, head_dim = query.shape
    kv_heads, seqlen_k, value_dim = key.shape[1], key.shape[2], value.shape[3]
    config = config or one_pass_config(query.device, query.dtype, head_dim, value_dim, problem.load(d_weights))
    sums = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    marks = empty_gradient_marks(problem)
    tiles = int(triton.cdiv(seqlen_k, config.block_n)) * batch * kv_heads
    with device_guard(query):
        if d_key.numel() or d_value.numel():
            _attention_bwd_dkdv_kernel[(tiles,)](
                strided(query), strided(key), strided(value), strided(d_out), statistics, delta,
                strided(d_key), strided(d_value), marks.of_keys,
                problem.rules(), problem.dropout(), None if d_weights is None else d_weights.argument(),
                *list_arguments(tile_map and tile_map.of_keys(config)), *problem.sizes(), problem.scale, tiles,
                HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=head_block(head_dim), BLOCK_DV=head_block(value_dim),
                PRECISION=dot_precision(query.dtype), CAREFUL=False, d_query_ptr=sums, **config.launch_options(),
            )  # fmt: skip
        if d_query.numel():
            _finish_dq_kernel[(triton.cdiv(seqlen_q, _FINISHED_ROWS) * batch * heads,)](
                strided(d_query), sums, marks.of_rows, heads, seqlen_q, problem.scale,
                HEAD_DIM=head_dim, BLOCK_D=head_block(head_dim), BLOCK_M=_FINISHED_ROWS,
            )  # fmt: skip
    if problem.masks_pairs():
        launch_careful_bwd(problem, d_out, statistics, delta, d_weights, d_query, d_key, d_value, marks)
