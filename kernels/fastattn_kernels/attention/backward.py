"""Backward in two passes without atomics, bitwise deterministic: a program owns a tile of dK and dV, or one of dQ.

Both recompute P from each row's statistics (arXiv:2307.08691, algorithm 2); the workspace is delta, O(L). The pass of
dQ comes first: it computes delta, which the other one reads. Where something is hidden, one careful launch comes last.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.attention.backward_call import BackwardCall, constants_of, inputs_of
from fastattn_kernels.attention.backward_dkdv import grad_of_tile_of_keys, launch_dkdv
from fastattn_kernels.attention.backward_dq import grad_of_tile_of_queries, launch_dq
from fastattn_kernels.attention.config import BackwardConfig, backward_config, careful_config
from fastattn_kernels.common.arguments import RUN_TIME, Blocks, Heads, OnlyIf, Sizes, TileLists, strided
from fastattn_kernels.common.delta import Delta, tensor_of
from fastattn_kernels.common.gradients import Gradients, WeightsGradient, weights_argument
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.marks import GradientMarks, empty_gradient_marks, few_programs, is_marked, tiles_to_look_at
from fastattn_kernels.common.packed import Packing, count_tiles, find_tile, is_somebodys
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap
from fastattn_kernels.common.tiles import is_off


@triton.jit(do_not_specialize=[*RUN_TIME, "row_tiles", "key_tiles"])
def _attention_bwd_careful_kernel(
    query, key, value, d_output, statistics_ptr, delta_ptr, d_query, d_key, d_value, d_alibi_slopes_ptr,
    marks_of_rows_ptr, marks_of_keys_ptr, rules, dropout, d_weights,
    heads, group, seqlen_q, seqlen_k, lower, upper, shift, scale, row_tiles, key_tiles,
    offsets, sequences, longest_q, longest_k, bottom_right,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr, only_if=None,
):  # fmt: skip
    """Of the program's share of tiles, those that hold a mark: dQ of tiles of rows, then dK and dV of tiles of keys.

    Careful loops in the kernels of the gradients themselves, as the forward has them, made the loop of dK and dV 12 %
    longer at head size 128 (600 instructions instead of 534 on sm_90), and spilled 48 to 88 bytes.
    """
    if only_if is not None:
        if is_off(only_if):
            return
    call = BackwardCall(
        query, key, value, d_output, statistics_ptr, delta_ptr, dropout, d_weights, TileLists(None, 0, 0), heads, group,
        scale,
    )  # fmt: skip
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    packing = Packing(offsets, sequences, longest_q, longest_k, bottom_right)
    query_offsets_ptr, key_offsets_ptr = None, None
    if sequences is not None:
        query_offsets_ptr, key_offsets_ptr = offsets.query_ptr, offsets.key_ptr
    tiles_m = count_tiles(seqlen_q, sequences, BLOCK_M)
    first, last = tiles_to_look_at(marks_of_rows_ptr, row_tiles, seqlen_q, BLOCK_M, query_offsets_ptr, sequences)
    for tile in tl.range(first, last):
        if is_marked(marks_of_rows_ptr, tile, seqlen_q, BLOCK_M, query_offsets_ptr, sequences):
            row_tile, span = find_tile(tile % tiles_m, sizes, packing, BLOCK_M, True)
            if is_somebodys(row_tile, span):
                grad_of_tile_of_queries(
                    tile // tiles_m, row_tile, span, call, rules, None, None, d_query, d_alibi_slopes_ptr, None,
                    Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, CAREFUL),
                )  # fmt: skip
    tiles_n = count_tiles(seqlen_k, sequences, BLOCK_N)
    first, last = tiles_to_look_at(marks_of_keys_ptr, key_tiles, seqlen_k, BLOCK_N, key_offsets_ptr, sequences)
    for tile in tl.range(first, last):
        if is_marked(marks_of_keys_ptr, tile, seqlen_k, BLOCK_N, key_offsets_ptr, sequences):
            col_tile, span = find_tile(tile % tiles_n, sizes, packing, BLOCK_N, False)
            if is_somebodys(col_tile, span):
                grad_of_tile_of_keys(
                    tile // tiles_n, col_tile, span, call, rules, d_key, d_value, None, None,
                    Blocks(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HEAD_DIM, VALUE_DIM, PRECISION, CAREFUL),
                )  # fmt: skip


def launch_attention_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    config: BackwardConfig | None = None,
    only_if: OnlyIf | None = None,
) -> None:
    """Write all gradients: dQ, then dK and dV; where the problem hides keys, tiles that are not finite a second time.

    Args:
        problem: the call's inputs.
        d_output: ``[B, H, L, Dv]``, any strides.
        statistics: the forward's.
        delta: ``[B, H, L]``, with what the returned weights add to it; or, where they add nothing, a :class:`Delta`,
            which the pass of dQ computes if it has not been computed yet.
        d_weights: the gradient of the returned weights; None: zero.
        gradients: what is written.
        tile_map: of the problem; None: arithmetic says which tiles are visited.
        config: the tiles; None: those that ``backward_config`` chooses.
        only_if: where the device finds otherwise, nothing is written; see ``WeightsGradient.only_if_used``.
    """
    query = problem.query
    sizes = query.shape[3], problem.value.shape[3]
    config = config or backward_config(query.device, query.dtype, *sizes, problem.load(d_weights))
    marks = empty_gradient_marks(problem)
    lists_of_rows, lists_of_keys = None, None
    if tile_map is not None:
        lists_of_rows, lists_of_keys = tile_map.of_rows_and_keys(config.dq, config.dkdv)
    launch_dq(problem, d_output, statistics, delta, d_weights, gradients, marks, lists_of_rows, config.dq, only_if)
    upstream = problem, d_output, statistics, tensor_of(delta), d_weights
    launch_dkdv(*upstream, gradients, marks.of_keys, lists_of_keys, config.dkdv, only_if)
    if problem.masks_pairs():
        launch_careful_bwd(*upstream, gradients, marks, only_if)


def launch_careful_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    marks: GradientMarks,
    only_if: OnlyIf | None = None,
) -> None:
    """Compute again, with ``0 * NaN = 0 * inf = 0``, the tiles of gradients of which a row is marked. This follows the
    launches of any kernels, of this module or another, on a problem that masks pairs."""
    query = problem.query
    config = careful_config(query.dtype, query.shape[3], problem.value.shape[3])
    row_tiles = problem.tiles_of_rows(config.block_m) * bool(gradients.d_query.numel())
    key_tiles = problem.tiles_of_keys(config.block_n) * bool(gradients.d_key.numel() or gradients.d_value.numel())
    if row_tiles or key_tiles:
        launch(
            _attention_bwd_careful_kernel, (few_programs(max(row_tiles, key_tiles), query.device),), query,
            *inputs_of(problem, d_output, statistics, delta), strided(Heads, gradients.d_query),
            strided(Heads, gradients.d_key), strided(Heads, gradients.d_value), gradients.d_alibi_slopes,
            marks.of_rows, marks.of_keys, problem.rules(), problem.dropout(), weights_argument(d_weights),
            *problem.sizes(), problem.scale, row_tiles, key_tiles, *problem.packing(), CAREFUL=True, only_if=only_if,
            **constants_of(problem, config),
        )  # fmt: skip
