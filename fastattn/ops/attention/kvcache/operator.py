"""Attention over a cache as one operator, ``fastattn::attention_with_kvcache``, which writes into the caches.

It has no derivative: a cache is for decoding, and ``on_triton`` refuses calls whose gradients are asked for.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from fastattn.ops.attention.kvcache.contract import (
    KVCacheCall,
    KVCacheInputs,
    KVCacheOptions,
    KVCacheResults,
    empty_results,
)
from fastattn.ops.attention.kvcache.modified import (
    ModifiedKVCacheInputs,
    ModifiedKVCacheOptions,
    modified_operands,
)
from fastattn.ops.common.operator import ForwardArguments, Operator


def _run(inputs: KVCacheInputs, options: KVCacheOptions) -> KVCacheResults:
    from fastattn.ops.attention.kvcache import launch  # imports triton

    results: KVCacheResults = launch.forward(inputs, options)
    if inputs.key is not None:
        tell_autograd(inputs.key_cache, inputs.value_cache)
    return results


def tell_autograd(*caches: Tensor) -> None:
    """Say that the kernels have written into these, in case that somebody has kept them for a backward."""
    increment_version([cache for cache in caches if not cache.is_inference()])


ATTENTION_WITH_KVCACHE = Operator(
    "attention_with_kvcache",
    ForwardArguments(KVCacheInputs, KVCacheOptions),
    KVCacheResults,
    run=_run,
    fake=empty_results,
    mutates=("key_cache", "value_cache"),
)


MODIFIED_WITH_KVCACHE = Operator(
    "attention_modified_with_kvcache",
    ForwardArguments(ModifiedKVCacheInputs, ModifiedKVCacheOptions),
    KVCacheResults,
    run=_run,
    fake=empty_results,
    mutates=("key_cache", "value_cache"),
)


def apply(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call, through the operator."""
    if call.is_modified:
        inputs, options = modified_operands(call)
        output, lse = MODIFIED_WITH_KVCACHE(*inputs, *options)
    else:
        output, lse = ATTENTION_WITH_KVCACHE(*call.inputs, *call.options)
    return output, lse if call.return_lse else None
