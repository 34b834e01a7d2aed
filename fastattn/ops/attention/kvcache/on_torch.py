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
from fastattn.ops.attention.kvcache import modified, pages
from fastattn.ops.attention.kvcache.contract import KVCacheCall, KVCacheInputs, KVCacheOptions
from fastattn.ops.attention.kvcache.slots import Span, all_slots, append, in_order, spans
from fastattn.ops.common.tracing import is_eager_on_cpu


def describe(call: KVCacheCall) -> str:
    """Which of the ways the call goes."""
    inputs = call.inputs
    if not is_eager_on_cpu(inputs.query):
        return "attention to all slots, under a mask"
    if not call.is_modified and pages.takes(inputs, call.options):
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
        asked = all_slots(read, options, tokens.long(), call.return_lse)
        output, _, lse = of_attention.run(modified.of_slots(asked, tokens, call) if call.is_modified else asked)
    elif not call.is_modified and pages.takes(read, options):
        output, lse = pages.run(read, options, spans(inputs, options), call.return_lse)
    else:
        output, lse = _attend_spans(call._replace(inputs=read), spans(inputs, options))
    return output, lse if call.return_lse else None


def _attend_spans(call: KVCacheCall, found: list[Span]) -> tuple[Tensor, Tensor | None]:
    """A call of ``attention`` for each run of sequences that see the same slots."""
    outputs, lses, first = [], [], 0
    for span, alike in itertools.groupby(found or [Span(0, 0, 0)]):  # a batch of none is a call as well
        sequences = slice(first, first := first + len(list(alike)))
        of_span = _of_span(call.inputs, call.options, span, sequences, call.return_lse)
        of_span = of_span._replace(first_batch=sequences.start, first_row=span.first_query, first_key=span.start)
        output, _, lse = of_attention.run(of_span._replace(score_mod=call.score_mod, mask_mod=call.mask_mod))
        outputs.append(output)
        lses.append(lse)
    if len(outputs) == 1:
        return outputs[0], lses[0]
    return torch.cat(outputs), torch.cat(lses) if call.return_lse else None


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
