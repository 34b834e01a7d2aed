"""The torch backend: ``F.scaled_dot_product_attention`` where it can express the call, else blocks of plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import _autograd
from fastattn.ops._call import AttentionCall
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY


def refusals(call: AttentionCall) -> list[str]:
    """Nothing: it runs whatever torch runs."""
    return []


def describe(call: AttentionCall) -> str:
    """Which of the two forms the call takes."""
    if _sdpa_can(call):
        return "F.scaled_dot_product_attention"
    return "plain torch in blocks of rows (weights or LSE are asked for)"


def _sdpa_can(call: AttentionCall) -> bool:
    return call.weights == "none" and not call.return_lse


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``."""
    if _sdpa_can(call):
        return _sdpa(call), None, None
    keep = None
    if call.dropout_p > 0.0:
        # Drawn whole, as nn.MultiheadAttention draws it, so that one seed gives the same dropout in both.
        shape = (*call.query.shape[:3], call.key.shape[2])
        keep = torch.empty(shape, dtype=torch.bool, device=call.query.device).bernoulli_(1.0 - call.dropout_p)
    return _autograd.apply(call, keep, "torch")


def _sdpa(call: AttentionCall) -> Tensor:
    key, value, mask = call.key, call.value, _merged_mask(call)
    if call.key_padding_mask is not None:
        # 0 * NaN is NaN: what lies in the padding must not reach the products.
        padding = call.key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    return F.scaled_dot_product_attention(
        call.query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=call.diagonal == 0 and mask is None,
        scale=call.scale,
        enable_gqa=bool(call.query.shape[1] != call.key.shape[1]),  # torch.jit.trace makes it a tensor
    )


def _merged_mask(call: AttentionCall) -> Tensor | None:
    """One mask for SDPA, or None where there is none or its own ``is_causal`` says all."""
    has_mask = call.mask is not None or call.key_padding_mask is not None
    if call.bias is None and not has_mask and call.diagonal in (None, 0):
        return None
    visible = None
    if has_mask or call.diagonal is not None:
        visible = visibility(
            call.query.shape[2] if call.diagonal is not None else 1,
            call.key.shape[2],
            diagonal=call.diagonal,
            mask=call.mask,
            key_padding_mask=call.key_padding_mask,
            device=call.query.device,
        )
    if call.bias is None:
        return visible
    bias = call.bias.to(call.query.dtype)
    return bias if visible is None else torch.where(visible, bias, NEGATIVE_INFINITY)
