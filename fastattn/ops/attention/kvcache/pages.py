"""Decoding over pages that are read where they lie: attention to each page by itself, merged by the LSE.

To torch's CPU kernel the pages of the pool are a batch, so that none is copied. The queries of a page are those of all
sequences that hold it, and a page that several share is read once. Pages that are seen in part, the last one of most
sequences, are copied and masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


class _Held(NamedTuple):
    """Pages, and the sequences that hold them: one entry for each pair of the two."""

    page: Tensor  # [pairs]
    sequence: Tensor  # [pairs]


class _Parts(NamedTuple):
    """Attention of sequences' queries to single pages, the heads of a group being rows."""

    output: Tensor  # [pairs, Hk, G, D]
    lse: Tensor  # [pairs, Hk, G], at least float32
    sequence: Tensor  # [pairs]


def run(inputs: KVCacheInputs, options: KVCacheOptions, found: list[Span]) -> tuple[Tensor, Tensor]:
    """``(output, lse)`` of a call that this :func:`takes`, whose new tokens are in the cache."""
    block_table = inputs.block_table
    assert block_table is not None
    batch, heads, _, width = inputs.query.shape
    size = inputs.key_cache.shape[2]
    inputs = inputs._replace(query=inputs.query.reshape(batch, inputs.key_cache.shape[1], -1, width))
    table, whole, partial = block_table.long(), [], []
    for sequence, span in enumerate(found):
        first, begin, end, last = span.start // size, -(-span.start // size), span.stop // size, -(-span.stop // size)
        if span.start < span.stop:
            whole.append((sequence, begin, max(begin, end)))
            partial += [(sequence, page) for page in sorted({*range(first, begin), *range(end, last)})]
    parts = []
    if any(begin < end for _, begin, end in whole):
        pages = torch.cat([table[sequence, begin:end] for sequence, begin, end in whole])
        counts = torch.tensor([end - begin for _, begin, end in whole])
        of = torch.tensor([sequence for sequence, _, _ in whole]).repeat_interleave(counts)
        parts.append(_whole(inputs, options, _Held(pages, of)))
    if partial:
        sequences, positions = torch.tensor(partial).unbind(1)
        start, stop = torch.tensor([(span.start, span.stop) for span in found])[sequences].unbind(1)
        slots = positions[:, None] * size + torch.arange(size)
        seen = (slots >= start[:, None]) & (slots < stop[:, None])
        parts.append(_in_part(inputs, options, _Held(table[sequences, positions], sequences), seen))
    output, lse = _merge(inputs, parts)
    return output.view(batch, heads, 1, -1), lse.view(batch, heads, 1)


def _whole(inputs: KVCacheInputs, options: KVCacheOptions, held: _Held) -> _Parts:
    """Attention to pages all of whose slots are seen: a batch entry for each page of a piece of the pool."""
    query, keys, values = inputs.query, inputs.key_cache, inputs.value_cache
    used, row, owners = held.page.unique(return_inverse=True, return_counts=True)  # in ascending order
    first, last = int(used[0]), int(used[-1])
    if last + 1 - first <= _MOST_READ * len(used):
        keys, values, row = keys[first : last + 1], values[first : last + 1], held.page - first
    else:
        keys, values = keys[used], values[used]
    most = int(owners.max())
    place = torch.zeros_like(row)  # which of the page's queries is that of this sequence
    if most > 1:
        order = row.argsort(stable=True)
        place[order] = torch.arange(len(row)) - (owners.cumsum(0) - owners).repeat_interleave(owners)
    sequence_at = row.new_zeros(len(keys), most)  # where a page has fewer queries, sequence 0 fills up
    sequence_at[row, place] = held.sequence
    queries = query[sequence_at].transpose(1, 2).flatten(2, 3)  # [pages, Hk, most G, D]
    output, lse = _attend(queries, keys, values, scale=options.scale)
    output, lse = (t.unflatten(2, (most, -1))[row, :, place] for t in (output, lse))
    return _Parts(output, lse, held.sequence)


def _in_part(inputs: KVCacheInputs, options: KVCacheOptions, held: _Held, seen: Tensor) -> _Parts:
    """Attention to pages of which the slots ``seen``, ``[pairs, page_size]``, are; by the formula."""
    dtype = statistics_dtype(inputs.query.dtype)
    query, keys, values = (
        t[i].to(dtype)
        for t, i in ((inputs.query, held.sequence), (inputs.key_cache, held.page), (inputs.value_cache, held.page))
    )
    values = values.masked_fill(~seen[:, None, :, None], 0.0)  # what is not seen may be NaN, and 0 * NaN is NaN
    scores = (query @ keys.transpose(2, 3)) * options.scale
    scores = scores.masked_fill(~seen[:, None, None, :], NEGATIVE_INFINITY)
    lse = scores.logsumexp(3)
    return _Parts(torch.exp(scores - lse[..., None]) @ values, lse, held.sequence)


def _merge(inputs: KVCacheInputs, parts: list[_Parts]) -> tuple[Tensor, Tensor]:
    """``(output [B, Hk, G, D], lse [B, Hk, G])`` of the parts of each sequence, and the sinks."""
    batch, kv_heads, group, width = inputs.query.shape
    dtype = statistics_dtype(inputs.query.dtype)
    # behind all parts one that is nothing, with which sequences of fewer parts fill up
    nothing = inputs.query.new_zeros(1, kv_heads, group, width, dtype=dtype)
    output = torch.cat([*(part.output.to(dtype) for part in parts), nothing])
    lse = torch.cat([*(part.lse for part in parts), nothing[..., 0] + NEGATIVE_INFINITY])
    of = torch.cat([part.sequence for part in parts]) if parts else torch.empty(0, dtype=torch.int64)
    order, counts = of.argsort(stable=True), of.bincount(minlength=batch)
    mine = pad_sequence(list(order.split(counts.tolist())), batch_first=True, padding_value=len(of))  # [B, most parts]
    of_parts = lse[mine]
    total = of_parts.logsumexp(1)
    if inputs.sinks is not None:
        total = torch.logaddexp(total, inputs.sinks.to(dtype).view(1, kv_heads, group))
    share = torch.exp(of_parts - total[:, None]).masked_fill(total[:, None] == NEGATIVE_INFINITY, 0.0)
    return (share[..., None] * output[mine]).sum(1).to(inputs.query.dtype), total
