"""Softmax attention as it is written in the textbooks, every intermediate made. Differentiable to any order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")


class AttentionResult(NamedTuple):
    """What attention gives: the output, the weights that made it, and the log of the softmax denominators."""

    output: Tensor  # [B, H, L, Dv]
    weights: Tensor  # [B, H, L, S], after dropout
    lse: Tensor  # [B, H, L], natural log; -inf for a row that may see nothing


def visibility(
    seqlen_q: int,
    seqlen_k: int,
    *,
    diagonal: int | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Boolean ``[B | 1, H | 1, L, S]``: may query ``i`` see key ``j``?

    Args:
        seqlen_q: ``L``.
        seqlen_k: ``S``.
        diagonal: query ``i`` sees keys ``j <= i + diagonal`` (the word of ``torch.tril``); None: every key.
        mask: boolean, broadcastable to ``[B, H, L, S]``, True where the key may be seen.
        key_padding_mask: boolean ``[B, S]``, True where the key is padding that nobody may see.
        device: where to build it.
    """
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if diagonal is not None:
        visible = visible.tril(diagonal)
    visible = visible[None, None]
    if mask is not None:
        visible = visible & mask
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
    return visible


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    diagonal: int | None = None,
    scale: float | None = None,
    dropout_keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> AttentionResult:
    """``softmax(scale * Q K^T + bias, over what may be seen) V`` (arXiv:1706.03762, section 3.2).

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, Hk, S, D]``; ``Hk`` divides ``H``, and query head ``h`` reads head ``h // (H // Hk)``.
        value: ``[B, Hk, S, Dv]``.
        bias: added to the scaled scores, broadcastable to ``[B, H, L, S]``; ``-inf`` forbids.
        mask: boolean, broadcastable to ``[B, H, L, S]``, True where the key may be seen.
        key_padding_mask: boolean ``[B, S]``, True where the key is padding.
        diagonal: query ``i`` sees keys ``j <= i + diagonal``; None: every key.
        scale: multiplies the scores; default ``1/sqrt(D)``.
        dropout_keep: boolean ``[B, H, L, S]``: the weights that dropout keeps; None: all.
        dropout_p: what the kept weights are divided by, as ``1 - dropout_p``.

    Returns:
        :class:`AttentionResult`. A row that may see nothing is zero, its LSE is ``-inf``, its gradients are zero.
        A key that no query may see takes no part, whatever it and its value hold (NaN and inf too).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))

    visible = visibility(
        query.shape[-2],
        key.shape[-2],
        diagonal=diagonal,
        mask=mask,
        key_padding_mask=key_padding_mask,
        device=query.device,
    )
    if bias is not None:
        visible = visible & (bias != NEGATIVE_INFINITY)
    seen_by_somebody = visible.any(dim=-2)[..., None]  # 0 * NaN is NaN, so what nobody sees has to go before it
    key, value = (torch.where(seen_by_somebody, t, 0) for t in (key, value))

    scores = scale * (query @ key.mT)
    if bias is not None:
        scores = scores + torch.where(visible, bias, 0)
    scores = torch.where(visible, scores, NEGATIVE_INFINITY)

    row_sees_something = visible.any(dim=-1, keepdim=True)
    scores = torch.where(row_sees_something, scores, 0)  # softmax of an empty row is NaN, and so is its gradient
    weights = torch.where(row_sees_something, scores.softmax(dim=-1), 0)
    lse = torch.where(row_sees_something, scores.logsumexp(dim=-1, keepdim=True), NEGATIVE_INFINITY)

    if dropout_keep is not None:
        weights = weights * dropout_keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
    return AttentionResult(weights @ value, weights, lse.squeeze(-1))
