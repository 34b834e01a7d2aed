"""Backward in one pass: the programs that own dK and dV also add their share of dQ, by atomics, to a float32 workspace.

Five matrix products instead of the two passes' seven; but each tile of dQ goes through the L2 cache once for every tile
of keys, and its sums are rounded in the order in which programs come to it: no two runs need agree in the last bit. The
two passes of ``backward`` are therefore the default.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.backward import launch_careful_bwd
from fastattn_kernels.attention.backward_dkdv import launch_dkdv
from fastattn_kernels.attention.config import one_pass_config
from fastattn_kernels.common.arguments import Heads, strided
from fastattn_kernels.common.config import Config, head_block
from fastattn_kernels.common.delta import Delta, tensor_of
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import empty_gradient_marks, rows_not_finite
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap
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


def one_pass_refusals(problem: Problem, *, needs_alibi_slopes: bool) -> list[str]:
    """Why the backward of a problem cannot be done in one pass; nothing where it can.

    Args:
        problem: the call's inputs.
        needs_alibi_slopes: whether the gradient of ``problem.alibi_slopes`` is asked for.
    """
    refusals = []
    for name, tensor in (("head_dim", problem.query), ("value_dim", problem.value)):
        if tensor.shape[3] > MOST_COLUMNS:
            refusals.append(f"{name}={tensor.shape[3]}: one pass supports at most {MOST_COLUMNS}")
    if needs_alibi_slopes and problem.alibi_slopes is not None:
        refusals.append("the gradient of alibi_slopes sums over a row's keys, and one pass holds a tile of keys")
    if torch.are_deterministic_algorithms_enabled():
        refusals.append("torch.use_deterministic_algorithms is on, and one pass adds to dQ by atomics")
    return refusals


def launch_attention_bwd_one_pass(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    config: Config | None = None,
) -> None:
    """What ``backward.launch_attention_bwd`` writes, but for the gradient of ALiBi slopes, and not the same to the last
    bit twice."""
    query, d_query = problem.query, gradients.d_query
    batch, heads, seqlen_q, head_dim = query.shape
    value_dim = problem.value.shape[3]
    config = config or one_pass_config(query.device, query.dtype, head_dim, value_dim, problem.load(d_weights))
    sums = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    marks = empty_gradient_marks(problem)
    upstream = problem, d_output, statistics, tensor_of(delta), d_weights
    lists = None if tile_map is None else tile_map.of_keys(config)
    launch_dkdv(*upstream, gradients, marks.of_keys, lists, config, dq_sums=sums)
    if d_query.numel():
        launch(
            _finish_dq_kernel, (triton.cdiv(seqlen_q, _FINISHED_ROWS) * batch * heads,), query,
            strided(Heads, d_query), sums, marks.of_rows, heads, seqlen_q, problem.scale,
            HEAD_DIM=head_dim, BLOCK_D=head_block(head_dim), BLOCK_M=_FINISHED_ROWS,
        )  # fmt: skip
    if problem.masks_pairs():
        launch_careful_bwd(*upstream, gradients, marks)
