"""Attention in plain torch, a block of rows at a time, so that the [B, H, L, S] intermediates are never whole.

The torch backend's answer where ``F.scaled_dot_product_attention`` has none: weights, the LSE, and their gradients.
On a CPU the matrix products bound it, and the rest is arranged to stay small beside them: query heads that share a key
head are rows of one product; keys that no row of a block may see are left out of it, so that a causal call does about
half the work; what hides the other keys is added, since filling it in takes as long as a product; and booleans are read
as bytes, which torch reduces and converts five to ten times faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops._autograd import Inputs, Options, empty_in_order_of, statistics_dtype, weights_shape
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block of scores. 2^20 float32 (4 MiB) stay in the outer caches between the products.
BLOCK_ELEMENTS = 1 << 20


class _Block(NamedTuple):
    """Some rows of some batch entries, and the keys that they may see at most."""

    batch: slice
    rows: slice
    keys: slice

    def of_scores(self, tensor: Tensor) -> Tensor:
        """This block of a tensor ``[B | 1, H | 1, L | 1, S | 1]``; broadcast axes stay."""
        batch, _, rows, keys = tensor.shape
        if batch != 1:
            tensor = tensor[self.batch]
        if rows != 1:
            tensor = tensor[:, :, self.rows]
        return tensor if keys == 1 else tensor[..., self.keys]


class _Call(NamedTuple):
    """What every block of a call reads."""

    query: Tensor
    key: Tensor  # what nobody may see is zero, here and in value: 0 * NaN would be NaN
    value: Tensor
    bias: Tensor | None
    visible: tuple[Tensor, ...]  # boolean, each broadcasting to the scores; a key is seen where all of them say so
    diagonal: int | None
    finite: bool  # hiding by adding -inf is safe: no score is NaN or inf

    @property
    def hides(self) -> bool:
        """May there be keys that a row does not see?"""
        return self.bias is not None or bool(self.visible) or self.diagonal is not None


def _prepare(inputs: Inputs, options: Options) -> _Call:
    query, key, value = inputs.query, inputs.key, inputs.value
    visible = () if inputs.mask is None else (inputs.mask,)
    if inputs.key_padding_mask is not None:
        visible += (~inputs.key_padding_mask[:, None, None, :],)
    call = _Call(query, key, value, inputs.bias, visible, options.diagonal, finite=True)
    if not call.hides or bool(torch.isfinite(query.sum() + key.sum() + value.sum())):
        return call
    seen = _seen_by_somebody(inputs, options)
    return call._replace(key=torch.where(seen, key, 0), value=torch.where(seen, value, 0), finite=False)


def _seen_by_somebody(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B | 1, Hk | 1, S, 1]``."""
    query, key = inputs.query, inputs.key
    visible = visibility(
        query.shape[2],
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
    return seen[..., None]


# ------------------------------------------------------------------------------------------------- cutting into blocks


def _batches(call: _Call) -> Iterator[slice]:
    """Whole batch entries together while they fit a block, else one at a time."""
    batch, heads, length = call.query.shape[:3]
    elements = heads * length * call.key.shape[2]
    if elements:
        entries = max(1, BLOCK_ELEMENTS // elements)
        yield from (slice(b, min(b + entries, batch)) for b in range(0, batch, entries))


def _blocks(call: _Call, batch: slice) -> Iterator[_Block]:
    """The blocks of some batch entries, without those whose rows see nothing."""
    heads, length = call.query.shape[1:3]
    seqlen_k = call.key.shape[2]
    rows = max(1, min(length, BLOCK_ELEMENTS // (heads * seqlen_k)))
    for i in range(0, length, rows):
        block = _Block(batch, slice(i, min(i + rows, length)), slice(0, seqlen_k))
        stop = _last_key_seen(call, block)
        if stop > 0:
            yield block._replace(keys=slice(0, stop))


def _last_key_seen(call: _Call, block: _Block) -> int:
    """One past the last key that some row of the block may see."""
    stop = block.keys.stop
    if call.diagonal is not None:
        stop = min(stop, block.rows.stop + call.diagonal)
    for visible in call.visible if call.query.device.type == "cpu" else ():  # elsewhere asking costs a synchronisation
        visible = block.of_scores(visible)
        if visible.shape[3] != 1:
            seen = visible.view(torch.uint8).amax((0, 1, 2)).nonzero()
            stop = min(stop, int(seen[-1]) + 1 if len(seen) else 0)
    return stop


def _heads_as_rows(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, n, D]`` as ``[B * Hk, H / Hk * n, D]``: the query heads of one key head under one another."""
    batch, heads, rows, size = tensor.shape
    return _computable(tensor.reshape(batch * kv_heads, heads // kv_heads * rows, size))


def _computable(tensor: Tensor) -> Tensor:
    """In the dtype of the products: float16 ones have no fast path on CPUs (25 times slower than float32)."""
    return tensor.float() if tensor.dtype == torch.float16 and tensor.device.type == "cpu" else tensor


# ----------------------------------------------------------------------------------------------------- one block's work


def _scores(queries: Tensor, keys: Tensor, block: _Block, call: _Call) -> Tensor:
    """``[b, H, n, s]``, ``-inf`` where the row may not see the key; ``queries`` are scaled already."""
    scores = torch.bmm(queries, keys[:, block.keys].mT)
    rows = block.rows.stop - block.rows.start
    scores = scores.view(block.batch.stop - block.batch.start, -1, rows, block.keys.stop)
    if call.bias is not None:
        bias = block.of_scores(call.bias)
        scores.add_(bias)
        if not call.finite:
            scores.masked_fill_(bias == NEGATIVE_INFINITY, NEGATIVE_INFINITY)
    if call.diagonal is not None:
        first = max(0, block.rows.start + call.diagonal + 1)  # the first key that the first row may not see
        if first < block.keys.stop:
            hidden_after = call.diagonal + block.rows.start - first
            above = torch.ones(rows, block.keys.stop - first, dtype=torch.bool, device=scores.device)
            _hide(scores[..., first:], above.tril_(hidden_after), call.finite)
    for visible in call.visible:
        _hide(scores, block.of_scores(visible), call.finite)
    return scores


def _hide(scores: Tensor, visible: Tensor, finite: bool) -> None:
    """Make ``-inf`` what is not visible, in place."""
    if finite:
        # 1 - 1/x maps 1 to 0 and 0 to -inf
        scores.add_(visible.view(torch.uint8).to(scores.dtype).reciprocal_().neg_().add_(1))
    else:
        scores.masked_fill_(~visible, NEGATIVE_INFINITY)


def _dropped(weights: Tensor, inputs: Inputs, block: _Block) -> Tensor:
    """The weights that dropout keeps, not yet scaled up."""
    if inputs.dropout_state is None:
        return weights
    return weights * block.of_scores(inputs.dropout_state).view(torch.uint8)


def _keep_scale(options: Options) -> float:
    return 1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else 0.0


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B, H, L, S]``: here the dropout state itself."""
    assert inputs.dropout_state is not None
    return inputs.dropout_state


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(output, lse, weights, the LSE again)``; the contract of ``fastattn::attention_forward``."""
    call = _prepare(inputs, options)
    query, statistics = call.query, statistics_dtype(call.query.dtype)
    heads, kv_heads = query.shape[1], call.key.shape[1]
    keep_scale = _keep_scale(options)
    output = empty_in_order_of(query, (*query.shape[:3], call.value.shape[3]))
    lse = query.new_full(query.shape[:3], math.nan, dtype=statistics)
    weights = query.new_empty(weights_shape(query, call.key, options.weights))
    if call.hides or not call.key.shape[2]:  # the blocks leave out what nobody sees
        output.zero_(), weights.zero_()
        lse.fill_(NEGATIVE_INFINITY)

    for batch in _batches(call):
        keys, values = (_heads_as_rows(t[batch], kv_heads) for t in (call.key, call.value))
        for block in _blocks(call, batch):
            queries = _heads_as_rows(query[batch, :, block.rows], kv_heads) * options.scale
            scores = _scores(queries, keys, block, call)
            p = torch.softmax(scores, dim=-1)
            top = scores.amax(dim=-1, keepdim=True) if call.hides or options.keeps_statistics else scores[..., :1]
            if call.hides:
                empty = top == NEGATIVE_INFINITY
                if bool(empty.any()):
                    p.masked_fill_(empty, 0)
            if options.keeps_statistics:
                # exp(top - lse) is the row's largest weight, or 0 in a row that sees nothing
                peak = p.amax(dim=-1, keepdim=True)
                block_lse = top.to(statistics) - peak.to(statistics).where(peak > 0, 1).log()
                lse[batch, :, block.rows] = block_lse.squeeze(-1)

            p = _dropped(p, inputs, block)
            rows_out = torch.bmm(p.view(*queries.shape[:2], -1), values[:, block.keys])
            if inputs.dropout_state is not None:
                rows_out *= keep_scale
            output[batch, :, block.rows] = rows_out.view(*p.shape[:3], -1)
            if options.weights == "average":
                weights[batch, block.rows, block.keys] = p.sum(dim=1).mul_(keep_scale / heads)
            elif options.weights == "heads":
                weights[batch, :, block.rows, block.keys] = p if inputs.dropout_state is None else p.mul_(keep_scale)
    return output, lse, weights, lse.clone()  # an operator's outputs may not be one


def backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    output: Tensor,
    lse: Tensor,
    needs_d_bias: bool,
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dbias or empty)``; the contract of ``fastattn::attention_backward``."""
    call = _prepare(inputs, options)
    d_output, d_lse, d_weights = gradients
    query, statistics = call.query, statistics_dtype(call.query.dtype)
    heads, kv_heads = query.shape[1], call.key.shape[1]
    keep_scale = _keep_scale(options)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in inputs[:3])
    if call.hides or not (d_query.numel() and d_key.numel()):
        d_query.zero_(), d_key.zero_(), d_value.zero_()
    d_bias = query.new_empty(0)
    if needs_d_bias and call.bias is not None:
        d_bias = torch.zeros_like(call.bias, dtype=torch.promote_types(call.bias.dtype, statistics))
    # The average's gradient reaches every head, divided; and dropout scales what reaches a kept weight.
    d_weights_scale = keep_scale / heads if options.weights == "average" else keep_scale
    if d_weights is not None and options.weights == "average":
        d_weights = d_weights[:, None]

    for batch in _batches(call):
        keys, values = (_heads_as_rows(t[batch], kv_heads) for t in (call.key, call.value))
        d_keys, d_values = (torch.zeros_like(t, dtype=statistics) for t in (keys, values))
        for block in _blocks(call, batch):
            queries = _heads_as_rows(query[batch, :, block.rows], kv_heads) * options.scale
            d_rows = _heads_as_rows(d_output[batch, :, block.rows], kv_heads)
            if inputs.dropout_state is not None:
                d_rows = d_rows * keep_scale
            p = torch.softmax(_scores(queries, keys, block, call), dim=-1)
            if call.hides:
                empty = lse[batch, :, block.rows, None] == NEGATIVE_INFINITY
                if bool(empty.any()):
                    p.masked_fill_(empty, 0)
            flat = (*queries.shape[:2], p.shape[3])
            _add_product(d_values[:, block.keys], _dropped(p, inputs, block).view(flat).mT, d_rows)

            dp = torch.bmm(d_rows, values[:, block.keys].mT).view(p.shape)
            if d_weights is not None:
                dp.add_(block.of_scores(d_weights), alpha=d_weights_scale)
            ds = torch._softmax_backward_data(_dropped(dp, inputs, block), p, -1, p.dtype)
            if d_lse is not None:
                ds.addcmul_(p, d_lse[batch, :, block.rows, None].to(p.dtype))
            if needs_d_bias:
                d_bias_block = block.of_scores(d_bias)
                d_bias_block += ds.sum_to_size(d_bias_block.shape)
            ds = ds.view(flat)
            d_rows = torch.bmm(ds, keys[:, block.keys]).mul_(options.scale)
            d_query[batch, :, block.rows] = d_rows.view(*p.shape[:3], -1)
            _add_product(d_keys[:, block.keys], ds.mT, queries)
        d_key[batch], d_value[batch] = d_keys.view(d_key[batch].shape), d_values.view(d_value[batch].shape)
    return d_query, d_key, d_value, d_bias.to(call.bias.dtype) if needs_d_bias and call.bias is not None else d_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
