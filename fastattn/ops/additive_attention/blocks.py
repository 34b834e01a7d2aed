"""Additive attention in plain torch, a piece at a time, so that ``[B, L, S, A]`` is never whole.

A block is some rows with all of their keys: of its scores softmax is one call. A piece is some rows of a block whose
tangents, ``tanh(query + key)``, stay in a core's own cache while they are made, multiplied and summed up, all in the
same memory. The backward makes every piece again, so that no tangent is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.additive_attention.contract import (
    InputGradients,
    Inputs,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_gradients,
    empty_results,
)
from fastattn.ops.common.blocks import OF_KEYS, OF_ROWS, SCORES, Axes, Block, statistics_dtype
from fastattn.ops.common.finite import is_finite
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block: scores [b, H, rows, S], or tangents [b, H, rows, S, A] where all of a block are made at once. A
# GPU wants enough of them to be busy.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ON_GPU = 1 << 18, 1 << 24
# Tangents of one piece [b, rows, S, A] on a CPU. 2^18 float32, 1 MiB, stay in a core's own cache: with them a training
# step of 2^22 takes 11.1 ms, with 2^17 11.7, and with 2^16 13.7.
PIECE_ELEMENTS = 1 << 18

_AXES_BY_NAME: dict[str, Axes] = {
    "query": OF_ROWS,
    "key": OF_KEYS,
    "value": OF_KEYS,
    "weight": (None,),
    "bias": SCORES,
    "mask": SCORES,
    "key_padding_mask": ("batch", "keys"),
}
INPUT_AXES = tuple(_AXES_BY_NAME[name] for name in Inputs._fields)


# -------------------------------------------------------------------------------------------------- cutting into blocks


def block_elements(device: torch.device) -> int:
    """How many elements a block has at most, unless a single row has more."""
    return BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS_ON_GPU


def blocks(inputs: Inputs, options: Options, of_pair: int | None = None) -> Iterator[Block]:
    """Whole batch entries together while they fit a block, else some rows of one; keys that causality hides from all
    rows of a block are left out, and so are blocks that see none. A pair of query and key has so many elements, by
    default as many as tangents."""
    (batch, heads, length, size), keys = inputs.query.shape, inputs.key.shape[2]
    of_row = heads * keys * (size if of_pair is None else of_pair)
    if not of_row * length:
        return
    most = block_elements(inputs.query.device)
    entries = max(1, most // (of_row * length))
    rows = max(1, min(length, most // of_row))
    for entry in range(0, batch, entries):
        for row in range(0, length, rows):
            end = min(row + rows, length)
            seen = keys if options.upper is None else min(keys, end + options.upper)
            if seen > 0:
                yield Block(slice(entry, min(entry + entries, batch)), slice(row, end), slice(0, seen))


def cut(block: Block, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """The call that a block is by itself."""
    own: list[Any] = [None if t is None else block.of(t, axes) for t, axes in zip(inputs, INPUT_AXES)]
    upper = None if options.upper is None else options.upper + block.rows.start
    return Inputs(*own), options._replace(upper=upper)


# ----------------------------------------------------------------------------------------------------- one block's work


class _Grid(NamedTuple):
    """The queries and keys of a block by the weight that scores them: all heads together that share one."""

    query: Tensor  # [W, G, n, A], where W weights are each for G sequences
    key: Tensor  # [W, G, s, A]
    weight: Tensor  # [W, A]
    upper: int | None

    def pieces(self, *of_rows: Tensor) -> Iterator[tuple[int, int, Tensor, list[Tensor]]]:
        """The tangents ``[g, r, t, A]`` of one piece after the other, in the same memory, and what tensors
        ``[W, G, n, ...]`` have for its rows: ``(weight, first sequence, tangents, parts)``. The piece's keys are the
        first ``t``; causality hides the rest from its rows.
        """
        (weights, groups, length, size), keys = self.query.shape, self.key.shape[2]
        on_cpu = self.query.device.type == "cpu"
        most = PIECE_ELEMENTS * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_ON_GPU
        together, rows = max(1, most // (length * keys * size)), max(1, min(length, most // (keys * size)))
        memory = self.query.new_empty(min(together, groups), rows, keys, size)
        for weight in range(weights):
            groups_of = [t[weight].split(together) for t in (self.key.unsqueeze(2), self.query.unsqueeze(3), *of_rows)]
            for number, (key, *group) in enumerate(zip(*groups_of)):
                row = 0
                for query, *parts in zip(*(t.split(rows, dim=1) for t in group)):
                    row += query.shape[1]
                    seen = keys if self.upper is None else min(keys, row + self.upper)
                    if seen > 0:
                        shape = (query.shape[0], query.shape[1], seen, size)
                        whole = memory.shape == shape  # as most are: a comparison takes less time than two views
                        tangents = memory if whole else memory.view(-1)[: math.prod(shape)].view(shape)
                        torch.add(query, key if seen == keys else key[:, :, :seen], out=tangents).tanh_()
                        yield weight, number * together, tangents, parts

    def by_weight(self, tensor: Tensor) -> Tensor:
        """``[b, H, ...]`` as ``[W, G, ...]``."""
        return tensor.flatten(0, 1)[None] if self.query.shape[0] == 1 else tensor.transpose(0, 1)

    def by_head(self, tensor: Tensor, heads: int) -> Tensor:
        """``[W, G, ...]`` as ``[b, H, ...]``."""
        return tensor[0].unflatten(0, (-1, heads)) if self.query.shape[0] == 1 else tensor.transpose(0, 1)


def _grid(own: Inputs, options: Options) -> _Grid:
    dtype = statistics_dtype(own.query.dtype)
    shared = own.weight.shape[0] == 1 or own.query.shape[1] == 1
    query, key = (t.flatten(0, 1)[None] if shared else t.transpose(0, 1) for t in (own.query, own.key))
    return _Grid(query.to(dtype), key.to(dtype), own.weight.to(dtype), options.upper)


def _visible(own: Inputs, options: Options) -> Tensor | None:
    """Boolean ``[b | 1, H | 1, n, s]``; None where every row sees every key."""
    if own.bias is None and own.mask is None and own.key_padding_mask is None and options.upper is None:
        return None
    visible = visibility(
        own.query.shape[2],
        own.key.shape[2],
        upper=options.upper,
        mask=own.mask,
        key_padding_mask=own.key_padding_mask,
        device=own.query.device,
    )
    if own.bias is None:
        return visible
    # Compared in the dtype in which it is added: a bias that is finite in float64 may be -inf in the scores' dtype.
    return visible & (own.bias.to(statistics_dtype(own.query.dtype)) != NEGATIVE_INFINITY)


def _weights(own: Inputs, grid: _Grid, visible: Tensor | None) -> Tensor:
    """Softmax of the scores, ``[b, H, n, s]``; 0 in rows that see nothing."""
    found = grid.query.new_empty((*grid.query.shape[:3], grid.key.shape[2]))
    for weight, _, tangents, (part,) in grid.pieces(found):
        if part.is_contiguous() and tangents.shape[2] == part.shape[2]:
            torch.mv(tangents.view(-1, tangents.shape[3]), grid.weight[weight], out=part.view(-1))
        else:
            part[..., : tangents.shape[2]] = tangents @ grid.weight[weight]
    scores = grid.by_head(found, own.query.shape[1])
    if own.bias is not None:
        scores = scores + own.bias.to(scores.dtype)
    if visible is None:
        return torch.softmax(scores, dim=-1)
    p = torch.softmax(scores.masked_fill_(~visible, NEGATIVE_INFINITY), dim=-1)
    return p.masked_fill_(~visible.any(dim=-1, keepdim=True), 0)


def _is_finite(own: Inputs) -> bool:
    """Are query and key known to be finite? On a CPU alone, where it takes no synchronisation to know."""
    return own.query.device.type == "cpu" and is_finite(own.query, own.key)


def _without_unseen(value: Tensor, visible: Tensor | None) -> Tensor:
    """The values, zero where no row of the block sees them: 0 * NaN is NaN."""
    return value if visible is None else torch.where(visible.any(dim=-2)[..., None], value, 0)


def _through_tangents(grid: _Grid, ds: Tensor, is_finite: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a block's queries, keys and weights from those of its scores, ``[W, G, n, s]``."""
    of_rows, of_keys, of_weights = (torch.zeros_like(t) for t in (grid.query, grid.key, grid.weight))
    for weight, first, tangents, (part, d_rows) in grid.pieces(ds, of_rows):
        part = part[..., : tangents.shape[2]]
        if not is_finite:
            tangents.nan_to_num_(nan=0.0)  # of a hidden NaN; at a visible NaN dS is NaN already
        of_weights[weight].addmv_(tangents.view(-1, tangents.shape[3]).mT, part.reshape(-1))
        slopes = part.unsqueeze(3).expand_as(tangents)
        torch.ops.aten.tanh_backward.grad_input(slopes, tangents, grad_input=tangents)
        torch.sum(tangents, dim=2, out=d_rows)
        of_keys[weight, first : first + len(tangents), : tangents.shape[2]].add_(tangents.sum(dim=1))
    scale = grid.weight[:, None, None, :]
    return of_rows.mul_(scale), of_keys.mul_(scale), of_weights


# -------------------------------------------------------------------------------------------------------- the operators


def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::additive_forward``."""
    # Autocast would narrow what is cast up to float32 here, and what is written into given memory has no gradients.
    with torch.autocast(inputs.query.device.type, enabled=False), torch.no_grad():
        return _forward(inputs, options)


def _forward(inputs: Inputs, options: Options) -> Results:
    results = output, weights, _ = empty_results(inputs, options)
    for result in (output, weights):
        result.zero_()  # for what no block writes
    dtype = statistics_dtype(inputs.query.dtype)
    for block in blocks(inputs, options, of_pair=1):
        own, rules = cut(block, inputs, options)
        visible = _visible(own, rules)
        p = _weights(own, _grid(own, rules), visible)
        block.of(output, OF_ROWS).copy_(p @ _without_unseen(own.value.to(dtype), visible))
        if options.needs_weights:
            block.of(weights, SCORES).copy_(p)
    return results


def backward(
    gradients: OutputGradients, kept: Results, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients:
    """The contract of ``fastattn::additive_backward``. Every block is made again, but for weights that were kept."""
    with torch.autocast(inputs.query.device.type, enabled=False), torch.no_grad():
        return _backward(gradients, kept.weights, needs, inputs, options)


def _backward(
    gradients: OutputGradients, weights: Tensor, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients:
    d_output, d_weights = gradients
    dtype = statistics_dtype(inputs.query.dtype)
    is_kept = options.needs_weights and weights.dtype == dtype
    heads = inputs.query.shape[1]
    found = empty_gradients(inputs, needs)
    totals = d_query, d_key, d_value, d_weight, d_bias = [
        t.zero_() if t.dtype == dtype else torch.zeros_like(t, dtype=torch.promote_types(t.dtype, dtype)) for t in found
    ]
    for block in blocks(inputs, options, of_pair=1):
        own, rules = cut(block, inputs, options)
        visible, grid = _visible(own, rules), _grid(own, rules)
        p = block.of(weights, SCORES) if is_kept else _weights(own, grid, visible)
        d_rows = block.of(d_output, OF_ROWS).to(dtype)
        if visible is not None:  # the gradient of a row that sees nothing may be NaN, and counts for nothing
            d_rows = d_rows.masked_fill(~visible.any(dim=-1, keepdim=True), 0)
        block.of(d_value, OF_KEYS).add_(p.mT @ d_rows)
        dp = d_rows @ _without_unseen(own.value.to(dtype), visible).mT
        if d_weights is not None:
            dp = dp + block.of(d_weights, SCORES)
        if visible is not None:  # NaN or inf in the gradient, or in a value that other rows see, at a hidden pair
            dp = dp.masked_fill(~visible, 0)
        ds = torch._softmax_backward_data(dp, p, -1, dtype)
        if visible is not None:
            ds = ds.masked_fill_(~visible, 0)  # NaN in the whole row where the mean of its dP is NaN
        if needs.needs_d_bias and inputs.bias is not None:
            of_bias = block.of(d_bias, SCORES)
            of_bias += ds.sum_to_size(of_bias.shape)
        of_rows, of_keys, of_weights = _through_tangents(grid, grid.by_weight(ds), visible is None or _is_finite(own))
        block.of(d_query, OF_ROWS).add_(grid.by_head(of_rows, heads))
        block.of(d_key, OF_KEYS).add_(grid.by_head(of_keys, heads))
        d_weight += of_weights
    for gradient, total in zip(found, totals):
        if gradient is not total:
            gradient.copy_(total)
    return found
