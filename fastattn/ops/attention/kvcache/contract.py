"""A call over a key/value cache, and what the operator takes and returns.

A sequence's tokens lie in *slots* of the cache, numbered from 0. Without a block table, slot ``t`` of sequence ``b`` is
``key_cache[b, :, t]``. With one it is ``key_cache[block_table[b, t // page_size], :, t % page_size]``: dimension 0 of
the cache is pages, and dimension 2 the slots of a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Function
from fastattn.ops.common.blocks import empty_in_order_of, statistics_dtype


class Arguments(NamedTuple):
    """The arguments of :func:`fastattn.attention_with_kvcache`, as the user gave them: first those that may hold
    tensors."""

    query: Any
    key_cache: Any
    value_cache: Any
    key: Any
    value: Any
    cache_seqlens: Any
    block_table: Any
    cache_leftpad: Any
    rotary_cos: Any
    rotary_sin: Any
    attn_mask: Any
    window: Any
    sinks: Any
    alibi_slopes: Any
    rotary_interleaved: Any
    is_causal: Any
    softcap: Any
    scale: Any
    num_splits: Any
    return_lse: Any
    backend: Any


class KVCacheInputs(NamedTuple):
    """A call's tensors. The caches are written where there is a ``key``."""

    query: Tensor  # [B, H, L, D]
    key_cache: Tensor  # [B, Hk, S, D], or [pages, Hk, page_size, D]
    value_cache: Tensor  # the same, Dv wide
    key: Tensor | None  # [B, Hk, L, D]: goes into the slots cache_seqlens and following
    value: Tensor | None  # [B, Hk, L, Dv]
    cache_seqlens: Tensor  # [B], int32: how many tokens are held before the call
    block_table: Tensor | None  # [B, pages of a sequence], int32
    cache_leftpad: Tensor | None  # [B], int32: so many first slots are padding
    rotary_cos: Tensor | None  # [positions, R / 2], floating
    rotary_sin: Tensor | None  # [positions, R / 2]
    bias: Tensor | None  # [B | 1, H | 1, L | 1, slots | 1], floating
    alibi_slopes: Tensor | None  # [B | 1, H], floating
    sinks: Tensor | None  # [1, H], floating

    @property
    def room(self) -> int:
        """How many slots a sequence may have."""
        size = self.key_cache.shape[2]
        return size if self.block_table is None else size * self.block_table.shape[1]


class KVCacheOptions(NamedTuple):
    """What a call says beside its tensors.

    Query ``i`` stands at slot ``p = T - L + i``, where ``T`` is the number of tokens held with the new ones, and sees
    the slots from ``p + lower`` to ``p + upper`` that are in use; None: no limit.
    """

    rotary_interleaved: bool
    lower: int | None
    upper: int | None
    softcap: float | None
    scale: float
    num_splits: int  # between how many programs the slots are divided; 0: the launcher decides


class KVCacheCall(NamedTuple):
    """A validated call."""

    inputs: KVCacheInputs
    options: KVCacheOptions
    return_lse: bool
    score_mod: Function | None = None
    mask_mod: Function | None = None

    @property
    def is_modified(self) -> bool:
        """Is there a function of the user's?"""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def device(self) -> torch.device:
        """Where the call's tensors lie."""
        return self.inputs.query.device


class KVCacheResults(NamedTuple):
    """What the operator makes. A query that sees no slot gives zero, and an LSE of its head's sink or ``-inf``."""

    output: Tensor  # [B, H, L, Dv]
    lse: Tensor  # [B, H, L], at least float32


def empty_results(inputs: KVCacheInputs, options: KVCacheOptions) -> KVCacheResults:
    """Output and LSE, to be written."""
    query = inputs.query
    return KVCacheResults(
        output=empty_in_order_of(query, (*query.shape[:3], inputs.value_cache.shape[3])),
        lse=query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype)),
    )
