"""Backward of additive attention without atomics, bitwise deterministic.

One launch recomputes the weights from each row's statistics and writes dS, ``[B, H, L, S]`` in float32; with the
weights dV is a matrix product, and with ``t = tanh(q_ia + k_ja)`` the rest is

    dQ_ia = w_a sum_j dS_ij (1 - t^2),   dK_ja = w_a sum_i dS_ij (1 - t^2),   dw_a = sum_ij dS_ij t:

sums over the rows or the columns of dS for every ``a``. One kernel does both, with the roles of queries and keys
exchanged: a program owns a few columns of a tile of dQ (or dK) and goes along dS with those sums in registers. Were dS
not kept, each program would have to make it again, which takes all columns; were all columns in one program, its sums
would not fit into registers and go through memory with every tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.additive_attention.config import (
    AdditiveBackwardConfig,
    ColumnsConfig,
    additive_backward_config,
    has_hardware_tanh,
)
from fastattn_kernels.additive_attention.forward import bend, columns_of, weight_of
from fastattn_kernels.additive_attention.pairs import launch_additive_scores_bwd
from fastattn_kernels.additive_attention.problem import AdditiveProblem, padded
from fastattn_kernels.common.arguments import RUN_TIME, At, Heads, Sizes, TileLists, strided
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.tile_map import TileMap, list_arguments
from fastattn_kernels.common.tiles import head_of
from fastattn_kernels.common.visits import count_visits, key_edges, list_of, row_edges, visited_whole_or_in_part


@triton.jit(do_not_specialize=[*RUN_TIME, "size"])
def _additive_bwd_columns_kernel(
    own, other, weight, ds, d_own, d_weight_ptr, rules,
    tile_lists, lists_per_batch, lists_per_head, heads, group, seqlen_q, seqlen_k, lower, upper, shift, size,
    OWN: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr, OWN_IS_ROWS: tl.constexpr,
    HARDWARE_TANH: tl.constexpr,
):  # fmt: skip
    """CHUNK columns of dQ of one tile of rows, from all keys, or of dK of one tile of keys, from all rows; and, unless
    ``d_weight_ptr`` is None, what the tile adds to these columns of the weight's gradient."""
    sizes = Sizes(seqlen_q, seqlen_k, lower, upper, shift)
    lists = TileLists(tile_lists, lists_per_batch, lists_per_head)
    if OWN_IS_ROWS:
        own_length, other_length = seqlen_q, seqlen_k
    else:
        own_length, other_length = seqlen_k, seqlen_q
    chunks = tl.cdiv(size, CHUNK)
    tiles_own, tiles_other = tl.cdiv(own_length, OWN), tl.cdiv(other_length, OTHER)
    pid = tl.program_id(0)
    first = pid % chunks * CHUNK  # programs that read the same dS run together
    own_tile = pid // chunks % tiles_own
    own_start = own_tile * OWN
    batch_head = pid // chunks // tiles_own
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    at = At(batch, head)
    own, other = columns_of(own, batch, head), columns_of(other, batch, head)
    ds = head_of(ds, batch, head)
    a = first + tl.arange(0, CHUNK)[:, None, None]
    inside = tl.minimum(a, size - 1).to(tl.int64)  # the last column again past the last one, and not stored
    own_ptrs = own.ptr + inside * own.stride + own_start + tl.arange(0, OWN)[None, :, None]
    other_ptrs = other.ptr + inside * other.stride + tl.arange(0, OTHER)[None, None, :]
    own_rows = (own_start + tl.arange(0, OWN)).to(tl.int64)[None, :, None]
    ds_ptrs = ds.ptr + own_rows * ds.stride_row + tl.arange(0, OTHER).to(tl.int64)[None, None, :] * ds.stride_col

    tiles = None
    if lists.ptr is not None:
        tiles = list_of(lists, at, own_tile, tiles_own, tiles_other)
    if OWN_IS_ROWS:
        edges = key_edges(own_start, at, sizes, rules, OWN, OTHER)
    else:
        edges = row_edges(own_start, at, sizes, rules, OTHER, OWN)
    full, partial = count_visits(edges, tiles)
    x = tl.load(own_ptrs).to(tl.float32)  # [CHUNK, OWN, 1]
    # summed over OTHER behind the loop: in it, a tile's sums would take as long as its tangents
    of_own = tl.zeros([CHUNK, OWN, OTHER], tl.float32)
    of_weight = tl.zeros([CHUNK, OWN, OTHER], tl.float32)
    for position in tl.range(0, full + partial):
        start = visited_whole_or_in_part(position, full, edges, tiles, tiles_other) * OTHER
        y = tl.load(other_ptrs + start).to(tl.float32)  # [CHUNK, 1, OTHER]
        s = tl.load(ds_ptrs + tl.cast(start, tl.int64) * ds.stride_col)  # [1, OWN, OTHER]
        t = bend(x + y, HARDWARE_TANH)
        of_own += s * (1.0 - t * t)
        if d_weight_ptr is not None:
            of_weight += s * t

    cols = first + tl.arange(0, CHUNK)
    weight = weight_of(weight, head)
    w = tl.load(weight.ptr + cols.to(tl.int64) * weight.stride, mask=cols < size, other=0.0).to(tl.float32)
    d_own = head_of(d_own, batch, head)
    rows = own_start + tl.arange(0, OWN)
    ptrs = d_own.ptr + rows.to(tl.int64)[None, :] * d_own.stride_row + cols.to(tl.int64)[:, None] * d_own.stride_col
    gradient = (tl.sum(of_own, 2) * w[:, None]).to(d_own.ptr.dtype.element_ty)
    tl.store(ptrs, gradient, mask=(rows < own_length)[None, :] & (cols < size)[:, None])
    if d_weight_ptr is not None:
        part_ptr = d_weight_ptr + (batch_head.to(tl.int64) * tiles_own + own_tile) * size
        tl.store(part_ptr + cols, tl.sum(tl.sum(of_weight, 2), 1), mask=cols < size)


def launch_additive_bwd(
    problem: AdditiveProblem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor,
    weights: Tensor | None,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    config: AdditiveBackwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Write dQ, dK and dV (any strides) from the forward's statistics, delta (the returned weights' part included) and
    the weights, if they are at hand; return the weight's gradient, ``[H, A]``, and dS, ``[B, H, L, S]``, in float32."""
    query, key = problem.query, problem.key
    (batch, heads, seqlen_q, size), seqlen_k = query.shape, key.shape[2]
    shape = (batch, heads, padded(seqlen_q), padded(seqlen_k))  # the second kernel reads without bounds
    d_scores = torch.empty(shape, dtype=torch.float32, device=query.device)
    d_scores_of_pairs = d_scores[:, :, :seqlen_q, :seqlen_k]
    if not d_scores_of_pairs.numel():
        for gradient in (gradients.d_query, gradients.d_key, gradients.d_value):
            gradient.zero_()
        return query.new_zeros(heads, size, dtype=torch.float32), d_scores_of_pairs
    recomputed = None
    if weights is None:
        recomputed = torch.empty(shape, dtype=query.dtype, device=query.device)
        weights = recomputed[:, :, :seqlen_q, :seqlen_k]
    config = config or additive_backward_config(query.device, query.dtype, problem.value.shape[3])
    launch_additive_scores_bwd(problem, d_output, statistics, delta, d_weights, d_scores, recomputed, config.pairs)
    # a row that sees nothing has an inverse sum of 0: what comes in as its gradient, NaN or inf, must reach no value
    seen = statistics[:, :, 1, :, None] != 0
    with torch.autocast(query.device.type, enabled=False):  # that would round a float32 product to 16 bits
        gradients.d_value.copy_(weights.mT @ d_output.where(seen, 0))

    # Where dS is 0, a tangent that is NaN must not count. Where dS is not 0, it is NaN itself and so is the gradient:
    # nothing is lost by making queries and keys finite.
    queries, keys, weight = problem.scored(finite=True)
    parts = query.new_empty(batch, heads, triton.cdiv(seqlen_q, config.queries.own), size, dtype=torch.float32)
    _launch_columns(problem, config.queries, tile_map, True, queries, keys, weight, d_scores, gradients.d_query, parts)
    _launch_columns(problem, config.keys, tile_map, False, keys, queries, weight, d_scores.mT, gradients.d_key, None)
    return parts.sum((0, 2)), d_scores_of_pairs


def _launch_columns(
    problem: AdditiveProblem,
    config: ColumnsConfig,
    tile_map: TileMap | None,
    own_is_rows: bool,
    own: object,
    other: object,
    weight: object,
    d_scores: Tensor,
    d_own: Tensor,
    d_weight: Tensor | None,
) -> None:
    """Write dQ or dK, and the parts of the weight's gradient into ``[B, H, tiles, A]`` unless None."""
    batch, heads, length, size = d_own.shape
    lists = None
    if tile_map is not None:
        lists = tile_map.of_rows(config.tile(True)) if own_is_rows else tile_map.of_keys(config.tile(False))
    programs = triton.cdiv(size, config.chunk) * triton.cdiv(length, config.own) * batch * heads
    launch(
        _additive_bwd_columns_kernel, (programs,), d_own,
        own, other, weight, strided(Heads, d_scores), strided(Heads, d_own), d_weight, problem.rules(),
        *list_arguments(lists), *problem.sizes(), size, OWN_IS_ROWS=own_is_rows,
        HARDWARE_TANH=has_hardware_tanh(d_own.device, d_own.dtype), **config.launch_options(),
    )  # fmt: skip
