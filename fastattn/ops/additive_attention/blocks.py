"""Additive attention in plain torch, a block of rows at a time, so that ``[B, L, S, A]`` is never whole.

A block has all keys of its rows, so that softmax is one call. The backward makes each block again, so that only the
inputs are kept for it. Products of a block with vectors are matrix products; every other pass goes over it in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block [b, H, rows, S, A]. 2^18 float32, 1 MiB, stay in a core's own cache from pass to pass (2^20 took
# 1.15 times as long); a GPU wants enough of them to be busy.
BLOCK_ELEMENTS, BLOCK_ELEMENTS_ON_GPU = 1 << 18, 1 << 24

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


def blocks(inputs: Inputs, options: Options) -> Iterator[Block]:
    """Whole batch entries together while they fit a block, else some rows of one; keys that causality hides from all
    rows of a block are left out, and so are blocks that see none."""
    (batch, heads, length, size), keys = inputs.query.shape, inputs.key.shape[2]
    of_row = heads * keys * size
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


def _bent(own: Inputs, dtype: torch.dtype) -> Tensor:
    """``tanh(query + key)``, ``[H, b, n, s, A]``: heads first, so that a head's product with its weight is one."""
    query, key = (t.to(dtype).transpose(0, 1) for t in (own.query, own.key))
    return (query[..., :, None, :] + key[..., None, :, :]).tanh_()


def _flat(own: Inputs, bent: Tensor) -> tuple[Tensor, Tensor]:
    """``bent`` as ``[H, b * n * s, A]`` and the weight as ``[H, A, 1]``."""
    weight = own.weight.to(bent.dtype).expand(bent.shape[0], -1)
    return bent.flatten(1, 3), weight[..., None]


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


def _weights(own: Inputs, bent: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax of the scores, ``[b, H, n, s]``; 0 in rows that see nothing."""
    scores = torch.bmm(*_flat(own, bent)).view(bent.shape[:-1]).transpose(0, 1)
    if own.bias is not None:
        scores = scores + own.bias.to(scores.dtype)
    if visible is None:
        return torch.softmax(scores, dim=-1)
    p = torch.softmax(scores.masked_fill(~visible, NEGATIVE_INFINITY), dim=-1)
    return p.masked_fill_(~visible.any(dim=-1, keepdim=True), 0)


def _without_unseen(value: Tensor, visible: Tensor | None) -> Tensor:
    """The values, zero where no row of the block sees them: 0 * NaN is NaN."""
    return value if visible is None else torch.where(visible.any(dim=-2)[..., None], value, 0)


# -------------------------------------------------------------------------------------------------------- the operators


def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::additive_forward``."""
    with torch.autocast(inputs.query.device.type, enabled=False):  # it would narrow what is cast up to float32 here
        return _forward(inputs, options)


def _forward(inputs: Inputs, options: Options) -> Results:
    results = output, weights, _ = empty_results(inputs, options)
    for result in (output, weights):
        result.zero_()  # for what no block writes
    dtype = statistics_dtype(inputs.query.dtype)
    for block in blocks(inputs, options):
        own, rules = cut(block, inputs, options)
        visible = _visible(own, rules)
        p = _weights(own, _bent(own, dtype), visible)
        block.of(output, OF_ROWS).copy_(p @ _without_unseen(own.value.to(dtype), visible))
        if options.needs_weights:
            block.of(weights, SCORES).copy_(p)
    return results


def backward(
    gradients: OutputGradients, kept: Results, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients:
    """The contract of ``fastattn::additive_backward``. Every block is made again, so that nothing kept is read."""
    with torch.autocast(inputs.query.device.type, enabled=False):
        return _backward(gradients, needs, inputs, options)


def _backward(gradients: OutputGradients, needs: Needs, inputs: Inputs, options: Options) -> InputGradients:
    d_output, d_weights = gradients
    dtype = statistics_dtype(inputs.query.dtype)
    heads = inputs.query.shape[1]
    tensors = (inputs.query, inputs.key, inputs.value)
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=dtype) for t in tensors)
    d_weight = inputs.weight.new_zeros((heads, inputs.weight.shape[1]), dtype=dtype)
    d_bias = None
    if needs.needs_d_bias and inputs.bias is not None:
        d_bias = inputs.bias.new_zeros(inputs.bias.shape, dtype=torch.promote_types(inputs.bias.dtype, dtype))
    for block in blocks(inputs, options):
        own, rules = cut(block, inputs, options)
        visible, bent = _visible(own, rules), _bent(own, dtype)
        p = _weights(own, bent, visible)
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
            bent = bent.nan_to_num_(nan=0.0)  # tanh of a hidden NaN; at a visible NaN dS is NaN already
        if d_bias is not None:
            of_bias = block.of(d_bias, SCORES)
            of_bias += ds.sum_to_size(of_bias.shape)
        ds = ds.transpose(0, 1)  # heads first
        flat, weight = _flat(own, bent)
        d_weight += torch.bmm(ds.reshape(heads, 1, -1), flat)[:, 0]
        slopes = torch.ops.aten.tanh_backward.grad_input(ds[..., None].expand_as(bent), bent, grad_input=bent)
        of_rows, of_keys = (slopes.sum(dim=dim).mul_(weight.view(heads, 1, 1, -1)) for dim in (3, 2))
        block.of(d_query, OF_ROWS).add_(of_rows.transpose(0, 1))
        block.of(d_key, OF_KEYS).add_(of_keys.transpose(0, 1))
    found = empty_gradients(inputs, needs)
    totals = (d_query, d_key, d_value, d_weight.sum_to_size(inputs.weight.shape), d_bias)
    for gradient, total in zip(found, totals):
        if total is not None:
            gradient.copy_(total)
    return found
