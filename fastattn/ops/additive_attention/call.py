"""One call of additive attention, checked and put into the form that every backend understands."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common.checks import (
    DTYPES,
    check_attn_mask,
    check_flags,
    check_key_padding_mask,
    shape_of,
    under_autocast,
)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
    """Raise unless these are floating tensors of one dtype, on one device, that fit one another."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:  # jagged ones of unequal lengths make no scores
            raise TypeError(f"{name} is nested or sparse, of layout {tensor.layout}: expected a dense tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: expected float16, bfloat16, float32 or float64")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: expected one dtype for all four")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")
    if query.dim() not in (3, 4):
        raise ValueError(
            f"query has shape {shape_of(query)}: expected [batch, length, size] or [batch, heads, length, size]"
        )
    shapes = f"query {shape_of(query)}, key {shape_of(key)}, value {shape_of(value)}"
    if not query.dim() == key.dim() == value.dim():
        raise ValueError(f"{shapes}: expected as many dimensions in all three")
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        leading = "batch size" if query.dim() == 3 else "batch size and number of heads"
        raise ValueError(f"{shapes}: expected the same {leading} in all three")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{shapes}: expected query and key to have the same size (the last dimension)")
    if query.shape[-1] == 0:
        raise ValueError(f"{shapes}: expected a size (the last dimension) of at least 1")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{shapes}: expected key and value to have the same length (the dimension before the last)")
    size = query.shape[-1]
    accepted = [(size,)] if query.dim() == 3 else [(size,), (query.shape[1], size)]
    if shape_of(weight) not in accepted:
        raise ValueError(f"weight has shape {shape_of(weight)}: expected {' or '.join(map(str, accepted))}")


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    need_weights: bool = False,
    average_attn_weights: bool = True,
) -> AdditiveAttentionCall:
    """Check every argument of :func:`fastattn.additive_attention`; under autocast, cast as attention does."""
    query, key, value, weight = under_autocast(query, key, value, weight)
    check_tensors(query, key, value, weight)
    if query.dim() == 3:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if isinstance(attn_mask, Tensor) and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
    bias = mask = None
    if attn_mask is not None:
        attn_mask = check_attn_mask(attn_mask, query, key)
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, key)
    check_flags(is_causal=is_causal, need_weights=need_weights, average_attn_weights=average_attn_weights)
    if weight.dim() == 1:
        weight = weight.unsqueeze(0)
    upper = 0 if is_causal else None
    return AdditiveAttentionCall(query, key, value, weight, bias, mask, key_padding_mask, upper, need_weights)
