"""One attention call, checked and put into the form that every backend understands."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Alignment, AttentionCall
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.lookups import extent_of
from fastattn.ops.common.checks import (
    DTYPES,
    check_attn_mask,
    check_dense,
    check_flags,
    check_integers,
    check_key_padding_mask,
    check_number,
    check_tensor,
    is_integer,
    shape_of,
    shapes_of,
    under_autocast,
)

_AXES = ("batch", "heads", "length", "head_dim")


def check_operand(name: str, tensor: Tensor, query: Tensor, axes: tuple[str, ...] = _AXES) -> None:
    """Raise unless ``tensor`` is dense, has these axes, and the query's dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(name, tensor)
    if tensor.dim() != len(axes):
        raise ValueError(f"{name} has shape {shape_of(tensor)}: expected {len(axes)} dimensions [{', '.join(axes)}]")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: expected float16, bfloat16, float32 or float64")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: expected one dtype for all three")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query, key and value are 4-D floating tensors that fit one another."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_operand(name, tensor, query)
    wanted = None
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        wanted = "the same batch size (dimension 0) in all three"
    elif query.shape[3] != key.shape[3]:
        wanted = "query and key to have the same head size (dimension 3)"
    elif query.shape[3] == 0:
        wanted = "a head size (dimension 3) of at least 1"
    elif key.shape[2] != value.shape[2]:
        wanted = "key and value to have the same length (dimension 2)"
    elif key.shape[1] != value.shape[1]:
        wanted = "key and value to have the same number of heads (dimension 1)"
    else:
        wanted = heads_wanted(query, key)
    if wanted is not None:
        raise ValueError(f"{shapes_of(query, key, value)}: expected {wanted}")


def heads_wanted(query: Tensor, key: Tensor) -> str | None:
    """Of which number the query heads (dimension 1) have to be a multiple, in words; None where they are."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        return f"the {heads} query heads to be a multiple of the {kv_heads} key heads"
    return None


def check_document_ids(
    document_ids: Tensor | tuple[Tensor, Tensor], query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ids of queries and of keys as int32 or int64 ``[B | 1, length]``, or raise."""
    if isinstance(document_ids, Tensor):
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"document_ids is one tensor for {query.shape[2]} queries and {key.shape[2]} keys: expected a pair "
                "(query ids [batch, queries], key ids [batch, keys]) where the two lengths differ"
            )
        document_ids = (document_ids, document_ids)
    elif not isinstance(document_ids, tuple) or len(document_ids) != 2:
        what = f"{len(document_ids)} items" if isinstance(document_ids, (tuple, list)) else "neither"
        raise TypeError(
            f"document_ids: expected a torch.Tensor or a pair of them, got {type(document_ids).__name__} ({what})"
        )
    found = []
    for of, ids, tensor in zip(("queries", "keys"), document_ids, (query, key)):
        check_tensor(f"document_ids of {of}", ids, query, [("batch", tensor.shape[0]), (of, tensor.shape[2])])
        check_integers(f"document_ids of {of}", ids)
        found.append(ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int32))
    return found[0], found[1]


_MOST = torch.iinfo(torch.int32).max  # a prefix may be longer than there are keys: any number means all of them


def check_prefix(prefix: int | Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the prefix as int32 ``[B | 1]``, or raise."""
    if isinstance(prefix, Tensor):
        check_tensor("prefix", prefix, query, [("batch", query.shape[0])])
        check_integers("prefix", prefix)
        return prefix.to(torch.int64).clamp(0, _MOST).to(torch.int32)
    if not is_integer(prefix):
        raise TypeError(f"prefix={prefix!r}: expected an int, an integer tensor [batch] or None")
    if prefix < 0:
        raise ValueError(f"prefix={prefix}: expected a number of keys, 0 or more")
    return torch.full((1,), min(prefix, _MOST), dtype=torch.int32, device=key.device)


def check_per_head(name: str, tensor: Tensor, query: Tensor, *, per_batch: bool) -> Tensor:
    """Return floating ``[H]``, or ``[B, H]`` where that is accepted, as ``[B | 1, H]``, or raise."""
    batch, heads = query.shape[:2]
    axes = [("heads", heads)]
    if per_batch and isinstance(tensor, Tensor) and tensor.dim() == 2:
        axes = [("batch", batch), *axes]
    check_tensor(name, tensor, query, axes, "[heads] or [batch, heads]" if per_batch else "")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: expected a floating dtype")
    return tensor if tensor.dim() == 2 else tensor[None]


def check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """Return how many keys may be seen to the left and to the right, None where all of them, or raise."""
    if window is None:
        return None, None
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window={window!r}: expected a pair (left, right) or None")
    for side in window:
        if side is not None and not is_integer(side):
            raise TypeError(f"window={window!r}: expected ints, or None for a side without a limit")
        if side is not None and side < 0:
            raise ValueError(f"window={window!r}: expected 0 or more keys on each side, or None for no limit")
    # Operators take 64 bits, in which offsets are added to these; a limit as wide as that hides nothing.
    left, right = (None if isinstance(side, int) and side > 2**62 else side for side in window)
    return left, right


def check_causality(is_causal: object, causal_alignment: object) -> None:
    """Raise unless the first is a boolean and the second one of the two alignments."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment={causal_alignment!r}: expected 'top_left' or 'bottom_right'")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal={is_causal!r}: expected True or False (causal_alignment says which diagonal)")


def check_dropout(dropout_p: float) -> None:
    """Raise unless ``dropout_p`` is a probability."""
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability between 0 and 1")


def check_softcap(softcap: float) -> None:
    """Raise unless ``softcap`` is a finite number above 0."""
    check_number("softcap", softcap)
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: expected a finite number above 0, or None")


def check_scale(scale: float | None, query: Tensor) -> float:
    """Return the number that scores are multiplied by, by default ``1/sqrt(D)``, or raise."""
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    check_number("scale", scale)
    if not -math.inf < scale < math.inf:  # isfinite has no rule for torch.compile's symbols
        raise ValueError(f"scale={scale}: expected a finite number or None")
    return float(scale)


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
    score_mod: Any = None,
    mask_mod: Any = None,
) -> AttentionCall:
    """Check every argument of :func:`fastattn.attention`; under autocast, cast as torch's own attention does."""
    query, key, value = under_autocast(query, key, value)
    check_tensors(query, key, value)
    bias = mask = None
    if attn_mask is not None:
        attn_mask = check_attn_mask(attn_mask, query, key)
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, key)
    check_causality(is_causal, causal_alignment)
    check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights, return_lse=return_lse)
    left, right = check_window(window)
    if prefix is not None:
        prefix = check_prefix(prefix, query, key)
    query_documents = key_documents = None
    if document_ids is not None:
        query_documents, key_documents = check_document_ids(document_ids, query, key)
    if alibi_slopes is not None:
        alibi_slopes = check_per_head("alibi_slopes", alibi_slopes, query, per_batch=True)
    if sinks is not None:
        sinks = check_per_head("sinks", sinks, query, per_batch=False)
    if softcap is not None:
        check_softcap(softcap)
    check_dropout(dropout_p)
    scale = check_scale(scale, query)

    if is_causal:
        right = 0
    lower = upper = None
    shift = 0
    if left is not None or right is not None or alibi_slopes is not None:
        shift = 0 if causal_alignment == "top_left" else key.shape[2] - query.shape[2]
        lower = None if left is None else shift - left
        upper = None if right is None else shift + right
    if lower is None and upper is None:
        prefix = None  # every key is visible anyway
    extent = extent_of(query, key)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mask=mask,
        key_padding_mask=key_padding_mask,
        query_documents=query_documents,
        key_documents=key_documents,
        prefix=prefix,
        lower=lower,
        upper=upper,
        shift=shift,
        softcap=None if softcap is None else float(softcap),
        scale=scale,
        dropout_p=float(dropout_p),
        weights=("average" if average_attn_weights else "heads") if need_weights else "none",
        return_lse=return_lse,
        score_mod=None if score_mod is None else check_function("score_mod", score_mod, query, extent),
        mask_mod=None if mask_mod is None else check_function("mask_mod", mask_mod, query, extent),
    )
