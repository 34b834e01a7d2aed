"""The public function over a key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastattn.ops.attention.contract import MaskMod, ScoreMod
from fastattn.ops.attention.kvcache import modified, on_torch, on_triton, operator
from fastattn.ops.attention.kvcache.call import make_call
from fastattn.ops.attention.kvcache.contract import Arguments
from fastattn.ops.common import backends
from fastattn.ops.common.short_way import ShortWay, lies_with_kernels
from fastattn.ops.common.tracing import is_symbolically_traced, recorded


def _short() -> Any:
    from fastattn.ops.attention.kvcache import short  # imports triton

    return short


_ARGUMENTS = ShortWay(_short, Arguments, casts=3)


def attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
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
    num_splits: int = 0,
    return_lse: bool = False,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of the last ``L`` tokens of each sequence to those that a key/value cache holds of it.

    A *slot* of a sequence holds the key and the value of one of its tokens. New tokens are put into the slots
    ``cache_seqlens`` and following first, in place; ``cache_seqlens`` itself is not changed. The sequence then holds
    ``T`` tokens, and query ``i`` stands at slot ``T - L + i``. What lies in slots behind ``T``, in pages of others or
    in padding takes no part, NaN included.

    Args:
        query: ``[B, H, L, D]``, float16, bfloat16, float32 or float64; any strides.
        key_cache: ``[B, Hk, S, D]``, or with a ``block_table`` ``[pages, Hk, page_size, D]``; any strides. ``Hk``
            divides ``H``, and query head ``h`` reads head ``h // (H // Hk)``.
        value_cache: the same, ``Dv`` wide.
        key: ``[B, Hk, L, D]``, of the new tokens; None: nothing is new, and the queries are those of the last tokens.
        value: ``[B, Hk, L, Dv]``, given with ``key``.
        cache_seqlens: how many tokens of each sequence the cache holds before the call: int32 ``[B]``, or one int for
            all. On the CPU all numbers are checked; elsewhere nothing waits for them, tokens for which there is no slot
            are dropped, and nothing outside of the cache is touched.
        block_table: int32 ``[B, pages of a sequence]``: slot ``t`` of sequence ``b`` lies in page
            ``block_table[b, t // page_size]`` at ``t % page_size``. Pages lie in any order, and sequences may share
            them, but only one may write into a page. Entries behind the last slot in use are not read.
        cache_leftpad: int32 ``[B]``: so many slots, the first ones of a sequence, are padding.
        rotary_cos: floating ``[positions, R / 2]``, of the angles by which rotary embedding (arXiv:2104.09864) turns
            the first ``R`` features of each query and of each new key; the position is the slot. It needs ``key``.
        rotary_sin: as ``rotary_cos``.
        rotary_interleaved: features ``2 i`` and ``2 i + 1`` are turned together; else ``i`` and ``i + R / 2``.
        attn_mask: boolean (True = may attend) or floating (added to the scores; ``-inf`` forbids), by slots:
            broadcastable to ``[B, H, L, slots]``, where a sequence has room for so many.
        is_causal: a query sees no slot behind its own.
        window: ``(left, right)``: how many slots are seen on either side of a query's own, None for all.
        softcap: scores become ``softcap * tanh(score / softcap)`` before anything is added (arXiv:2408.00118).
        sinks: floating ``[H]``: a score of its own in every query's softmax, without a value (arXiv:2309.17453).
        alibi_slopes: floating ``[H]`` or ``[B, H]``: ``-slope * distance``, in slots, is added (arXiv:2108.12409).
        scale: multiplies the products of queries and keys; default ``1/sqrt(D)``.
        num_splits: between how many programs the kernels divide the slots of a sequence; 0: they decide, from the
            shapes alone. The torch backend needs no such number.
        return_lse: also return the LSE, the logarithm of each query's sum of exponentials.
        score_mod: as of :func:`fastattn.attention`; ``query_index`` is the slot at which a query stands, and
            ``key_index`` a slot.
        mask_mod: likewise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; default what :func:`fastattn.use_backend` or the environment
            variable ``FASTATTN_BACKEND`` says.

    Returns:
        The output ``[B, H, L, Dv]`` in ``query.dtype``, or a tuple of it and the LSE ``[B, H, L]``, at least float32. A
        query that sees nothing gives zero, and its LSE is ``-inf`` or its head's sink. The torch backend gives
        gradients to all floating arguments but a cache that is written, whose tokens are constants to later calls.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit, the cache has no room, two sequences would write into one
            page or one twice, a cache cannot be written (a stride of 0, an inference tensor); the message shows them,
            and nothing has been written.
        NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
    """
    signature = None
    is_modified = score_mod is not None or mask_mod is not None
    is_an_int = not isinstance(cache_seqlens, Tensor)  # another one at each step
    if not is_an_int and not is_modified and lies_with_kernels(query):
        values = (
            query, key_cache, value_cache, key, value, cache_seqlens, block_table, cache_leftpad, rotary_cos,
            rotary_sin, attn_mask, window, sinks, alibi_slopes,
        )  # fmt: skip
        numbers = rotary_interleaved, is_causal, softcap, scale, num_splits, return_lse, backend
        signature = _ARGUMENTS.key(values, numbers)
        if signature is not None and (entry := _ARGUMENTS.find(signature, values + numbers)) is not None:
            found = entry(values)
            if key is not None:
                operator.tell_autograd(key_cache, value_cache)
            return found
    words = {
        "cache_seqlens": cache_seqlens,
        "block_table": block_table,
        "cache_leftpad": cache_leftpad,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "scale": scale,
        "num_splits": num_splits,
        "return_lse": return_lse,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }
    tensors = query, key_cache, value_cache, key, value
    if has_torch_function_variadic(query, key_cache, value_cache) and is_symbolically_traced(*tensors):
        return recorded(attention_with_kvcache, *tensors, **words, backend=backend)
    if is_modified and torch.compiler.is_dynamo_compiling():
        del words["score_mod"], words["mask_mod"]
        output, lse = modified.run_in_graph(make_call(*tensors, **words), score_mod, mask_mod, backend)
        return output if lse is None else (output, lse)
    call = make_call(*tensors, **words)
    if backends.choose(call, backend, on_triton.refusals) == "triton":
        output, lse = on_triton.run(call)
        if signature is not None:
            _ARGUMENTS.remember(signature)
    else:
        output, lse = on_torch.run(call)
    return output if lse is None else (output, lse)
