"""Decoding over pages that are read where they lie: attention to each page by itself, merged by the LSE.

To torch's CPU kernel the pages of the pool are a batch, so that none is copied. The queries of a page are those of all
sequences that hold it, and a page that several share is read once. A page that is seen in part, as the last one of most
sequences is, is a call by itself, to a view.
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


def run(
    inputs: KVCacheInputs, options: KVCacheOptions, found: list[Span], return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call that this :func:`takes`, whose new tokens are in the cache."""
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
    outputs, lses, places, count = [], [], [], 0
    if whole:
        output, lse, places = _whole(inputs, options, whole)
        outputs.append(output)
        lses.append(lse)
        count = len(output)
    for part in rest:  # attention to a view of what is seen
        page, slots = slice(part.page, part.page + 1), slice(part.start, part.stop)
        keys, values = (cache[page, :, slots] for cache in (inputs.key_cache, inputs.value_cache))
        output, lse = _attend(inputs.query[part.sequence][None], keys, values, scale=options.scale)
        places.append(count)
        outputs.append(output)
        lses.append(lse)
        count += 1
    of_sequences: list[list[int]] = [[] for _ in range(batch)]  # where in all outputs those of each sequence are
    for part, place in zip([*whole, *rest], places):
        of_sequences[part.sequence].append(place)
    output, lse = _merge(inputs, outputs, lses, of_sequences, return_lse)
    return output.view(batch, heads, 1, -1), None if lse is None else lse.view(batch, heads, 1)


def _whole(inputs: KVCacheInputs, options: KVCacheOptions, parts: list[_Part]) -> tuple[Tensor, Tensor, list[int]]:
    """Attention to pages all of whose slots are seen, a batch entry for each page of a piece of the pool.

    Returns:
        Output ``[places, Hk, G, D]``, LSE ``[places, Hk, G]``, and the place of each part.
    """
    keys, values = inputs.key_cache, inputs.value_cache
    holders: dict[int, list[int]] = {}  # the sequences that hold a page
    for part in parts:
        holders.setdefault(part.page, []).append(part.sequence)
    first, last, most = min(holders), max(holders), max(map(len, holders.values()))
    if last + 1 - first <= _MOST_READ * len(holders):
        keys, values = keys[first : last + 1], values[first : last + 1]
        row = {page: page - first for page in holders}
    else:
        used = torch.tensor(sorted(holders), device=keys.device)
        keys, values = keys.index_select(0, used), values.index_select(0, used)
        row = {page: number for number, page in enumerate(sorted(holders))}
    sequence_at = [0] * (keys.shape[0] * most)  # where a page has fewer queries, sequence 0 fills up
    for page, sequences in holders.items():
        sequence_at[row[page] * most : row[page] * most + len(sequences)] = sequences
    queries = inputs.query.index_select(0, torch.tensor(sequence_at, device=inputs.query.device))
    if most > 1:
        queries = queries.unflatten(0, (-1, most)).transpose(1, 2).flatten(2, 3)
    output, lse = _attend(queries, keys, values, scale=options.scale)
    if most > 1:
        output, lse = (t.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1) for t in (output, lse))
    places = [row[part.page] * most + holders[part.page].index(part.sequence) for part in parts]
    return output, lse, places


def _merge(
    inputs: KVCacheInputs,
    outputs: list[Tensor],
    lses: list[Tensor],
    of_sequences: list[list[int]],
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(output [B, Hk, G, D], lse [B, Hk, G] or None)`` of each sequence's places among all outputs, and the sinks."""
    _, kv_heads, group, width = inputs.query.shape
    dtype = statistics_dtype(inputs.query.dtype)
    nothing = torch.finfo(dtype).min  # the LSE of what has no weight; -inf would be NaN where there is nothing else
    counts = list(map(len, of_sequences))
    most = max(counts)
    if most == 0 or min(counts) < most:  # one more part, which is nothing, fills up
        outputs.append(inputs.query.new_zeros(1, kv_heads, group, width))
        lses.append(inputs.query.new_full((1, kv_heads, group), nothing, dtype=dtype))
        filling, most = sum(map(len, outputs)) - 1, max(1, most)
        of_sequences = [own + [filling] * (most - len(own)) for own in of_sequences]
    mine = torch.tensor(of_sequences, device=inputs.query.device).flatten()
    output = torch.cat(outputs).index_select(0, mine).unflatten(0, (-1, most))  # [B, most, Hk, G, D]
    lse = torch.cat(lses).index_select(0, mine).unflatten(0, (-1, most))
    if inputs.sinks is not None:  # a part without a value
        sinks = inputs.sinks.to(dtype).clamp(min=nothing).view(1, 1, kv_heads, group)
        lse = torch.cat([lse, sinks.expand(lse.shape[0], -1, -1, -1)], 1)
    merged = (lse.softmax(1)[:, :most, ..., None] * output).sum(1).to(inputs.query.dtype)
    if not return_lse:
        return merged, None
    total = lse.logsumexp(1)
    return merged, total.masked_fill(total < nothing / 2, NEGATIVE_INFINITY)
