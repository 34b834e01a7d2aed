"""Attention in plain torch, a block of rows at a time, so that the [B, H, L, S] intermediates are never whole.

The torch backend's answer where ``F.scaled_dot_product_attention`` has none: weights, the LSE, and their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops._autograd import Inputs, Options, empty_in_order_of, statistics_dtype, weights_shape
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block of scores. 2^20 float32 (4 MiB) stay in the outer caches between the products.
_BLOCK_ELEMENTS = 1 << 20


class _Block(NamedTuple):
    batch: slice
    rows: slice


def _blocks(query: Tensor, key: Tensor) -> Iterator[_Block]:
    """Whole batch entries together while they fit a block, else the rows of one entry in turn."""
    batch, heads, length = query.shape[:3]
    row_elements = max(1, heads * key.shape[2])
    entries = max(1, _BLOCK_ELEMENTS // max(1, row_elements * length))
    rows = length if entries > 1 else max(1, min(length, _BLOCK_ELEMENTS // row_elements))
    for b in range(0, batch, entries):
        for i in range(0, length, max(1, rows)):
            yield _Block(slice(b, min(b + entries, batch)), slice(i, min(i + rows, length)))


def _cut(tensor: Tensor | None, block: _Block) -> Tensor | None:
    """The block of a ``[B | 1, H | 1, L | 1, ...]`` tensor; broadcast axes stay."""
    if tensor is None:
        return None
    if tensor.shape[0] != 1:
        tensor = tensor[block.batch]
    return tensor if tensor.shape[2] == 1 else tensor[:, :, block.rows]


def _scores(query: Tensor, key: Tensor, block: _Block, inputs: Inputs, options: Options) -> Tensor:
    """Scores of a block, ``-inf`` where the row may not see the key."""
    scores = torch.matmul(query * options.scale, key.mT)
    bias = _cut(inputs.bias, block)
    if bias is not None:
        scores = torch.where(bias == NEGATIVE_INFINITY, NEGATIVE_INFINITY, scores + bias)
    if options.diagonal is not None or inputs.mask is not None or inputs.key_padding_mask is not None:
        padding = inputs.key_padding_mask
        visible = visibility(
            scores.shape[2],
            scores.shape[3],
            diagonal=None if options.diagonal is None else options.diagonal + block.rows.start,
            mask=_cut(inputs.mask, block),
            key_padding_mask=None if padding is None else padding[block.batch],
            device=scores.device,
        )
        scores = scores.masked_fill_(~visible, NEGATIVE_INFINITY)
    return scores


def _without_unseen(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Key and value with what must not be read set to zero: 0 * NaN would be NaN. Only where there is any such."""
    key, value = inputs.key, inputs.value
    if inputs.key_padding_mask is None and inputs.mask is None and inputs.bias is None and options.diagonal is None:
        return key, value
    if bool(torch.isfinite(key.sum() + value.sum())):
        return key, value
    visible = visibility(
        inputs.query.shape[2],
        key.shape[2],
        diagonal=options.diagonal,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        device=key.device,
    )
    if inputs.bias is not None:
        visible = visible & (inputs.bias != NEGATIVE_INFINITY)
    seen = visible.any(dim=-2)  # [B | 1, H | 1, S]
    if seen.shape[1] not in (1, key.shape[1]):
        seen = seen.unflatten(1, (key.shape[1], -1)).any(dim=2)
    return torch.where(seen[..., None], key, 0), torch.where(seen[..., None], value, 0)


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """Key or value with one head a query head: a view for equal heads, else repeated within the block."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _keep_scale(options: Options) -> float:
    return 1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else 0.0


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B, H, L, S]``: here the dropout state itself."""
    assert inputs.dropout_state is not None
    return inputs.dropout_state


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """``(output, lse, weights)``; the contract of ``fastattn::attention_forward``."""
    query, heads = inputs.query, inputs.query.shape[1]
    statistics = statistics_dtype(query.dtype)
    key, value = _without_unseen(inputs, options)
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=statistics)
    weights = query.new_empty(weights_shape(query, key, options.weights))
    for block in _blocks(query, key):
        block_key, block_value = (_grouped(t[block.batch], heads) for t in (key, value))
        scores = _scores(query[block.batch, :, block.rows], block_key, block, inputs, options)
        block_lse = torch.logsumexp(scores.to(statistics), dim=-1, keepdim=True)
        p = _probabilities(scores, block_lse)
        if inputs.dropout_state is not None:
            p = p * inputs.dropout_state[block.batch, :, block.rows] * _keep_scale(options)
        output[block.batch, :, block.rows] = torch.matmul(p, block_value)
        lse[block.batch, :, block.rows] = block_lse.squeeze(-1)
        if options.weights == "average":
            weights[block.batch, block.rows] = p.mean(dim=1)
        elif options.weights == "heads":
            weights[block.batch, :, block.rows] = p
    return output, lse, weights


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)`` in the scores' dtype, overwriting them; rows that see nothing are zero."""
    pivot = torch.where(lse == NEGATIVE_INFINITY, 0, lse)
    if scores.dtype == lse.dtype:
        return scores.sub_(pivot).exp_()
    return (scores.to(lse.dtype) - pivot).exp_().to(scores.dtype)


def backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    output: Tensor,
    lse: Tensor,
    needs_d_bias: bool,
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dbias or empty)``; the contract of ``fastattn::attention_backward``."""
    d_output, d_lse, d_weights = gradients
    query, heads = inputs.query, inputs.query.shape[1]
    key, value = _without_unseen(inputs, options)
    d_query = empty_in_order_of(query, tuple(query.shape))
    d_key, d_value = (empty_in_order_of(t, tuple(t.shape)).zero_() for t in (inputs.key, inputs.value))
    d_bias = torch.zeros_like(inputs.bias) if needs_d_bias and inputs.bias is not None else query.new_empty(0)
    for block in _blocks(query, key):
        block_query, d_block = query[block.batch, :, block.rows], d_output[block.batch, :, block.rows]
        block_key, block_value = (_grouped(t[block.batch], heads) for t in (key, value))
        scores = _scores(block_query, block_key, block, inputs, options)
        p = _probabilities(scores, lse[block.batch, :, block.rows, None])
        dp = torch.matmul(d_block, block_value.mT)
        if d_weights is not None:
            if options.weights == "average":
                dp += d_weights[block.batch, None, block.rows] / heads
            else:
                dp += d_weights[block.batch, :, block.rows]
        dropped = p
        if inputs.dropout_state is not None:
            keep = inputs.dropout_state[block.batch, :, block.rows] * _keep_scale(options)
            dropped, dp = p * keep, dp * keep
        _add_by_group(d_value[block.batch], torch.matmul(dropped.mT, d_block))
        row_mean = (p * dp).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            row_mean = row_mean - d_lse[block.batch, :, block.rows, None].to(row_mean.dtype)
        ds = dp.sub_(row_mean).mul_(p)
        if needs_d_bias:
            d_bias_block = _cut(d_bias, block)
            assert d_bias_block is not None
            d_bias_block += ds.sum_to_size(d_bias_block.shape)
        d_query[block.batch, :, block.rows] = torch.matmul(ds, block_key).mul_(options.scale)
        _add_by_group(d_key[block.batch], torch.matmul(ds.mT, block_query).mul_(options.scale))
    return d_query, d_key, d_value, d_bias


def _add_by_group(total: Tensor, per_query_head: Tensor) -> None:
    """Add ``[B, H, S, D]`` to ``[B, Hk, S, D]`` in place, summing the query heads of each group."""
    if total.shape[1] != per_query_head.shape[1]:
        per_query_head = per_query_head.unflatten(1, (total.shape[1], -1)).sum(dim=2)
    total += per_query_head
