"""One call over a cache, checked and put into the form that every backend understands."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastattn.ops.attention.call import (
    check_operand,
    check_per_head,
    check_scale,
    check_softcap,
    check_window,
    heads_wanted,
)
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.lookups import Extent
from fastattn.ops.attention.kvcache.contract import KVCacheCall, KVCacheInputs, KVCacheOptions
from fastattn.ops.common.checks import (
    check_attn_mask,
    check_flags,
    check_tensor,
    is_integer,
    shape_of,
    shapes_of,
    under_autocast,
)
from fastattn.ops.common.tracing import are_sizes, is_eager_on_cpu, is_traced
from fastattn.reference.attention import NEGATIVE_INFINITY

_MOST_TOKENS = 2**31 - 1  # lengths are int32


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, is_paged: bool) -> None:
    """Raise unless query and caches are 4-D floating tensors that fit one another."""
    check_operand("query", query, query)
    of_cache = ("pages", "heads", "page_size", "head_dim") if is_paged else ("batch", "heads", "slots", "head_dim")
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_operand(name, tensor, query, of_cache)
    wanted = None
    if not are_sizes(key_cache.shape[:3], value_cache.shape[:3]):
        wanted = f"both caches to have the same {', '.join(of_cache[:3])}"
    elif query.shape[3] != key_cache.shape[3] or query.shape[3] == 0:
        wanted = "query and key_cache to have the same head size (dimension 3), at least 1"
    elif not is_paged and not are_sizes(query.shape[:1], key_cache.shape[:1]):
        wanted = (
            "the same batch size (dimension 0) in all three, or a block_table, with which dimension 0 of the caches is "
            "pages"
        )
    elif is_paged and 0 in (key_cache.shape[0], key_cache.shape[2]):
        wanted = "at least one page, and one slot in it"
    else:
        wanted = heads_wanted(query, key_cache)
    if wanted is not None:
        raise ValueError(f"{shapes_of(query, key_cache, value_cache, of='_cache')}: expected {wanted}")


def _check_writable(name: str, cache: Tensor) -> None:
    """Raise unless new tokens can be written into ``cache``, before the other cache is written and this one is not."""
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride())):
        raise ValueError(
            f"{name} has strides {cache.stride()}: new tokens are written into it, and where a stride is 0 they would "
            "be written over each other; expected memory of its own for each element, which .contiguous() gives"
        )
    if cache.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made under torch.inference_mode(): new tokens are written into it, which torch allows there "
            "only; expected the call under it as well, or a cache that was made outside"
        )


def _check_new(query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    """Raise unless there is neither a new key nor a new value, or both fit the queries and the caches."""
    if key is None or value is None:
        if key is not value:
            given, other = ("key", "value") if value is None else ("value", "key")
            raise TypeError(f"{other} is None but {given} is given: expected both, or neither")
        return
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        check_operand(name, tensor, query)
        expected = (query.shape[0], cache.shape[1], query.shape[2], cache.shape[3])
        if not are_sizes(tensor.shape, expected):
            raise ValueError(
                f"{name} has shape {shape_of(tensor)}: expected {expected}, which is [batch, heads of {name}_cache, "
                "length of query, head_dim]"
            )
    if not is_traced():
        _check_writable("key_cache", key_cache)
        _check_writable("value_cache", value_cache)
    if torch.is_grad_enabled() and (key_cache.requires_grad or value_cache.requires_grad):
        raise ValueError(
            "key_cache or value_cache requires grad, and a new key would be written into it: expected caches without "
            "gradients, which .detach() gives"
        )


def _check_integers(name: str, tensor: Any, query: Tensor, axes: tuple[str, ...]) -> None:
    """Raise unless ``tensor`` is int32 with these axes, the first of them the batch, on the query's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} is {tensor.dtype}: expected torch.int32")
    if tensor.dim() != len(axes) or not are_sizes(tensor.shape[:1], query.shape[:1]):
        raise ValueError(
            f"{name} has shape {shape_of(tensor)}: expected [{', '.join(axes)}], with a batch of {query.shape[0]}"
        )
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")


def _check_held(cache_seqlens: int | Tensor, query: Tensor) -> Tensor:
    """Return how many tokens are held as int32 ``[B]``, or raise."""
    if isinstance(cache_seqlens, (int, torch.SymInt)) and not isinstance(cache_seqlens, bool):
        if isinstance(cache_seqlens, int) and not 0 <= cache_seqlens <= _MOST_TOKENS:
            raise ValueError(f"cache_seqlens={cache_seqlens}: expected 0 to {_MOST_TOKENS}")
        return torch.full(query.shape[:1], cache_seqlens, dtype=torch.int32, device=query.device)
    _check_integers("cache_seqlens", cache_seqlens, query, ("batch",))
    return cast(Tensor, cache_seqlens)


def _check_rotary(query: Tensor, key: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    """Raise unless there are no angles, or a cosine and a sine of each, and a key to turn."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        given, other = ("rotary_cos", "rotary_sin") if sin is None else ("rotary_sin", "rotary_cos")
        raise TypeError(f"{other} is None but {given} is given: expected both, or neither")
    if isinstance(cos, Tensor) and cos.dim() != 2:
        raise ValueError(f"rotary_cos has shape {shape_of(cos)}: expected [positions, pairs]")
    sizes = cos.shape if isinstance(cos, Tensor) else (0, 0)  # check_tensor refuses what is no tensor
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensor(name, tensor, query, [("positions", sizes[0]), ("pairs", sizes[1])])
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating dtype")
    if 2 * cos.shape[1] > query.shape[3]:
        raise ValueError(
            f"rotary_cos has shape {shape_of(cos)}: expected [positions, pairs], with at most {query.shape[3] // 2} "
            f"pairs for the head size {query.shape[3]}"
        )
    if key is None:
        raise ValueError(
            "rotary_cos is given without key: the queries would be turned and no key with them; expected a key, or "
            "queries that are turned already and no rotary_cos"
        )


def _check_numbers(inputs: KVCacheInputs) -> None:
    """Read lengths, table and padding, and raise ValueError unless they fit the cache."""
    new = 0 if inputs.key is None else inputs.query.shape[2]
    held = inputs.cache_seqlens.tolist()
    for sequence, tokens in enumerate(held):
        if not 0 <= tokens <= inputs.room - new:
            raise ValueError(
                f"cache_seqlens[{sequence}] is {tokens}: expected 0 to {inputs.room - new}, since a sequence has room "
                f"for {inputs.room} tokens and {new} are new"
            )
    if new and inputs.rotary_cos is not None and max(held, default=0) + new > inputs.rotary_cos.shape[0]:
        raise ValueError(
            f"rotary_cos has {inputs.rotary_cos.shape[0]} positions: expected at least {max(held) + new}, the length "
            "of the longest sequence"
        )
    if inputs.cache_leftpad is not None:
        for sequence, padding in enumerate(inputs.cache_leftpad.tolist()):
            if not 0 <= padding <= held[sequence] + new:
                raise ValueError(
                    f"cache_leftpad[{sequence}] is {padding}: expected 0 to {held[sequence] + new}, the length of the "
                    "sequence"
                )
    if inputs.block_table is not None:
        _check_table(inputs, held, new)


def _check_table(inputs: KVCacheInputs, held: list[int], new: int) -> None:
    """Raise ValueError unless every page in use exists, and no page is written for two sequences."""
    assert inputs.block_table is not None
    pages, page_size = inputs.key_cache.shape[0], inputs.key_cache.shape[2]
    written: dict[int, int] = {}
    for sequence, row in enumerate(inputs.block_table.tolist()):
        used = row[: -(-(held[sequence] + new) // page_size)]
        for position, page in enumerate(used):
            if not 0 <= page < pages:
                raise ValueError(f"block_table[{sequence}, {position}] is {page}: expected a page, 0 to {pages - 1}")
        for page in used[held[sequence] // page_size :] if new else ():
            if used.count(page) > 1:
                raise ValueError(
                    f"block_table[{sequence}] holds page {page} twice, and new tokens would be written into it; "
                    "expected another page at each position"
                )
            if page in written:
                raise ValueError(
                    f"block_table: sequences {written[page]} and {sequence} would both write into page {page}; "
                    "expected a page of its own for each sequence that grows"
                )
            written[page] = sequence


def make_call(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None,
    cache_leftpad: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    num_splits: int,
    return_lse: bool,
    score_mod: Any = None,
    mask_mod: Any = None,
) -> KVCacheCall:
    """Check every argument of :func:`fastattn.attention_with_kvcache`; under autocast, cast all but the caches."""
    if key is not None and value is not None:
        query, key, value = under_autocast(query, key, value)
    else:
        (query,) = under_autocast(query)
    _check_caches(query, key_cache, value_cache, is_paged=block_table is not None)
    _check_new(query, key_cache, value_cache, key, value)
    held = _check_held(cache_seqlens, query)
    if block_table is not None:
        _check_integers("block_table", block_table, query, ("batch", "pages of a sequence"))
    if cache_leftpad is not None:
        _check_integers("cache_leftpad", cache_leftpad, query, ("batch",))
    _check_rotary(query, key, rotary_cos, rotary_sin)
    check_flags(rotary_interleaved=rotary_interleaved, is_causal=is_causal, return_lse=return_lse)
    left, right = check_window(window)
    if softcap is not None:
        check_softcap(softcap)
    if not is_integer(num_splits):
        raise TypeError(f"num_splits={num_splits!r}: expected an int")
    if num_splits < 0:
        raise ValueError(f"num_splits={num_splits}: expected 1 or more, or 0, which leaves it to the kernels")
    inputs = KVCacheInputs(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        key=key,
        value=value,
        cache_seqlens=held,
        block_table=block_table,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        bias=None,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    if attn_mask is not None:
        bias = check_attn_mask(attn_mask, query, key_cache[:1, :, :1].expand(-1, -1, inputs.room, -1))
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, NEGATIVE_INFINITY)
        inputs = inputs._replace(bias=bias)
    if alibi_slopes is not None:
        slopes = check_per_head("alibi_slopes", alibi_slopes, query, per_batch=True)
        inputs = inputs._replace(alibi_slopes=slopes)
    if sinks is not None:
        inputs = inputs._replace(sinks=check_per_head("sinks", sinks, query, per_batch=False))
    options = KVCacheOptions(
        rotary_interleaved=rotary_interleaved,
        lower=None if left is None else -left,
        upper=0 if is_causal else right,
        softcap=None if softcap is None else float(softcap),
        scale=check_scale(scale, query),
        num_splits=num_splits,
    )
    if is_eager_on_cpu(query):
        _check_numbers(inputs)
    extent = Extent(query.shape[0], query.shape[1], inputs.room, inputs.room)
    return KVCacheCall(
        inputs,
        options,
        return_lse,
        None if score_mod is None else check_function("score_mod", score_mod, query, extent),
        None if mask_mod is None else check_function("mask_mod", mask_mod, query, extent),
    )
