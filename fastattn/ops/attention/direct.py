"""The short way of a call on the CPU: straight to ``F.scaled_dot_product_attention`` where that takes it as it is.

The long way checks every argument one by one and looks for the path that is right and fast. For a call of a few rows
this takes longer than torch's kernel. Here one look at the call tells whether it is of the kind that most calls are:
plain tensors that fit one another, no mask or one that torch takes, and nothing that torch has no words for. Any doubt
leaves the call to the long way, which also has the words for what is wrong with it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import sdpa
from fastattn.ops.attention.flash import LEAST_SCALE, is_worth_tiles, scores_of, widens
from fastattn.ops.common import backends
from fastattn.ops.common.checks import DTYPES
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.short_way import is_looked_at, is_plain
from fastattn.reference.attention import NEGATIVE_INFINITY

_FULL = (torch.float32, torch.float64)
# Rows of a call whose mask by differences is kept for the next one: at most 16 masks of 2^14 elements.
_LONGEST_BY_DIFFERENCE = 128


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Any,
    is_causal: bool,
    scale: float | None,
    backend: str | None,
) -> Tensor | None:
    """:func:`attend` of the plainest calls: query, key and value of one shape, and no mask but padding. A call of a few
    rows takes torch seven microseconds."""
    # in this order: a tensor's class says whether it has what is asked of it next
    if not (type(query) is Tensor is type(key) is type(value) and query.is_cpu and key.is_cpu and value.is_cpu):
        return None
    if query.is_nested or key.is_nested or value.is_nested or is_looked_at():
        return None
    shape = query.shape
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if len(shape) != 4 or key.shape != shape or value.shape != shape or not query.numel():
        return None
    # stride() takes half as long as stride(3)
    if query.stride()[3] != 1 or key.stride()[3] != 1 or value.stride()[3] != 1 or query.dtype not in DTYPES:
        return None
    if type(is_causal) is not bool or (is_causal and not trains and is_worth_tiles(shape[2])):
        return None
    if query.dtype not in _FULL and widens(query.dtype, trains, scores_of(query, key)):
        return None
    if scale is not None and not (type(scale) is float and LEAST_SCALE <= scale < math.inf):
        return None
    if torch._C._is_any_autocast_enabled() or not backends.is_torch_on_cpu(backend):
        return None
    mask = None
    if key_padding_mask is not None:
        if is_causal or not (type(key_padding_mask) is Tensor and key_padding_mask.dtype is torch.bool):
            return None
        if not _is_dense(key_padding_mask) or key_padding_mask.shape != (shape[0], shape[2]):
            return None
        if not key_padding_mask.is_cpu or not (sdpa.is_guarded() if trains else shape[2] < sdpa.FEWEST_ROWS_OF_TILES):
            return None
        mask = key_padding_mask.logical_not().view(shape[0], 1, 1, shape[2])  # half the time of ~mask[:, None, None]
    try:
        output = sdpa.torch_sdpa(query, key, value, mask, 0.0, is_causal, scale=scale)
    except RuntimeError:  # of two dtypes, say: the long way has a name for what is wrong
        return None
    if mask is not None and not is_finite(output):
        return None
    if trains:
        sdpa.guard_eager_gradients(output, looks=mask is not None)
    return output


def attend_by_difference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    window: Any,
    alibi_slopes: Any,
    scale: float | None,
    backend: str | None,
) -> Tensor | None:
    """The output of a short call of self-attention whose only other arguments are a window and ALiBi, under one mask;
    None where it has to take the long way."""
    if not (type(query) is Tensor is type(key) is type(value) and query.is_cpu and key.is_cpu and value.is_cpu):
        return None
    if query.is_nested or key.is_nested or value.is_nested or is_looked_at():
        return None
    shape, dtype = query.shape, query.dtype
    if len(shape) != 4 or key.shape != shape or value.shape != shape or not 0 < shape[2] <= _LONGEST_BY_DIFFERENCE:
        return None
    if dtype not in _FULL or not query.numel() or query.stride()[3] != 1 or key.stride()[3] != 1:
        return None
    if value.stride()[3] != 1 or type(is_causal) is not bool:
        return None
    if window is not None and not (
        type(window) is tuple and len(window) == 2 and all(n is None or (type(n) is int and n >= 0) for n in window)
    ):
        return None
    if scale is not None and not (type(scale) is float and LEAST_SCALE <= scale < math.inf):
        return None
    if torch._C._is_any_autocast_enabled() or not backends.is_torch_on_cpu(backend) or not sdpa.is_guarded():
        return None
    left, right = (None, None) if window is None else window
    # as few masks as there are windows that differ, whatever stands for "no limit"
    left, right = (None if n is None or n >= shape[2] else n for n in (left, 0 if is_causal else right))
    hiding, closeness = _by_difference(shape[2], left, right, dtype)
    mask = hiding
    if alibi_slopes is not None:
        if not _is_dense(alibi_slopes) or alibi_slopes.shape != shape[1:2] or alibi_slopes.dtype != dtype:
            return None
        if not alibi_slopes.is_cpu or alibi_slopes.requires_grad or not alibi_slopes.amin().item() >= 0.0:
            return None
        mask = torch.addcmul(hiding, alibi_slopes[:, None, None], closeness)
    try:
        output = sdpa.torch_sdpa(query, key, value, mask, scale=scale)
    except RuntimeError:
        return None
    if not is_finite(output):
        return None
    if output.requires_grad:
        sdpa.guard_eager_gradients(output, looks=True)
    return output


@functools.lru_cache(maxsize=16)
def _by_difference(length: int, left: int | None, right: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What hides the keys outside a window, ``[1, 1, L, L]``, and the negative distances of keys ``[L, L]``."""
    with torch.inference_mode(False):
        place = torch.arange(length, dtype=dtype, device="cpu")
        behind = place - place[:, None]
        hiding = torch.zeros(1, 1, length, length, dtype=dtype, device="cpu")
        if left is not None:
            hiding.masked_fill_(behind < -left, NEGATIVE_INFINITY)
        if right is not None:
            hiding.masked_fill_(behind > right, NEGATIVE_INFINITY)
        return hiding, behind.abs_().neg_()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    causal_alignment: str,
    scale: float | None,
    backend: str | None,
) -> Tensor | None:
    """The output of a call that has no other arguments than these; None where it has to take the long way."""
    if is_looked_at() or not (_is_dense(query) and _is_dense(key) and _is_dense(value)):
        return None
    if type(is_causal) is not bool or causal_alignment not in ("top_left", "bottom_right"):
        return None
    device, dtype = query.device, query.dtype
    if device.type != "cpu" or backends.default_for(device, backend) != "torch" or torch._C._is_any_autocast_enabled():
        return None
    of_query, of_key = query.shape, key.shape
    if len(of_query) != 4 or len(of_key) != 4 or value.shape != of_key:
        return None
    batch, heads, length, size = of_query
    kv_heads, keys = of_key[1], of_key[2]
    if of_key[0] != batch or of_key[3] != size or not query.numel() or not key.numel():
        return None
    if dtype not in DTYPES or not key.dtype == value.dtype == dtype or not key.device == value.device == device:
        return None
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return None
    if scale is not None and not (type(scale) is float and LEAST_SCALE <= scale < math.inf):
        return None
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if is_causal and is_worth_tiles(length) and not trains:
        return None
    if widens(dtype, trains, batch * heads * length * keys):
        return None
    mask = attn_mask
    if mask is not None and _is_dense(mask) and mask.dim() == 2:
        mask = mask[None, None]
    if key_padding_mask is not None and (mask := _with_padding(mask, key_padding_mask, query, keys)) is None:
        return None
    if is_causal and (mask is not None or length != keys):
        return None
    if mask is not None and trains and not sdpa.is_guarded():
        return None
    if mask is not None and (not _is_dense(mask) or mask.requires_grad or not _takes_mask(mask, query, trains, keys)):
        return None
    grouped = heads != kv_heads
    if grouped:  # as rows of one head they read the keys once, as a group of heads several times
        if is_causal or heads % kv_heads:
            return None
        if mask is not None and mask.shape[1] != 1 and length == 1:
            mask = mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[3])
        elif mask is not None and not mask.shape[1] == mask.shape[2] == 1:
            return None
        query = query.reshape(batch, kv_heads, -1, size)
    output = sdpa.torch_sdpa(query, key, value, mask, 0.0, is_causal, scale=scale)
    if mask is not None and not is_finite(output):
        return None
    if trains:
        sdpa.guard_eager_gradients(output, looks=mask is not None)
    return output.reshape(of_query) if grouped else output


def _is_dense(tensor: object) -> bool:
    """Is this a tensor of torch's own class that has sizes and strides?"""
    return is_plain(tensor) and isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested


def _with_padding(attn_mask: Tensor | None, key_padding_mask: Tensor, query: Tensor, keys: int) -> Tensor | None:
    """One mask that stands for both; None where it would be large, or one of them is not as it has to be."""
    batch = query.shape[0]
    if (
        not _is_dense(key_padding_mask)
        or key_padding_mask.dtype != torch.bool
        or key_padding_mask.shape != (batch, keys)
    ):
        return None
    padding = key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return ~padding
    if not _is_dense(attn_mask) or attn_mask.dim() != 4 or attn_mask.dtype not in (torch.bool, query.dtype):
        return None
    if attn_mask.shape[0] not in (1, batch) or attn_mask.shape[3] not in (1, keys):
        return None
    if attn_mask.device != padding.device or math.prod(attn_mask.shape[1:3]) * batch * keys > sdpa.MOST_MERGED:
        return None
    if attn_mask.dtype == torch.bool:
        return attn_mask & ~padding
    return torch.where(padding, NEGATIVE_INFINITY, attn_mask)


def _takes_mask(mask: Tensor, query: Tensor, trains: bool, keys: int) -> bool:
    """Does torch's kernel take this mask as it is, and would the long way leave no tiles out?"""
    shape, of_query = mask.shape, query.shape
    if mask.device != query.device or len(shape) != 4:
        return False
    if any(have != want and have != 1 for have, want in zip(shape, (*of_query[:3], keys))):
        return False
    if mask.dtype == torch.bool:
        return mask.numel() <= sdpa.MOST_MERGED and (trains or shape[1] != 1 or of_query[2] < sdpa.FEWEST_ROWS_OF_TILES)
    return mask.dtype == query.dtype and not trains  # a bias may be too large for the kernel's gradients
