"""Additive attention as it was first written down, every intermediate made. Differentiable to any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.reference.attention import NEGATIVE_INFINITY, visibility


class AdditiveResult(NamedTuple):
    """What additive attention gives: the output, and the weights that made it."""

    output: Tensor  # [B, H, L, Dv]
    weights: Tensor  # [B, H, L, S]


def additive_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """``score(i, j) = sum_a weight_a tanh(query_ia + key_ja)``, ``[B, H, L, S]``."""
    return (torch.tanh(query[..., :, None, :] + key[..., None, :, :]) * weight[:, None, None, :]).sum(dim=-1)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    upper: int | None = None,
) -> AdditiveResult:
    """``softmax(w . tanh(query + key), over what may be seen) V`` (arXiv:1409.0473, appendix A.1.2).

    Args:
        query: ``[B, H, L, A]``, projected already, and so is the key.
        key: ``[B, H, S, A]``.
        value: ``[B, H, S, Dv]``.
        weight: ``[H, A]``, or ``[1, A]`` for all heads.
        bias: added to the scores, broadcastable to ``[B, H, L, S]``; ``-inf`` forbids.
        mask: boolean, broadcastable to ``[B, H, L, S]``, True where the key may be seen.
        key_padding_mask: boolean ``[B, S]``, True where the key is padding that nobody may see.
        upper: query ``i`` sees keys ``j <= i + upper`` (causality: 0); None: to the last.

    Returns:
        :class:`AdditiveResult`. A row that may see nothing is zero, and so are its gradients. A key that no query may
        see takes no part, whatever it and its value hold (NaN and inf too).
    """
    visible = visibility(
        query.shape[-2],
        key.shape[-2],
        upper=upper,
        mask=mask,
        key_padding_mask=key_padding_mask,
        device=query.device,
    )
    if bias is not None:
        bias = bias.to(query.dtype)  # first: what is finite in float64 may be -inf in the dtype of the scores
        visible = visible & (bias != NEGATIVE_INFINITY)
    seen_by_somebody = visible.any(dim=-2)[..., None]  # 0 * NaN is NaN, so what nobody sees has to go before it
    key, value = (torch.where(seen_by_somebody, t, 0) for t in (key, value))
    scores = additive_scores(query, key, weight)
    if bias is not None:
        scores = scores + torch.where(visible, bias, 0)
    row_has_terms = visible.any(dim=-1, keepdim=True)
    # softmax of an empty row is NaN, and so is its gradient
    scores = torch.where(row_has_terms, torch.where(visible, scores, NEGATIVE_INFINITY), 0)
    weights = torch.where(row_has_terms, scores.softmax(dim=-1), 0)
    return AdditiveResult(weights @ value, weights)
