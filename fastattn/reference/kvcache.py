"""Attention over a key/value cache as it is written down: one sequence after the other, one token after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.reference.attention import attention


class KVCacheResult(NamedTuple):
    """What attention over a cache gives, and the caches as they are afterwards."""

    output: Tensor  # [B, H, L, Dv]
    lse: Tensor  # [B, H, L]
    key_cache: Tensor  # a copy, with the new keys in it
    value_cache: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864, equation 34): pairs of features, each turned by its own angle.

    Args:
        x: ``[..., D]``.
        cos: ``[..., R / 2]``, of the angles, broadcastable to ``x`` in front; ``R`` is at most ``D``, and features from
            ``R`` on stay as they are.
        sin: as ``cos``.
        interleaved: a pair is features ``2 i`` and ``2 i + 1``; else ``i`` and ``i + R / 2``.

    Returns:
        ``[..., D]``.
    """
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> KVCacheResult:
    """Attention of the last ``L`` tokens of each sequence to the keys and values that a cache holds of it.

    Query ``i`` stands at slot ``T - L + i`` of its sequence, where ``T`` is the number of tokens held, the new ones
    among them. What no slot in use holds (behind ``T``, in other pages, in padding) takes no part, whatever it is.

    Args:
        query: ``[B, H, L, D]``.
        key_cache: ``[B, Hk, S, D]``, or with a ``block_table`` ``[pages, Hk, page_size, D]``. It is not changed.
        value_cache: the same, ``Dv`` wide.
        key: ``[B, Hk, L, D]``: put into slots ``cache_seqlens`` and following before attention; None: nothing is new.
        value: ``[B, Hk, L, Dv]``, or None with ``key``.
        cache_seqlens: integer ``[B]``: how many tokens of each sequence the cache holds before the call.
        block_table: integer ``[B, pages of a sequence]``: slot ``t`` of sequence ``b`` lies in page
            ``block_table[b, t // page_size]``; entries behind the last slot in use are not read.
        cache_leftpad: integer ``[B]``: so many slots, the first ones, are padding that nobody may see.
        rotary_cos: ``[positions, R / 2]``: of the angles by which :func:`rotate` turns a query and a new key, by the
            slots where they stand. Without ``key`` nothing is turned.
        rotary_sin: as ``rotary_cos``.
        rotary_interleaved: which features are a pair, as in :func:`rotate`.
        attn_mask: boolean (True = may attend) or floating (added to the scores), by slots: broadcastable to ``[B, H, L,
            slots]``.
        is_causal: a query sees no slot behind its own.
        window: ``(left, right)``: how many slots a query sees on each side of its own; None: all of them.
        softcap: as in :func:`attention`, and so are ``sinks`` and ``scale``.
        sinks: ``[H]``.
        alibi_slopes: ``[H]`` or ``[B, H]``: ``-slope * distance`` is added to the scores.
        scale: multiplies the scores; default ``1/sqrt(D)``.

    Returns:
        :class:`KVCacheResult`. A query that sees no slot gives zero.
    """
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    length, page_size = query.shape[2], key_cache.shape[2]
    left, right = (None, None) if window is None else window
    right = 0 if is_causal else right

    def place(sequence: int, slot: int) -> tuple[int, int]:
        """Where in the cache a slot of a sequence lies: an index of dimension 0 and one of dimension 2."""
        if block_table is None:
            return sequence, slot
        return int(block_table[sequence, slot // page_size]), slot % page_size

    outputs, lses = [], []
    for sequence, held in enumerate(cache_seqlens.tolist()):
        queries = query[sequence]  # [H, L, D]
        if key is not None and value is not None:
            for token in range(length):
                new = key[sequence, :, token]
                if rotary_cos is not None and rotary_sin is not None:
                    angles = rotary_cos[held + token], rotary_sin[held + token]
                    new = rotate(new, *angles, interleaved=rotary_interleaved)
                row, slot = place(sequence, held + token)
                key_cache[row, :, slot] = new.to(key_cache.dtype)
                value_cache[row, :, slot] = value[sequence, :, token]
            if rotary_cos is not None and rotary_sin is not None:
                angles = rotary_cos[held : held + length], rotary_sin[held : held + length]
                queries = rotate(queries, *angles, interleaved=rotary_interleaved).to(query.dtype)
            held += length
        start = 0 if cache_leftpad is None else int(cache_leftpad[sequence])
        places = [place(sequence, slot) for slot in range(start, held)]
        keys, values = (
            torch.stack([cache[row, :, slot] for row, slot in places], dim=1) if places else cache[:1, :, :0].squeeze(0)
            for cache in (key_cache, value_cache)
        )
        shift = held - start - length
        slopes = alibi_slopes
        if slopes is not None:
            slopes = slopes[None] if slopes.dim() == 1 else slopes[sequence : sequence + 1]
        bias = mask = None
        if attn_mask is not None:
            of_slots = attn_mask[(None,) * (4 - attn_mask.dim())]
            of_slots = of_slots if len(of_slots) == 1 else of_slots[sequence : sequence + 1]
            of_slots = of_slots if of_slots.shape[3] == 1 else of_slots[..., start:held]
            bias, mask = (None, of_slots) if attn_mask.dtype == torch.bool else (of_slots, None)
        result = attention(
            queries[None],
            keys[None],
            values[None],
            bias=bias,
            mask=mask,
            alibi_slopes=slopes,
            sinks=None if sinks is None else sinks[None],
            lower=None if left is None else shift - left,
            upper=None if right is None else shift + right,
            shift=shift,
            softcap=softcap,
            scale=scale,
        )
        outputs.append(result.output)
        lses.append(result.lse)
    return KVCacheResult(torch.cat(outputs), torch.cat(lses), key_cache, value_cache)
