"""One call over packed sequences, checked and put into the form that every backend understands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.call import (
    check_causality,
    check_dropout,
    check_operand,
    check_per_head,
    check_prefix,
    check_scale,
    check_softcap,
    check_window,
    heads_wanted,
)
from fastattn.ops.attention.contract import Alignment
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.lookups import Extent
from fastattn.ops.attention.varlen import sequences
from fastattn.ops.attention.varlen.contract import VarlenCall
from fastattn.ops.common.checks import (
    check_attn_mask_tensor,
    check_flags,
    is_integer,
    shape_of,
    shapes_of,
    under_autocast,
)
from fastattn.ops.common.tracing import is_eager_on_cpu
from fastattn.reference.attention import NEGATIVE_INFINITY


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query, key and value are 3-D floating tensors that fit one another."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_operand(name, tensor, query, ("rows", "heads", "head_dim"))
    wanted = None
    if query.shape[2] != key.shape[2]:
        wanted = "query and key to have the same head size (dimension 2)"
    elif query.shape[2] == 0:
        wanted = "a head size (dimension 2) of at least 1"
    elif key.shape[:2] != value.shape[:2]:
        wanted = "key and value to have the same rows and heads (dimensions 0 and 1)"
    else:
        wanted = heads_wanted(query, key)
    if wanted is not None:
        raise ValueError(f"{shapes_of(query, key, value)}: expected {wanted}")


def _check_integers(name: str, tensor: Any, query: Tensor, size: int | None) -> None:
    """Raise unless ``tensor`` is int32 of one dimension, of this size if there is one, on the query's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor of one dimension, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} is {tensor.dtype}: expected torch.int32")
    if tensor.dim() != 1 or (tensor.shape[0] == 0 if size is None else tensor.shape[0] != size):
        # put into words only here: a graph that is open to other sizes would be tied to this one
        expected = "[sequences + 1]" if size is None else f"[{size}]"
        raise ValueError(f"{name} has shape {shape_of(tensor)}: expected {expected}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")


def _check_bias(attn_mask: Tensor, query: Tensor, count: int) -> Tensor:
    """What is added to the scores, ``[N | 1, H | 1, longest | 1, longest | 1]``, or raise."""
    check_attn_mask_tensor(attn_mask, query)
    heads = query.shape[1]
    bias = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask.dim() <= 4 else attn_mask
    if bias.dim() != 4 or bias.shape[0] not in (1, count) or bias.shape[1] not in (1, heads):
        raise ValueError(
            f"attn_mask has shape {shape_of(attn_mask)}: expected one that broadcasts to [sequences, heads, rows, "
            f"keys] of the longest, here ({count}, {heads}, ..., ...)"
        )
    if bias.dtype == torch.bool:
        return torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, NEGATIVE_INFINITY)
    return bias


def _check_lengths(call: VarlenCall, longest: dict[str, int | None]) -> None:
    """Read the offsets, and raise ValueError unless they fit the packed rows, the bias, and what the caller said."""
    found = sequences.spans(call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k)
    lengths = [span.lengths for span in found]
    for axis, name in enumerate(("max_seqlen_q", "max_seqlen_k")):
        most, said = max((length[axis] for length in lengths), default=0), longest[name]
        if said is not None and most > said:
            raise ValueError(f"{name}={said}: expected at least {most}, the length of the longest sequence")
        size = 1 if call.bias is None else call.bias.shape[2 + axis]
        if size != 1 and size < most:
            assert call.bias is not None
            raise ValueError(
                f"attn_mask has size {size} at dimension {axis - 2}: expected 1, or at least {most}, the length of the "
                "longest sequence"
            )


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    return_lse: bool = False,
    score_mod: Any = None,
    mask_mod: Any = None,
) -> VarlenCall:
    """Check every argument of :func:`fastattn.attention_varlen`; under autocast, cast as torch's own attention does."""
    query, key, value = under_autocast(query, key, value)
    check_packed(query, key, value)
    _check_integers("cu_seqlens_q", cu_seqlens_q, query, None)
    count = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k is None:
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"cu_seqlens_k is None for {query.shape[0]} packed queries and {key.shape[0]} packed keys: expected "
                "offsets of the keys where they are not those of the queries"
            )
        cu_seqlens_k = cu_seqlens_q
    _check_integers("cu_seqlens_k", cu_seqlens_k, query, count + 1)
    if seqused_k is not None:
        _check_integers("seqused_k", seqused_k, query, count)
    longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    for name, length in longest.items():
        if length is not None and not is_integer(length):
            raise TypeError(f"{name}={length!r}: expected an int or None")
        if length is not None and length < 0:
            raise ValueError(f"{name}={length}: expected a length, 0 or more")
    check_flags(need_weights=need_weights, return_lse=return_lse)
    if need_weights:
        raise ValueError(
            "need_weights=True: packed sequences have no common shape of weights; call fastattn.attention on a padded "
            "batch, or on one sequence"
        )
    check_causality(is_causal, causal_alignment)
    left, right = check_window(window)
    packed_query, packed_key, packed_value = (t.transpose(0, 1)[None] for t in (query, key, value))
    entries = packed_query[:, :, :0].expand(count, -1, -1, -1)  # a batch entry for each sequence
    if prefix is not None:
        prefix = check_prefix(prefix, entries, packed_key)
    if alibi_slopes is not None:
        alibi_slopes = check_per_head("alibi_slopes", alibi_slopes, entries, per_batch=True)
    if sinks is not None:
        sinks = check_per_head("sinks", sinks, entries, per_batch=False)
    bias = None if attn_mask is None else _check_bias(attn_mask, packed_query, count)
    if softcap is not None:
        check_softcap(softcap)
    check_dropout(dropout_p)
    scale = check_scale(scale, query)
    lower, upper = None if left is None else -left, 0 if is_causal else right
    extent = Extent(count, query.shape[1], query.shape[0], key.shape[0])  # of indices within sequences
    call = VarlenCall(
        query=packed_query,
        key=packed_key,
        value=packed_value,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        prefix=None if lower is None and upper is None else prefix,  # every key is visible anyway
        lower=lower,
        upper=upper,
        bottom_right=causal_alignment == "bottom_right",
        softcap=None if softcap is None else float(softcap),
        scale=scale,
        dropout_p=float(dropout_p),
        return_lse=return_lse,
        score_mod=None if score_mod is None else check_function("score_mod", score_mod, query, extent),
        mask_mod=None if mask_mod is None else check_function("mask_mod", mask_mod, query, extent),
    )
    if is_eager_on_cpu(query):
        _check_lengths(call, longest)
    return call
