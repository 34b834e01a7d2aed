"""What ``nn.MultiheadAttention`` computes up to its output projection, as a function of tensors and of words.

The module is not part of it, so that a call can also be recorded and repeated with other tensors (``_mha_kernels``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.modules._mha_masks import Masks, Scores, make_masks
from fastattn.ops.attention.contract import AttentionCall, Weights
from fastattn.ops.common.checks import is_autocast_enabled

_NO_MASKS = Masks()


class Inputs(NamedTuple):
    """The tensors of a call: its arguments, then the module's parameters. The projections in have one weight
    ``[3 E, E]``, or three."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    in_weight: Tensor | None
    in_weights: tuple[Tensor, Tensor, Tensor] | None
    in_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


class Words(NamedTuple):
    """What else decides what is computed. ``is_causal``: keys ``j > i`` are hidden, and ``attn_mask`` is not read.
    The heads are all of a module's, ``num_heads * head_dim == embed_dim``, or those that one rank of several has."""

    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    add_zero_attn: bool
    is_causal: bool
    dropout_p: float
    weights: Weights


def is_taken_as_causal(key_padding_mask: Tensor | None, need_weights: bool) -> bool:
    """Whether the promise that ``attn_mask`` is the causal mask is believed, so that the mask is not read."""
    return key_padding_mask is None and not need_weights


def attend(inputs: Inputs, words: Words, run: Callable[[AttentionCall], Any]) -> tuple[Tensor, Tensor | None]:
    """What the output projection is made of, in the query's layout, and the weights.

    Args:
        inputs: the tensors, with as many dimensions as ``_mha_masks.check_dimensions`` asks for.
        words: what else there is to know.
        run: computes attention: ``(output, weights or None, ...)`` of a call.
    """
    query, batched = inputs.query, inputs.query.dim() == 3
    q, k, v = project(inputs, words, batched)
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    if words.add_zero_attn or inputs.bias_k is not None or inputs.bias_v is not None:
        k, v = _append_keys(k, v, inputs, words)
    masks, attn_mask = _NO_MASKS, None if words.is_causal else inputs.attn_mask
    if attn_mask is not None or inputs.key_padding_mask is not None:
        scores = Scores(batch, heads, length, keys, k.shape[2] - keys, batched)
        masks = make_masks(inputs.key_padding_mask, attn_mask, scores)
        if masks.bias is not None and masks.bias.dtype not in (q.dtype, query.dtype, torch.float32):
            raise RuntimeError(
                f"a floating mask is {masks.bias.dtype}: expected {query.dtype} (as the query) or torch.float32"
            )
    call = AttentionCall(
        q,
        k,
        v,
        bias=masks.bias,
        mask=masks.mask,
        key_padding_mask=masks.key_padding_mask,
        upper=0 if words.is_causal else None,
        scale=1.0 / math.sqrt(words.head_dim),
        dropout_p=words.dropout_p,
        weights=words.weights,
    )
    attended, weights, *_ = run(call)
    width = words.num_heads * words.head_dim
    if words.batch_first and batched:
        merged = attended.transpose(1, 2).reshape(batch, length, width)
    elif batched:
        merged = attended.permute(2, 0, 1, 3).reshape(length, batch, width)
    else:
        merged = attended.transpose(1, 2).reshape(length, width)
        weights = None if weights is None else weights[0]
    return merged, weights


def project(inputs: Inputs, words: Words, batched: bool) -> Sequence[Tensor]:
    """The three projections as ``[N, H, length, D]`` views, by as few products as the inputs' identities allow."""
    query, key, value = inputs.query, inputs.key, inputs.value
    weight, bias = inputs.in_weight, inputs.in_bias
    embed_dim, heads, head_dim = query.shape[-1], words.num_heads, words.head_dim
    if embed_dim != words.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {words.embed_dim}, but got {embed_dim}")
    if embed_dim % heads:
        raise AssertionError(f"embed_dim {embed_dim} not divisible by num_heads {heads}")
    width = heads * head_dim
    sequence_first = batched and not words.batch_first
    batch = (query.shape[1] if sequence_first else query.shape[0]) if batched else 1
    layout = _Layout(sequence_first, batch, heads, head_dim)
    if inputs.in_weights is None:
        assert weight is not None
        if key is value and query is key:
            return _split_heads(F.linear(query, weight, bias), 3, layout)
        if key is value:
            sizes = (width, 2 * width)
            w_q, w_kv = weight.split(sizes)
            b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
            q, kv = F.linear(query, w_q, b_q), F.linear(key, w_kv, b_kv)
            return *_split_heads(q, 1, layout), *_split_heads(kv, 2, layout)
        if key.shape != value.shape:
            shapes = [_sequence_first_shape(t, layout) for t in (key, value)]
            raise AssertionError(f"key shape {shapes[0]} does not match value shape {shapes[1]}")
        weights = weight.chunk(3)
    else:
        weights = inputs.in_weights
        _check_separate(key, value, embed_dim, weights, layout)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    projections = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    return [_split_heads(p, 1, layout)[0] for p in projections]


def _append_keys(k: Tensor, v: Tensor, inputs: Inputs, words: Words) -> tuple[Tensor, Tensor]:
    """Keys and values with those of ``add_bias_kv`` and ``add_zero_attn`` behind them."""
    if (inputs.bias_k is None) != (inputs.bias_v is None):
        names = ("bias_v", "bias_k") if inputs.bias_k is None else ("bias_k", "bias_v")
        raise AssertionError(f"{names[0]} is set but {names[1]} is None")
    batch, heads, _, head_dim = k.shape
    appended = []
    for tensor, bias in ((k, inputs.bias_k), (v, inputs.bias_v)):
        parts = [tensor]
        if bias is not None:
            # Autocast would let the concatenation promote to the parameter's dtype.
            bias = bias.to(tensor.dtype) if is_autocast_enabled(tensor.device) else bias
            parts.append(bias.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
        if words.add_zero_attn:
            parts.append(tensor.new_zeros(batch, heads, 1, head_dim))
        appended.append(torch.cat(parts, dim=2))
    return appended[0], appended[1]


class _Layout(NamedTuple):
    """How inputs lie, and how their features divide into heads."""

    sequence_first: bool  # [length, N, E] instead of [N, length, E] or [length, E]
    batch: int
    heads: int
    head_dim: int


def _split_heads(projected: Tensor, parts: int, layout: _Layout) -> Sequence[Tensor]:
    """The ``parts`` projections that lie side by side, each as a ``[N, H, length, D]`` view."""
    sequence_first, batch, heads, head_dim = layout
    # The batch is the query's: with any other this view is a RuntimeError, as in torch.
    if sequence_first:
        sides, order = projected.view(projected.shape[0], batch, parts, heads, head_dim), (1, 2, 0, 3)
    else:
        sides, order = projected.view(batch, projected.shape[-2], parts, heads, head_dim), (0, 2, 1, 3)
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # which traces once more without gradients, and compares
        # Taken apart first, because their gradients then stack straight into the order of the projection.
        return [side.permute(order) for side in sides.unbind(2)]
    return sides.permute((1, 3, 2, 0, 4) if sequence_first else (0, 3, 2, 1, 4)).unbind(2)


def _check_separate(
    key: Tensor, value: Tensor, embed_dim: int, weights: tuple[Tensor, Tensor, Tensor], layout: _Layout
) -> None:
    """Raise AssertionError unless keys and values fit one another and the three weights."""
    if key.shape[:-1] != value.shape[:-1]:
        shapes = [_sequence_first_shape(t, layout)[:2] for t in (key, value)]
        raise AssertionError(f"key's sequence and batch dims {shapes[0]} do not match value's {shapes[1]}")
    widths = embed_dim, key.shape[-1], value.shape[-1]
    rows = layout.heads * layout.head_dim
    for name, weight, width in zip(("query", "key", "value"), weights, widths):
        if weight.shape != (rows, width):
            raise AssertionError(f"expecting {name} weights shape of {(rows, width)}, but got {weight.shape}")


def _sequence_first_shape(tensor: Tensor, layout: _Layout) -> torch.Size:
    """The shape as torch's messages show it: ``[length, N, features]``."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1).shape
    return tensor.shape if layout.sequence_first else tensor.transpose(0, 1).shape
