"""The masks of ``nn.MultiheadAttention``, checked, and put into the words of :class:`AttentionCall`.

There True means "not allowed"; in an ``AttentionCall`` a mask's True means "may see". Error types and messages are
torch's where torch refuses too.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.checks import check_dense
from fastattn.ops.common.tracing import are_sizes


class Masks(NamedTuple):
    """What an :class:`AttentionCall` takes: each None where nothing asks for it."""

    bias: Tensor | None = None  # [N | 1, H | 1, L | 1, S], added to the scores
    mask: Tensor | None = None  # [N | 1, H | 1, L | 1, S], True = may see
    key_padding_mask: Tensor | None = None  # [N, S], True = padding


class Scores(NamedTuple):
    """The shape of the scores, before keys are appended, and what else decides about masks."""

    batch: int
    heads: int
    length: int
    keys: int
    appended: int  # keys of add_bias_kv and add_zero_attn: at the end, seen by everybody
    batched: bool


def check_types(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """Raise AssertionError for a mask that is neither boolean nor floating; warn where the two are of two dtypes."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not torch.is_floating_point(mask) and mask.dtype != torch.bool:
            raise AssertionError(f"only bool and floating types of {name} are supported")
        if mask is not None and mask.layout is not torch.strided:
            check_dense(name, mask)
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=3,
        )


def check_dimensions(query: Tensor, key: Tensor, value: Tensor, kpm: Tensor | None, attn_mask: Tensor | None) -> None:
    """Raise AssertionError unless all five have as many dimensions as the query's 2 or 3 ask for."""
    dim = query.dim()
    if dim not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {dim}-D query tensor")
    kind = "batched (3-D)" if dim == 3 else "unbatched (2-D)"
    if key.dim() != dim or value.dim() != dim:
        raise AssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {dim}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if kpm is not None and kpm.dim() != dim - 1:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {dim - 1}-D"
            f" but found {kpm.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in ((2, 3, 4) if dim == 3 else (2, 3)):
        raise AssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
            f" but found {attn_mask.dim()}-D tensor instead"
        )


def check_causal_hint(attn_mask: Tensor | None) -> None:
    """Raise RuntimeError unless there is a mask that ``is_causal=True`` may say something of."""
    if attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. "
            "You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )


def make_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None, scores: Scores) -> Masks:
    """Both masks as an :class:`AttentionCall` takes them; views wherever the values allow it."""
    bias = mask = None
    if attn_mask is not None:
        attn_mask = _appended(_four_dimensions(attn_mask, scores), scores)
        bias, mask = (None, ~attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    if key_padding_mask is not None:
        key_padding_mask = _checked_padding(key_padding_mask, scores)
        if key_padding_mask.dtype != torch.bool:
            padding_bias = key_padding_mask[:, None, None, :]
            bias, key_padding_mask = padding_bias if bias is None else sum_of_biases(bias, padding_bias), None
    return Masks(bias, mask, key_padding_mask)


def sum_of_biases(bias: Tensor, padding_bias: Tensor) -> Tensor:
    """Both together. Where both are finite so is their sum: ``finfo.min`` twice would be ``-inf``, which hides."""
    total = bias + padding_bias
    finite = total.clamp_min(torch.finfo(total.dtype).min)
    return torch.where((bias == -math.inf) | (padding_bias == -math.inf), total, finite)


def _four_dimensions(attn_mask: Tensor, scores: Scores) -> Tensor:
    """``attn_mask`` as ``[N | 1, H | 1, L | 1, S | 1]``, or an error in torch's words."""
    shape, dim = attn_mask.shape, attn_mask.dim()
    batch, heads, length, keys = scores[:4]
    fits = are_sizes(shape[-2:], (length, keys), or_one=True)
    if dim == 2 and fits:
        return attn_mask.expand(1, 1, -1, -1)  # faster than two indices None
    if dim == 3 and fits:
        if shape[0] == batch * heads:
            return attn_mask.view(batch, heads, *shape[1:])
        if shape[0] == 1:
            return attn_mask[None]
        if shape[0] == batch and scores.batched:
            return attn_mask[:, None]
    if dim == 4 and fits and shape[0] in (1, batch) and shape[1] in (1, heads):
        return attn_mask

    if not scores.batched and dim == 3:
        raise AssertionError(f"Expected `attn_mask` shape to be {(heads, length, keys)} but got {shape}")
    accepted = {2: (length, keys), 3: (batch * heads, length, keys), 4: (batch, heads, length, keys)}[dim]
    raise RuntimeError(f"The shape of the {dim}D attn_mask is {shape}, but should be {accepted}.")


def _checked_padding(key_padding_mask: Tensor, scores: Scores) -> Tensor:
    """``key_padding_mask`` as ``[N, S]``, the appended keys included."""
    if not scores.batched:
        key_padding_mask = key_padding_mask[None]
    expected = (scores.batch, scores.keys)
    if not are_sizes(key_padding_mask.shape, expected):
        sizes = enumerate(zip(key_padding_mask.shape, expected))
        axis, have, want = next((axis, have, want) for axis, (have, want) in sizes if have != want)
        more = axis * scores.appended
        raise AssertionError(f"Expected key_padded_mask.shape[{axis}] to be {want + more}, but got {have + more}")
    return F.pad(key_padding_mask, (0, scores.appended)) if scores.appended else key_padding_mask


def _appended(mask: Tensor, scores: Scores) -> Tensor:
    """``mask`` (True or ``-inf`` = not allowed) with a column that allows for each appended key."""
    if not scores.appended:
        return mask
    return F.pad(mask.expand(*mask.shape[:3], scores.keys), (0, scores.appended))
