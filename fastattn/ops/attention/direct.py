"""The short way of a call on the CPU: straight to ``F.scaled_dot_product_attention`` where that takes it as it is.

The long way checks every argument one by one and looks for the path that is right and fast. For a call of a few rows
this takes longer than torch's kernel. Here one look at the call tells whether it is of the kind that most calls are:
plain tensors that fit one another, no mask or one that torch takes, and nothing that torch has no words for. Any doubt
leaves the call to the long way, which also has the words for what is wrong with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention import sdpa, tiles
from fastattn.ops.common import backends
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import DTYPES
from fastattn.ops.common.short_way import is_looked_at, is_plain
from fastattn.reference.attention import NEGATIVE_INFINITY

# torch's kernel scales the products of query and key. Below this scale a product may overflow whose score matters.
_LEAST_SCALE = 1e-6


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
    """The output of a call that has no other arguments than these; None where it has to take the long way.

    torch's kernel adds its masks, so that NaN, inf and overflows at hidden places become NaN in rows that do not see
    them. So an output under a mask that is not finite is thrown away.
    """
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
    if scale is not None and not (type(scale) is float and _LEAST_SCALE <= scale < math.inf):
        return None
    mask = attn_mask
    if key_padding_mask is not None and (mask := _with_padding(attn_mask, key_padding_mask, query, keys)) is None:
        return None
    if is_causal and (mask is not None or length != keys):
        return None
    if mask is not None and not _takes_mask(mask, query, key, value):
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
    if mask is not None:
        if not math.isfinite(output.sum(dtype=statistics_dtype(dtype)).item()):
            return None
    elif output.requires_grad:
        sdpa.guard_gradients(output, looks=False)
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


def _takes_mask(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Is this a call without gradients, and of a mask that torch's kernel takes and that leaves no tiles out?"""
    if not _is_dense(mask) or mask.device != query.device or mask.dim() != 4:
        return False
    shape, of_query, boolean = mask.shape, query.shape, mask.dtype == torch.bool
    if any(have != want and have != 1 for have, want in zip(shape, (*of_query[:3], key.shape[2]))):
        return False
    if boolean and (mask.numel() > sdpa.MOST_MERGED or (shape[1] == 1 and of_query[2] >= tiles.FEWEST_ROWS)):
        return False
    if not boolean and mask.dtype != query.dtype:
        return False
    return not (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad or mask.requires_grad)
    )
