"""Where the tokens of a sequence lie in a cache, as plain torch needs to know it: to write new ones, and to read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.kvcache.contract import KVCacheInputs, KVCacheOptions
from fastattn.ops.common.tracing import is_eager_on_cpu
from fastattn.reference.kvcache import rotate

# ------------------------------------------------------------------------------------------------------------- writing


def is_differentiated(inputs: KVCacheInputs) -> bool:
    """May autograd ask for the gradient of anything in this call, or is it run in forward mode?"""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def append(inputs: KVCacheInputs, options: KVCacheOptions) -> KVCacheInputs:
    """Write the new tokens, if there are any, and return what attention reads then.

    That is the call with its queries turned and its caches, or copies of them where the call is differentiated: what
    later calls write is not to change what a backward needs.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    if key is None or value is None:
        if is_differentiated(inputs):
            caches = caches[0].clone(), caches[1].clone()
        return inputs._replace(key_cache=caches[0], value_cache=caches[1])
    slots = inputs.cache_seqlens.long()[:, None].clamp(min=0) + torch.arange(query.shape[2], device=query.device)
    if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
        at = slots.clamp(max=inputs.rotary_cos.shape[0] - 1)
        cos, sin = (angles[at][:, None] for angles in (inputs.rotary_cos, inputs.rotary_sin))  # [B, 1, L, R / 2]
        query, key = (rotate(t, cos, sin, interleaved=options.rotary_interleaved).to(t.dtype) for t in (query, key))
    tokens = [t.transpose(1, 2).flatten(0, 1) for t in (key, value)]  # [B L, heads, size], as an index gives them
    rows, slots, exists = (t.flatten() for t in _places(inputs, slots))
    if not is_eager_on_cpu(query) and exists.shape[0]:  # nobody has looked whether every token has a slot
        # One without is written as another that has, again; if there are none, what was there is written.
        chosen = torch.where(exists, torch.arange(exists.shape[0], device=query.device), exists.int().argmax())
        rows, slots = rows[chosen], slots[chosen]
        tokens = [torch.where(exists.any(), t[chosen], cache[rows, :, slots]) for cache, t in zip(caches, tokens)]
    read = [cache.clone() for cache in caches] if is_differentiated(inputs) else caches
    for cache, copy, new in zip(caches, read, tokens):
        copy[rows, :, slots] = new
        if copy is not cache:
            cache[rows, :, slots] = torch.autograd.forward_ad.unpack_dual(new.detach()).primal
    return inputs._replace(query=query, key_cache=read[0], value_cache=read[1])


def _places(inputs: KVCacheInputs, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of slots ``[B, L]``, 0 or more: the row or page of the cache, the slot in it, both within the cache whatever the
    numbers are, and whether that is the place that was asked for."""
    batch, (count, _, size, _) = inputs.query.shape[0], inputs.key_cache.shape
    exists, slots = slots < inputs.room, slots.clamp(max=inputs.room - 1)
    if inputs.block_table is None:
        return torch.arange(batch, device=slots.device)[:, None].expand_as(slots), slots, exists
    pages = inputs.block_table.long().gather(1, slots // size)
    return pages.clamp(0, count - 1), slots % size, exists & (pages >= 0) & (pages < count)


# ------------------------------------------------------------------------------------------------------------- reading


class Span(NamedTuple):
    """The slots that the queries of a sequence may see, and the slot of its first query."""

    start: int
    stop: int
    first_query: int


def spans(inputs: KVCacheInputs, options: KVCacheOptions) -> list[Span]:
    """Of each sequence, by the numbers on the CPU."""
    length = inputs.query.shape[2]
    new = 0 if inputs.key is None else length
    paddings = [0] * inputs.query.shape[0] if inputs.cache_leftpad is None else inputs.cache_leftpad.tolist()
    found = []
    for tokens, padding in zip(inputs.cache_seqlens.tolist(), paddings):
        first_query, start, stop = tokens + new - length, padding, tokens + new
        if options.lower is not None:
            start = max(start, first_query + options.lower)
        if options.upper is not None:
            stop = min(stop, first_query + length + options.upper)
        found.append(Span(start, max(start, stop), first_query))
    return found


def visible(inputs: KVCacheInputs, options: KVCacheOptions, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean ``[B, 1, L, slots]``, which of all slots the queries see where sequences hold so many ``tokens``
    ``[B]``, and integers of that shape: how far behind its own slot a query sees each."""
    length, device = inputs.query.shape[2], inputs.query.device
    query = tokens[:, None, None, None] - length + torch.arange(length, device=device)[:, None]
    slot = torch.arange(inputs.room, device=device)
    behind = slot - query
    seen = (slot < tokens[:, None, None, None]).expand_as(behind)
    if inputs.cache_leftpad is not None:
        seen = seen & (slot >= inputs.cache_leftpad[:, None, None, None])
    if options.lower is not None:
        seen = seen & (behind >= options.lower)
    if options.upper is not None:
        seen = seen & (behind <= options.upper)
    return seen, behind


def in_order(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """All slots of each sequence, ``[B, heads, slots, size]``: the cache as it is, or a copy of its pages."""
    if block_table is None:
        return cache
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]  # [B, pages, heads, page_size, size]
    return pages.transpose(1, 2).flatten(2, 3)
