"""Decoding over pages that are read where they lie: attention to each page by itself, merged by the LSE.

To torch's CPU kernel the pages of the pool are a batch, so that none is copied. The queries of a page are those of all
sequences that hold it, and a page that several share is read once. Pages that are seen in part, the last one of most
sequences, are copied and masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.kvcache.contract import KVCacheInputs, KVCacheOptions
from fastattn.ops.attention.kvcache.slots import Span, is_differentiated
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.reference.attention import NEGATIVE_INFINITY

# Pages of the pool that the kernel may read for each one in use. Where those in use lie further apart they are copied.
_MOST_READ = 1.5

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def takes(inputs: KVCacheInputs, options: KVCacheOptions) -> bool:
    """Is this a call with one query for each sequence, whose pages can be batch entries of torch's CPU kernel?"""
    query, keys, values = inputs.query, inputs.key_cache, inputs.value_cache
    return (
        inputs.block_table is not None
        and query.shape[2] == 1
        and query.numel() > 0
        and inputs.bias is None
        and inputs.alibi_slopes is None
        and options.softcap is None
        and options.scale > 0.0
        and keys.shape[3] == values.shape[3]
        and keys.stride(3) == values.stride(3) == 1
        and not is_differentiated(inputs)
    )


class _Part(NamedTuple):
    """Attention of the query of one sequence to one page."""

    sequence: int
    page: int
    start: int  # the slots of the page that are seen
    stop: int


def run(inputs: KVCacheInputs, options: KVCacheOptions, found: list[Span]) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of a call that this :func:`takes`, whose new tokens are in the cache."""
    assert inputs.block_table is not None
    (batch, heads, _, width), size = inputs.query.shape, inputs.key_cache.shape[2]
    whole: list[_Part] = []
    rest: list[_Part] = []
    for sequence, (span, table) in enumerate(zip(found, inputs.block_table.tolist())):
        for number in range(span.start // size, -(-span.stop // size) if span.start < span.stop else 0):
            start, stop = max(0, span.start - number * size), min(size, span.stop - number * size)
            (whole if stop - start == size else rest).append(_Part(sequence, table[number], start, stop))
    # heads of a group are rows: [B, Hk, G, D]
    inputs = inputs._replace(query=inputs.query.reshape(batch, inputs.key_cache.shape[1], -1, width))
    parts: list[list[int]] = [[] for _ in range(batch)]  # of each sequence: where in what follows its parts are
    outputs, lses, count = [], [], 0
    if whole:
        output, lse, places = _whole(inputs, options, whole)
        outputs.append(output)
        lses.append(lse)
        for part, place in zip(whole, places):
            parts[part.sequence].append(place)
        count = output.shape[0]
    if rest:
        output, lse = _in_part(inputs, options, rest)
        outputs.append(output)
        lses.append(lse)
        for place, part in enumerate(rest, count):
            parts[part.sequence].append(place)
        count += len(rest)
    output, lse = _merge(inputs, outputs, lses, parts)
    return output.view(batch, heads, 1, -1), lse.view(batch, heads, 1)


def _whole(inputs: KVCacheInputs, options: KVCacheOptions, parts: list[_Part]) -> tuple[Tensor, Tensor, list[int]]:
    """Attention to pages all of whose slots are seen, a batch entry for each page of a piece of the pool.

    Returns:
        Output ``[places, Hk, G, D]``, LSE ``[places, Hk, G]``, and the place of each part.
    """
    query, keys, values = inputs.query, inputs.key_cache, inputs.value_cache
    holders: dict[int, list[int]] = {}  # the sequences that hold a page
    for part in parts:
        holders.setdefault(part.page, []).append(part.sequence)
    first, last, most = min(holders), max(holders), max(map(len, holders.values()))
    if last + 1 - first <= _MOST_READ * len(holders):
        keys, values = keys[first : last + 1], values[first : last + 1]
        row = {page: page - first for page in holders}
    else:
        used = torch.tensor(sorted(holders))
        keys, values = keys[used], values[used]
        row = {page: number for number, page in enumerate(sorted(holders))}
    sequence_at = [0] * (keys.shape[0] * most)  # where a page has fewer queries, sequence 0 fills up
    for page, sequences in holders.items():
        sequence_at[row[page] * most : row[page] * most + len(sequences)] = sequences
    queries = query[torch.tensor(sequence_at)].unflatten(0, (-1, most))
    output, lse = _attend(queries.transpose(1, 2).flatten(2, 3), keys, values, scale=options.scale)
    output, lse = (t.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1) for t in (output, lse))
    places = [row[part.page] * most + holders[part.page].index(part.sequence) for part in parts]
    return output, lse, places


def _in_part(inputs: KVCacheInputs, options: KVCacheOptions, parts: list[_Part]) -> tuple[Tensor, Tensor]:
    """Attention to pages some of whose slots are seen, by the formula: output ``[parts, Hk, G, D]``, LSE ``[parts, Hk,
    G]``."""
    dtype = statistics_dtype(inputs.query.dtype)
    sequences, pages, starts, stops = torch.tensor(parts).unbind(1)
    slot = torch.arange(inputs.key_cache.shape[2])
    hidden = (slot < starts[:, None]) | (slot >= stops[:, None])
    query = inputs.query[sequences].to(dtype)
    keys, values = (cache[pages].to(dtype) for cache in (inputs.key_cache, inputs.value_cache))
    values = values.masked_fill(hidden[:, None, :, None], 0.0)  # what is hidden may be NaN, and 0 * NaN is NaN
    scores = (query @ keys.transpose(2, 3)) * options.scale
    scores = scores.masked_fill(hidden[:, None, None, :], NEGATIVE_INFINITY)
    lse = scores.logsumexp(3)
    return torch.exp(scores - lse[..., None]) @ values, lse


def _merge(
    inputs: KVCacheInputs, outputs: list[Tensor], lses: list[Tensor], parts: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """``(output [B, Hk, G, D], lse [B, Hk, G])`` of the parts of each sequence, and the sinks."""
    _, kv_heads, group, width = inputs.query.shape
    dtype = statistics_dtype(inputs.query.dtype)
    # behind all parts one that is nothing, with which sequences of fewer parts fill up
    nothing = inputs.query.new_zeros(1, kv_heads, group, width, dtype=dtype)
    output = torch.cat([*(t.to(dtype) for t in outputs), nothing])
    lse = torch.cat([*lses, nothing[..., 0] + NEGATIVE_INFINITY])
    most = max(map(len, parts))
    mine = torch.tensor([own + [output.shape[0] - 1] * (most - len(own)) for own in parts], dtype=torch.int64)
    of_parts = lse[mine]  # [B, most, Hk, G]
    total = of_parts.logsumexp(1)
    if inputs.sinks is not None:
        total = torch.logaddexp(total, inputs.sinks.to(dtype).view(1, kv_heads, group))
    share = torch.exp(of_parts - total[:, None]).masked_fill(total[:, None] == NEGATIVE_INFINITY, 0.0)
    return (share[..., None] * output[mine]).sum(1).to(inputs.query.dtype), total
