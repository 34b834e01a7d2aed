"""Transformer layers in inference on the CPU: their steps in place, without a call of the modules that they are of.

A layer takes this way where nobody could see the difference: plain tensors, modules of the classes that the layer was
made of, none of them hooked or in training, and gradients off. It computes what the modules compute. In small calls
without a mask torch's own fused function does it, which ``nn.TransformerEncoderLayer`` calls there as well.

Where much of a batch is padding, the rest is packed: everything but attention is a matter of single rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastattn.modules import _mha_direct
from fastattn.modules.multihead_attention import MultiheadAttention
from fastattn.modules.norm import AddLayerNorm
from fastattn.ops.attention import sdpa
from fastattn.ops.common import backends
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.short_way import is_looked_at
from fastattn.reference.attention import NEGATIVE_INFINITY

_FUSED: Any = torch._transformer_encoder_layer_fwd
_PLAIN = (Tensor, nn.Parameter)
# Whatever else a layer holds, or has been given in the place of one of these, is called.
_KINDS = (MultiheadAttention, AddLayerNorm, nn.Linear, nn.Dropout)
# These are a matter of single elements: it does not matter in what shape they get them.
_FUNCTIONS: tuple[Any, ...] = (F.relu, F.gelu, F.silu, torch.relu)
_MODULES = (nn.ReLU, nn.GELU, nn.SiLU)
# In 16 bits the add in front of a norm is rounded here, which the norm of this package does not do.
_DTYPES = (torch.float32, torch.float64)
# torch's function makes all scores: up to so many of them it is as fast as the steps, or faster.
_MOST_FUSED = 1 << 17
# Packing moves rows to and fro, some microseconds each time. It pays where it leaves out this many elements at least.
_FEWEST_LEFT_OUT = 1 << 13

_Masks = tuple[Tensor | None, Tensor | None, bool]
_Attend = Callable[[Tensor], Tensor | None]


class _Norm(NamedTuple):
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _Parts(NamedTuple):
    """What a layer is of: its norms, and what feeds forward."""

    norms: list[_Norm]
    first: _Linear
    second: _Linear
    activation: Any


def encode(layer: Any, src: Tensor, masks: _Masks) -> Tensor | None:
    """The output of a ``TransformerEncoderLayer``, or None where the call is not for this function.

    With ``src_key_padding_mask`` positions that are padding may be left out, and are then zero.
    """
    if not _is_for_us(layer, src):
        return None
    parts = _parts_of(layer, src, ("self_attn",), ("norm1", "norm2"))
    if parts is None:
        return None
    attention: MultiheadAttention = layer.self_attn
    mask, padding, is_causal = masks
    if mask is None and padding is None:
        output = None if is_causal else _fused(layer, src, attention, parts)
        if output is not None:
            return output
    elif padding is not None and attention.batch_first and not (is_causal and mask is None):  # which is an error
        packed = _rows_that_count(src, padding)
        if packed is not None:
            rows, hidden = packed
            x = src.reshape(-1, src.shape[2])
            output = _encoded(layer, parts, x.index_select(0, rows), _of_rows(attention, src, rows, hidden, mask))
            if output is not None:
                return x.new_zeros(x.shape).index_copy_(0, rows, output).view(src.shape)
    return _encoded(layer, parts, src, lambda x: _attend(attention, x, x, masks))


def decode(layer: Any, tgt: Tensor, memory: Tensor, masks: _Masks, memory_masks: _Masks) -> Tensor | None:
    """The output of a ``TransformerDecoderLayer``, or None where the call is not for this function."""
    if not _is_for_us(layer, tgt):
        return None
    parts = _parts_of(layer, tgt, ("self_attn", "multihead_attn"), ("norm1", "norm2", "norm3"))
    if parts is None:
        return None
    norm1, norm2, norm3 = parts.norms
    first = layer.norm_first
    normed = norm1(tgt) if first else tgt
    x = _attend(layer.self_attn, normed, normed, masks)
    if x is None:
        return None
    x.add_(tgt)
    normed = norm2(x) if first else norm1(x)
    attended = _attend(layer.multihead_attn, normed, memory, memory_masks)
    if attended is None:
        return None
    if first:
        x = attended.add_(x)
        return _fed_forward(parts, norm3(x), x)
    x = norm2(attended.add_(normed))
    return norm3(_fed_forward(parts, x, x))


def _encoded(layer: Any, parts: _Parts, x: Tensor, attend: _Attend) -> Tensor | None:
    norm1, norm2 = parts.norms
    if layer.norm_first:
        attended = attend(norm1(x))
        if attended is None:
            return None
        attended.add_(x)
        return _fed_forward(parts, norm2(attended), attended)
    attended = attend(x)
    if attended is None:
        return None
    normed = norm1(attended.add_(x))
    del attended  # its memory is for what comes
    return norm2(_fed_forward(parts, normed, normed))


def _fed_forward(parts: _Parts, x: Tensor, residual: Tensor) -> Tensor:
    """``residual`` and what the two linear layers make of ``x``, in the memory of ``residual``, which may be ``x``."""
    rows, total = x.view(-1, x.shape[-1]), residual.view(-1, residual.shape[-1])
    hidden = _linear(rows, parts.first)
    hidden = hidden.relu_() if parts.activation is torch.relu_ else parts.activation(hidden)
    if parts.second.bias is not None:
        total.add_(parts.second.bias)
    total.addmm_(hidden, parts.second.weight.t())
    return residual  # and no view of it, which under no_grad could not be changed in place afterwards


def _linear(rows: Tensor, linear: _Linear) -> Tensor:
    weight, bias = linear
    return rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def _attend(attention: MultiheadAttention, x: Tensor, memory: Tensor, masks: _Masks) -> Tensor | None:
    mask, padding, is_causal = masks
    found = _mha_direct.attend(attention, attention.backend, x, memory, memory, padding, False, mask, True, is_causal)
    return None if found is None else found[0]


# ------------------------------------------------------------------------------------------------ which calls, and what


def _is_for_us(layer: nn.Module, x: Any) -> bool:
    if layer.training or torch.is_grad_enabled() or type(x) not in _PLAIN or x.device.type != "cpu" or is_looked_at():
        return False
    if x.is_nested or x.layout is not torch.strided or x.dtype not in _DTYPES or x.dim() != 3 or not x.numel():
        return False
    return not (torch._C._is_any_autocast_enabled() or _has_any_global_hook())


def _parts_of(layer: Any, x: Tensor, attentions: tuple[str, ...], norms: tuple[str, ...]) -> _Parts | None:
    """What the layer is of; None where one of its modules is not as it was made, or somebody watches it."""
    own, found = layer._modules, []
    width, dtype, device, activation = x.shape[2], x.dtype, x.device, layer.activation
    if activation not in _FUNCTIONS and type(activation) not in _MODULES:
        return None
    for part in own.values():
        if part is None or part.training or (type(part) not in _KINDS and part is not activation):
            return None
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return None
    try:
        for name in attentions:
            if type(own[name]) is not MultiheadAttention:
                return None
        for name in norms:
            norm: Any = own[name]
            if type(norm) is not AddLayerNorm or norm.normalized_shape != (width,):
                return None
            if backends.default_for(device, norm.backend) != "torch":
                return None
            weight, bias = norm._parameters["weight"], norm._parameters["bias"]
            for vector in (weight, bias):
                if vector is not None and not (
                    type(vector) in _PLAIN and vector.dtype == dtype and vector.shape == (width,)
                ):
                    return None
            found.append(_Norm((width,), weight, bias, norm.eps))
        linears = []
        for name in ("linear1", "linear2"):
            linear: Any = own[name]
            weight = linear._parameters["weight"]
            if type(linear) is not nn.Linear or type(weight) not in _PLAIN or weight.dtype != dtype:
                return None
            linears.append(_Linear(weight, linear._parameters["bias"]))
    except KeyError:  # a parameter that is computed whenever it is read
        return None
    first, second = linears
    if first.weight.shape[1] != width or second.weight.shape != (width, first.weight.shape[0]):
        return None
    if activation is F.relu or type(activation) is nn.ReLU:
        activation = torch.relu_
    return _Parts(found, first, second, activation)


def _fused(layer: Any, src: Tensor, attention: MultiheadAttention, parts: _Parts) -> Tensor | None:
    """What torch's function gives, where it computes what the modules do."""
    activation, heads = parts.activation, attention.num_heads
    is_gelu = activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none")
    if not (is_gelu or activation is torch.relu_) or heads % 2 or not attention.batch_first:
        return None
    batch, length, width = src.shape
    (_, *norm1, eps), (_, *norm2, other_eps) = parts.norms
    if batch * heads * length * length > _MOST_FUSED or eps != other_eps or width != attention.embed_dim:
        return None
    if backends.default_for(src.device, attention.backend) != "torch":
        return None
    projections = _mha_direct.parameters_of(attention, src.dtype)
    if projections is None:
        return None
    if any(t is None for t in (*projections, *norm1, *norm2, *parts.first, *parts.second)):
        return None
    return _FUSED(
        src, width, heads, *projections, is_gelu, bool(layer.norm_first), eps, *norm1, *norm2, *parts.first,
        *parts.second, None, None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- packing


def _rows_that_count(src: Tensor, padding: Tensor) -> tuple[Tensor, Tensor] | None:
    """The positions ``[T]``, among those of all sequences, that are no padding, and the padding as booleans; None where
    they are most of them, or the mask is more than that."""
    batch, length, width = src.shape
    positions = batch * length
    if positions * width < 2 * _FEWEST_LEFT_OUT or type(padding) not in _PLAIN or padding.is_nested:
        return None
    if padding.layout is not torch.strided or padding.device.type != "cpu" or padding.shape != (batch, length):
        return None
    if padding.dtype not in (torch.bool, src.dtype):
        return None
    hidden = padding
    if padding.dtype != torch.bool:
        hidden = padding == NEGATIVE_INFINITY
        if torch.count_nonzero(padding).item() != torch.count_nonzero(hidden).item():
            return None
    rows = (~hidden).flatten().nonzero().squeeze(1)
    count = rows.shape[0]
    return (rows, hidden) if count and (positions - count) * width >= _FEWEST_LEFT_OUT else None


def _of_rows(
    attention: MultiheadAttention, src: Tensor, rows: Tensor, hidden: Tensor, attn_mask: Tensor | None
) -> _Attend:
    """Self-attention of the rows alone ``[T, E]``."""

    def attend(x: Tensor) -> Tensor | None:
        (batch, length, width), heads = src.shape, attention.num_heads
        projections = _mha_direct.parameters_of(attention, x.dtype)
        if projections is None or backends.default_for(x.device, attention.backend) != "torch":
            return None
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            padding = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, NEGATIVE_INFINITY)
        else:
            padding = hidden
        mask = _mha_direct.added(attn_mask, padding, x.dtype, (batch, heads, length, length))
        if mask is None or length >= sdpa.FEWEST_ROWS_OF_TILES:
            return None
        in_weight, in_bias, out_weight, out_bias = projections
        projected = _linear(x, _Linear(in_weight, in_bias))
        sides = projected.new_zeros(batch * length, 3 * width).index_copy_(0, rows, projected)
        q, k, v = sides.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
        attended = sdpa.torch_sdpa(q, k, v, mask)
        merged = attended.transpose(1, 2).reshape(-1, width).index_select(0, rows)
        output = _linear(merged, _Linear(out_weight, out_bias))
        return output if is_finite(output) else None

    return attend
