"""Softmax attention as it is written in the textbooks, every intermediate made. Differentiable to any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")


class AttentionResult(NamedTuple):
    """What attention gives: the output, the weights that made it, and the log of the softmax denominators."""

    output: Tensor  # [B, H, L, Dv]
    weights: Tensor  # [B, H, L, S], after dropout
    lse: Tensor  # [B, H, L], natural log, sinks included; -inf for a row that may see nothing and has no sink


def visibility(
    seqlen_q: int,
    seqlen_k: int,
    *,
    lower: int | None = None,
    upper: int | None = None,
    prefix: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Boolean ``[B | 1, H | 1, L, S]``: may query ``i`` see key ``j``?

    Args:
        seqlen_q: ``L``.
        seqlen_k: ``S``.
        lower: query ``i`` sees keys ``j >= i + lower`` (the word of ``torch.triu``); None: from the first.
        upper: query ``i`` sees keys ``j <= i + upper`` (the word of ``torch.tril``); None: to the last.
        prefix: integer ``[B | 1]``: so many keys, the first ones, are seen in spite of ``lower`` and ``upper``.
        mask: boolean, broadcastable to ``[B, H, L, S]``, True where the key may be seen.
        key_padding_mask: boolean ``[B, S]``, True where the key is padding that nobody may see.
        query_documents: integer ``[B | 1, L]``, with ``key_documents``: a query sees keys of its own document.
        key_documents: integer ``[B | 1, S]``.
        device: where to build it.
    """
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if lower is not None:
        visible = visible.triu(lower)
    if upper is not None:
        visible = visible.tril(upper)
    visible = visible[None, None]
    if prefix is not None:
        visible = visible | (torch.arange(seqlen_k, device=device) < prefix[:, None, None, None])
    if mask is not None:
        visible = visible & mask
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
    if query_documents is not None and key_documents is not None:
        visible = visible & (query_documents[:, None, :, None] == key_documents[:, None, None, :])
    return visible


def distances(seqlen_q: int, seqlen_k: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Integer ``[L, S]``: how far key ``j`` is from query ``i``, which stands at key position ``i + shift``."""
    positions = torch.arange(seqlen_q, device=device) + shift
    return (positions[:, None] - torch.arange(seqlen_k, device=device)).abs()


def _places(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Batch entries, heads, query indices and key indices as ``score_mod`` and ``mask_mod`` get them."""
    sizes = (*query.shape[:3], key.shape[2])
    shapes = [[-1 if axis == own else 1 for axis in range(4)] for own in range(4)]
    numbers = (torch.arange(size, dtype=torch.int32, device=query.device) for size in sizes)
    return tuple(number.view(shape) for number, shape in zip(numbers, shapes))


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    prefix: Tensor | None = None,
    lower: int | None = None,
    upper: int | None = None,
    shift: int = 0,
    softcap: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
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
        alibi_slopes: ``[B | 1, H]``: ``-slope * |i + shift - j|`` is added to the scores (arXiv:2108.12409).
        sinks: ``[B | 1, H]``: a score of its own in every row's softmax, without a value (arXiv:2309.17453).
        mask: as in :func:`visibility`, and so are ``key_padding_mask``, ``query_documents``, ``key_documents``,
            ``prefix``, ``lower`` and ``upper``.
        key_padding_mask: boolean ``[B, S]``.
        query_documents: integer ``[B | 1, L]``.
        key_documents: integer ``[B | 1, S]``.
        prefix: integer ``[B | 1]``.
        lower: the first key that query ``i`` sees is ``i + lower``.
        upper: the last key that query ``i`` sees is ``i + upper``.
        shift: query ``i`` stands at key position ``i + shift``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before anything is added (arXiv:2408.00118).
        score_mod: what becomes of the scores before anything is added to them: a function of the scores ``[B, H, L,
            S]`` and of batch entry, head, query index and key index, int32 tensors that broadcast against them
            (FlexAttention, arXiv:2412.05496). A score of ``-inf`` hides the pair.
        mask_mod: a function of the same four, True where the key may be seen.
        scale: multiplies the scores; default ``1/sqrt(D)``.
        dropout_keep: boolean ``[B, H, L, S]``: the weights that dropout keeps; None: all.
        dropout_p: what the kept weights are divided by, as ``1 - dropout_p``.

    Returns:
        :class:`AttentionResult`. A row that may see nothing is zero, its LSE is its sink or ``-inf``, its gradients
        are zero. What nobody may see takes no part, whatever it holds (NaN and inf too): a key that no query may see
        and its value, a query that may see no key, what is added to a hidden pair, and gradients that come in for a
        row that sees nothing or for the weight of a hidden pair.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))

    visible = visibility(
        query.shape[-2],
        key.shape[-2],
        lower=lower,
        upper=upper,
        prefix=prefix,
        mask=mask,
        key_padding_mask=key_padding_mask,
        query_documents=query_documents,
        key_documents=key_documents,
        device=query.device,
    )
    if bias is not None:
        visible = visible & (bias != NEGATIVE_INFINITY)
    places = _places(query, key)
    if mask_mod is not None:
        visible = visible & mask_mod(*places)
    if score_mod is not None:
        with torch.no_grad():
            found = score_mod(_capped(scale * (query @ key.transpose(-2, -1)), softcap), *places)
            visible = visible & (found != NEGATIVE_INFINITY)
    # 0 * NaN is NaN, so what nobody sees has to go before it is multiplied
    row_sees, seen_by_somebody = visible.any(dim=-1, keepdim=True), visible.any(dim=-2)[..., None]
    query = torch.where(row_sees, query, 0)
    key, value = (torch.where(seen_by_somebody, t, 0) for t in (key, value))

    scores = _capped(scale * (query @ key.transpose(-2, -1)), softcap)
    dtype = scores.dtype
    if score_mod is not None:
        scores = score_mod(scores, *places).expand(scores.shape)
    if bias is not None:
        scores = scores + torch.where(visible, bias, 0)  # wider than the scores, it widens them
    if alibi_slopes is not None:
        distance = distances(query.shape[-2], key.shape[-2], shift, query.device)
        scores = scores - alibi_slopes[..., None, None] * distance
    scores = torch.where(visible, scores, NEGATIVE_INFINITY)

    row_has_terms = row_sees
    if sinks is not None:
        column = sinks[..., None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
        row_has_terms = row_has_terms | (column != NEGATIVE_INFINITY)
    scores = torch.where(row_has_terms, scores, 0)  # softmax of an empty row is NaN, and so is its gradient
    weights = torch.where(visible, scores.softmax(dim=-1)[..., : key.shape[-2]], 0)
    lse = torch.where(row_has_terms, scores.logsumexp(dim=-1, keepdim=True), NEGATIVE_INFINITY)

    if dropout_keep is not None:
        weights = weights * dropout_keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
    weights = weights if scores.dtype == dtype else weights.to(dtype)
    return AttentionResult(torch.where(row_sees, weights @ value, 0), weights, lse.squeeze(-1))
