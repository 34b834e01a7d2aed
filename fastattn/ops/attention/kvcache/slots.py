"""Where the tokens of a sequence lie in a cache, as plain torch needs to know it: to write new ones, and to read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.kvcache.contract import KVCacheInputs, KVCacheOptions
from fastattn.reference.kvcache import rotate

# ------------------------------------------------------------------------------------------------------------- writing


def is_differentiated(inputs: KVCacheInputs) -> bool:
    """May autograd ask for the gradient of anything in this call, or is it run in forward mode?"""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def append(inputs: KVCacheInputs, options: KVCacheOptions, *, looks: bool) -> KVCacheInputs:
    """Write the new tokens, if there are any, and return what attention reads then.

    That is the call with its queries turned and its caches, or copies of them where the call is differentiated: what
    later calls write is not to change what a backward needs.

    Args:
        inputs: of the call.
        options: of the call.
        looks: whether numbers may be read; then they have been checked, too.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    is_copied = is_differentiated(inputs)
    read = [cache.clone() for cache in caches] if is_copied else caches
    if key is not None and value is not None:
        length, begin = query.shape[2], _common_slot(inputs) if looks else None
        if begin is not None:
            slots = slice(begin, begin + length)
            place = _Place(slice(None), slots)
        else:
            slots = inputs.cache_seqlens.long()[:, None] + torch.arange(length, device=query.device)  # [B, L]
            place = _place(inputs, slots, looks)
        if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
            if isinstance(slots, Tensor) and not looks:
                slots = slots.clamp(0, inputs.rotary_cos.shape[0] - 1)
            cos, sin = (angles[slots].unsqueeze(-3) for angles in (inputs.rotary_cos, inputs.rotary_sin))
            query, key = (rotate(t, cos, sin, interleaved=options.rotary_interleaved).to(t.dtype) for t in (query, key))
        for cache, copy, new in zip(caches, read, (key, value)):
            if is_copied:
                place.write(copy, new)
                new = torch.autograd.forward_ad.unpack_dual(new.detach()).primal
            place.write(cache, new)
    return inputs._replace(query=query, key_cache=read[0], value_cache=read[1])


def _common_slot(inputs: KVCacheInputs) -> int | None:
    """The slot of a contiguous cache into which the first new token of every sequence goes, if it is the same for all:
    then a slice is written, for which a small call needs a quarter of an index's time."""
    held = set(inputs.cache_seqlens.tolist()) if inputs.block_table is None else ()
    return next(iter(held)) if len(held) == 1 else None


class _Place(NamedTuple):
    """Where in a cache new tokens go: rows (or pages) and slots, both slices, or an index ``[B L]`` of each token.

    ``exists`` is boolean ``[B L]``, whether there is such a place, or None, where all tokens are known to have one.
    """

    rows: Tensor | slice
    slots: Tensor | slice
    exists: Tensor | None = None

    def write(self, cache: Tensor, new: Tensor) -> None:
        """Write tokens ``[B, heads, L, size]``, in place."""
        if isinstance(self.rows, slice) or isinstance(self.slots, slice):
            cache[self.rows, :, self.slots] = new
            return
        cache = cache.transpose(1, 2)  # indices side by side: of others torch.vmap mixes up the dimensions
        rows, slots, exists = self.rows, self.slots, self.exists
        new = new.transpose(1, 2).flatten(0, 1)  # [B L, heads, size], as an index gives them
        if exists is not None:
            # A token without a place is written as another that has one, again; if none has, what was there is.
            chosen = torch.where(exists, torch.arange(exists.shape[0], device=cache.device), exists.int().argmax())
            rows, slots = rows[chosen], slots[chosen]
            new = torch.where(exists.any(), new[chosen], cache[rows, slots])
        cache[rows, slots] = new


def _place(inputs: KVCacheInputs, slots: Tensor, looks: bool) -> _Place:
    """Where slots ``[B, L]`` of the sequences lie, within the cache whatever the numbers are."""
    count, _, size, _ = inputs.key_cache.shape
    exists = None
    if not looks:  # and nobody knows whether every token has a slot
        exists, slots = (slots >= 0) & (slots < inputs.room), slots.clamp(0, inputs.room - 1)
    if inputs.block_table is None:
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots)
    else:
        rows, slots = inputs.block_table.gather(1, slots // size).long(), slots % size
        if exists is not None:
            exists, rows = exists & (rows >= 0) & (rows < count), rows.clamp(0, count - 1)
    return _Place(rows.flatten(), slots.flatten(), None if exists is None or not exists.numel() else exists.flatten())


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


def all_slots(inputs: KVCacheInputs, options: KVCacheOptions, tokens: Tensor, return_lse: bool) -> AttentionCall:
    """One call of ``attention`` to all slots, for graphs, transforms and other devices."""
    seen, behind = visible(inputs, options, tokens)
    bias, slopes = inputs.bias, inputs.alibi_slopes
    if slopes is not None:  # attention measures distances from one diagonal, and here each sequence has its own
        added = -slopes[:, :, None, None] * behind.abs()
        bias = added if bias is None else bias + added
    return AttentionCall(
        inputs.query,
        in_order(inputs.key_cache, inputs.block_table),
        in_order(inputs.value_cache, inputs.block_table),
        mask=seen,
        bias=bias,
        sinks=inputs.sinks,
        softcap=options.softcap,
        scale=options.scale,
        return_lse=return_lse,
    )
