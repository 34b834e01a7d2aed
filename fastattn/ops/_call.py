"""One attention call, checked and put into the form that every backend understands."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Alignment = Literal["top_left", "bottom_right"]
Weights = Literal["none", "average", "heads"]


class AttentionCall(NamedTuple):
    """A validated call. The words are the reference's: ``mask`` True = may see, ``key_padding_mask`` True = padding."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hk, S, D]
    value: Tensor  # [B, Hk, S, Dv]
    bias: Tensor | None = None  # [B | 1, H | 1, L | 1, S | 1], floating
    mask: Tensor | None = None  # [B | 1, H | 1, L | 1, S | 1], boolean
    key_padding_mask: Tensor | None = None  # [B, S], boolean
    diagonal: int | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    weights: Weights = "none"
    return_lse: bool = False


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query, key and value are 4-D floating tensors that fit one another."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {_shape(tensor)}: expected 4 dimensions [batch, heads, length, head_dim]"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected float16, bfloat16, float32 or float64")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: expected one dtype for all three")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: expected one device")
    shapes = f"query {_shape(query)}, key {_shape(key)}, value {_shape(value)}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"{shapes}: expected the same batch size (dimension 0) in all three")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"{shapes}: expected query and key to have the same head size (dimension 3)")
    if query.shape[3] == 0:
        raise ValueError(f"{shapes}: expected a head size (dimension 3) of at least 1")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"{shapes}: expected key and value to have the same length (dimension 2)")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"{shapes}: expected key and value to have the same number of heads (dimension 1)")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{shapes}: expected the {heads} query heads to be a multiple of the {kv_heads} key heads")


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return ``attn_mask`` as a 4-D view, or raise unless it is boolean or floating and broadcasts to the scores."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask is {attn_mask.dtype}: expected bool (True = may attend) or floating (added)")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device} but query is on {query.device}: expected one device")
    scores = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if attn_mask.dim() > 4 or any(
        have not in (1, want) for have, want in zip(reversed(attn_mask.shape), reversed(scores))
    ):
        raise ValueError(f"attn_mask has shape {_shape(attn_mask)}: expected one that broadcasts to {scores}")
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def check_key_padding_mask(key_padding_mask: Tensor, key: Tensor) -> None:
    """Raise unless ``key_padding_mask`` is boolean ``[B, S]``."""
    if not isinstance(key_padding_mask, Tensor):
        raise TypeError(f"key_padding_mask: expected a torch.Tensor or None, got {type(key_padding_mask).__name__}")
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask is {key_padding_mask.dtype}: expected bool (True = padding)")
    if key_padding_mask.device != key.device:
        raise ValueError(f"key_padding_mask is on {key_padding_mask.device} but key is on {key.device}")
    expected = (key.shape[0], key.shape[2])
    if _shape(key_padding_mask) != expected:
        raise ValueError(f"key_padding_mask has shape {_shape(key_padding_mask)}: expected [batch, keys] = {expected}")


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a Python number, or torch.compile's symbol for one."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
) -> AttentionCall:
    """Check every argument of :func:`fastattn.attention`; under autocast, cast as torch's own attention does."""
    check_tensors(query, key, value)
    bias = mask = None
    if attn_mask is not None:
        attn_mask = check_attn_mask(attn_mask, query, key)
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, key)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment={causal_alignment!r}: expected 'top_left' or 'bottom_right'")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal={is_causal!r}: expected True or False (causal_alignment says which diagonal)")
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability between 0 and 1")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    else:
        check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: expected a finite number or None")

    diagonal = None
    if is_causal:
        diagonal = 0 if causal_alignment == "top_left" else key.shape[2] - query.shape[2]
    device_type = query.device.type
    if query.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return AttentionCall(
        query,
        key,
        value,
        bias,
        mask,
        key_padding_mask,
        diagonal,
        float(scale),
        float(dropout_p),
        ("average" if average_attn_weights else "heads") if need_weights else "none",
        return_lse,
    )
