"""Attention over a cache on the torch backend: new tokens are put into the cache, and calls of ``attention`` read it.

On the CPU, where lengths and tables are read without waiting for anything, each sequence is a call on the slots that it
sees, sequences that see the same slots share one, and ``pages`` reads pages where they lie if it can. Elsewhere (in
graphs, on other devices) one call reads all slots, under a mask.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastattn.ops.attention import on_torch as of_attention
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.kvcache import pages
from fastattn.ops.attention.kvcache.contract import KVCacheCall, KVCacheInputs, KVCacheOptions
from fastattn.ops.attention.kvcache.slots import Span, append, in_order, spans, visible
from fastattn.ops.common.tracing import is_eager_on_cpu


def describe(call: KVCacheCall) -> str:
    """Which of the ways the call goes."""
    inputs = call.inputs
    if not is_eager_on_cpu(inputs.query):
        return "attention to all slots, under a mask"
    if pages.takes(inputs, call.options):
        return "attention to each page where it lies, merged by the LSE"
    seen = "the slots that it sees" if inputs.block_table is None else "a copy of the pages that it sees"
    return f"attention of each sequence to {seen}"


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)``; the caches hold the new tokens afterwards."""
    inputs, options = call.inputs, call.options
    looks = is_eager_on_cpu(inputs.query)
    read = append(inputs, options, looks=looks)
    if not looks:
        tokens = inputs.cache_seqlens if inputs.key is None else inputs.cache_seqlens + inputs.query.shape[2]
        output, lse = _attend_unseen(read, options, tokens.long(), call.return_lse)
    elif pages.takes(read, options):
        output, lse = pages.run(read, options, spans(inputs, options), call.return_lse)
    else:
        output, lse = _attend_spans(read, options, spans(inputs, options), call.return_lse)
    return output, lse if call.return_lse else None


def _attend_spans(
    inputs: KVCacheInputs, options: KVCacheOptions, found: list[Span], return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A call of ``attention`` for each run of sequences that see the same slots."""
    outputs, lses, first = [], [], 0
    for span, alike in itertools.groupby(found or [Span(0, 0, 0)]):  # a batch of none is a call as well
        sequences = slice(first, first := first + len(list(alike)))
        output, _, lse = of_attention.run(_of_span(inputs, options, span, sequences, return_lse))
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        return outputs[0], lses[0]
    return torch.cat(outputs), torch.cat(lses) if return_lse else None


def _of_span(
    inputs: KVCacheInputs, options: KVCacheOptions, span: Span, sequences: slice, return_lse: bool
) -> AttentionCall:
    """The call for these sequences, whose queries see the slots of ``span``."""
    key, value = (
        _slots_of(cache, inputs.block_table, span, sequences) for cache in (inputs.key_cache, inputs.value_cache)
    )
    length, keys, shift = inputs.query.shape[2], span.stop - span.start, span.first_query - span.start
    lower = None if options.lower is None else shift + options.lower
    upper = None if options.upper is None else shift + options.upper
    # A bound that hides nothing is left out: the fastest path takes calls without any.
    if lower is not None and length - 1 + lower <= 0:
        lower = None
    if upper is not None and upper >= keys - 1:
        upper = None
    bias = _of_sequences(inputs.bias, sequences)
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., span.start : span.stop]
    return AttentionCall(
        inputs.query[sequences],
        key,
        value,
        bias=bias,
        alibi_slopes=_of_sequences(inputs.alibi_slopes, sequences),
        sinks=inputs.sinks,
        lower=lower,
        upper=upper,
        shift=shift,
        softcap=options.softcap,
        scale=options.scale,
        return_lse=return_lse,
    )


def _of_sequences(tensor: Tensor | None, sequences: slice) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[sequences]


def _slots_of(cache: Tensor, block_table: Tensor | None, span: Span, sequences: slice) -> Tensor:
    """Those slots of those sequences, ``[B, heads, slots, size]``: a view, or a copy of the pages."""
    if block_table is None:
        return cache[sequences, :, span.start : span.stop]
    size = cache.shape[2]
    first, last = span.start // size, -(-span.stop // size)
    slots = in_order(cache, block_table[sequences, first:last])
    return slots[:, :, span.start - first * size : span.stop - first * size]


def _attend_unseen(
    inputs: KVCacheInputs, options: KVCacheOptions, tokens: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One call of ``attention`` to all slots, for graphs, transforms and other devices."""
    seen, behind = visible(inputs, options, tokens)
    bias, slopes = inputs.bias, inputs.alibi_slopes
    if slopes is not None:  # attention measures distances from one diagonal, and here each sequence has its own
        added = -slopes[:, :, None, None] * behind.abs()
        bias = added if bias is None else bias + added
    output, _, lse = of_attention.run(
        AttentionCall(
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
    )
    return output, lse
