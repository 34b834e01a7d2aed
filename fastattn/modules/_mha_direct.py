"""The short way of ``MultiheadAttention`` on the CPU: projection, attention and projection back without a detour.

Of a small call most of the time is Python's, and autograd's nodes. Here one look at the arguments tells whether the
call is of the kind that most are: plain tensors, one packed projection, no dropout, masks of the shapes that torch's
module takes. In inference a few functions of torch run it; where gradients are wanted, one Function of autograd does,
in the place of two dozen nodes. Any doubt leaves a call to the long way, which also has the words for what is wrong
with it; and so does a result under a mask that is not finite, since NaN and inf at hidden places are to reach nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fastattn.modules import _mha_core
from fastattn.modules._mha_compute import is_taken_as_causal
from fastattn.modules._mha_core import Plan
from fastattn.modules._mha_masks import sum_of_biases
from fastattn.ops.attention import sdpa
from fastattn.ops.attention.contract import Weights
from fastattn.ops.attention.flash import is_worth_tiles, widens
from fastattn.ops.common import backends
from fastattn.ops.common.checks import DTYPES
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.short_way import is_looked_at
from fastattn.reference.attention import NEGATIVE_INFINITY

_PLAIN = (Tensor, Parameter)
# torch's one function for self-attention in inference. A row that sees nothing, and what padding holds, is NaN in it.
_NATIVE: Any = torch._native_multi_head_attention
# What is added to a score of a key that is not seen, and of one that is.
_ADDED = {
    dtype: tuple(torch.tensor(value, dtype=dtype, device="cpu") for value in (NEGATIVE_INFINITY, 0.0))
    for dtype in DTYPES
}
# Weights, and scores in the other of these two dtypes, would be rounded to 16 bits.
_FULL = (torch.float32, torch.float64)
# Elements of the scores up to which that function, which makes all of them, is faster than the kernel that makes none:
# on one core of a server CPU, and on more, to each of which the kernel gives whole blocks of rows. The same under a
# mask, for which the function has a slow softmax. And the scores up to which weights are made at once, and not a block
# of rows at a time: in training as many as torch's module keeps for its backward in 16 MiB; blocks would make them
# twice.
_MOST_NATIVE, _MOST_NATIVE_OF_THREADS = 1 << 14, 1 << 17
_MOST_NATIVE_MASKED = 1 << 12
_MOST_SCORES, _MOST_SCORES_TRAINED = 1 << 21, 1 << 22
# Elements of the query up to which training is one node of autograd. What a node has saved is there until its end: in a
# larger call that is memory that torch has released by then, and the nodes' time counts for nothing.
_MOST_IN_ONE_NODE = 1 << 17
# The largest bias for all keys of a row beside which the kernel's gradients are right; see ``ops.attention.sdpa``.
_LARGEST_BIAS = 64.0


def attend(
    module: nn.MultiheadAttention,
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Output and weights (None where none are asked for) of a call of ``module``; None where it has to take the long
    way. The arguments are those of the module."""
    kind = type(query)
    if (kind is not Tensor and kind is not Parameter) or query.is_nested or key is not value or is_looked_at():
        return None
    dtype, shape, embed_dim = query.dtype, query.shape, module.embed_dim
    if len(shape) != 3 or shape[2] != embed_dim or dtype not in DTYPES or not query.numel():
        return None
    if backends.default_for(query.device, backend) != "torch" or torch._C._is_any_autocast_enabled():
        return None
    if query.layout is not torch.strided or (module.training and module.dropout != 0.0):
        return None
    parameters = parameters_of(module, dtype)
    if parameters is None:
        return None
    in_weight, in_bias, out_weight, out_bias = parameters
    heads, batch_first = module.num_heads, module.batch_first
    batch, length = (shape[0], shape[1]) if batch_first else (shape[1], shape[0])
    memory, keys = None, length
    if key is not query:
        memory, keys = key, _keys_of(key, query, batch_first)
        if keys is None:
            return None
    trains = torch.is_grad_enabled() and (
        in_weight.requires_grad
        or query.requires_grad
        or key.requires_grad
        or out_weight.requires_grad
        or (in_bias is not None and in_bias.requires_grad)
        or (out_bias is not None and out_bias.requires_grad)
    )
    if is_causal:
        if attn_mask is None or not _is_mask(attn_mask, dtype) or attn_mask.dim() not in (2, 3):
            return None  # an error, as a rule
        is_causal = is_taken_as_causal(key_padding_mask, need_weights)
        if is_causal:
            if length != keys:
                return None
            attn_mask = None
    hides = attn_mask is not None or key_padding_mask is not None
    scores = batch * heads * length * keys
    most = _MOST_SCORES_TRAINED if trains else _MOST_SCORES
    if (dtype not in _FULL or scores > most) if need_weights else not torch._C._get_flash_sdp_enabled():
        return None
    if not need_weights and widens(dtype, trains, scores):
        return None
    if is_causal and not trains and is_worth_tiles(length):
        return None
    if trains and not need_weights and query.numel() > _MOST_IN_ONE_NODE:
        return None
    if not (trains or is_causal or memory is not None) and batch_first:
        without = _MOST_NATIVE if torch.get_num_threads() == 1 else _MOST_NATIVE_OF_THREADS
        most = _MOST_NATIVE_MASKED if hides else _MOST_SCORES if need_weights else without
        if scores <= most and heads % 2 == 0 and dtype in _FULL:
            result = _native(
                query, parameters, key_padding_mask, attn_mask, embed_dim, heads, need_weights, average_attn_weights
            )
            if result is not None:
                return result
    mask, is_bias = None, False
    if hides:
        mask = added(attn_mask, key_padding_mask, dtype, (batch, heads, length, keys))
        if mask is None or (length >= sdpa.FEWEST_ROWS_OF_TILES and not (trains or need_weights or _is_of_heads(mask))):
            return None
        given = key_padding_mask if attn_mask is None else attn_mask
        is_bias = given is not None and given.dtype != torch.bool
        if is_bias and trains and not need_weights and _is_large(mask):
            return None
    words: Weights = "none" if not need_weights else "average" if average_attn_weights else "heads"
    plan = Plan(heads, batch_first, is_causal, is_bias, words)
    run = _mha_core.attend if trains else _mha_core.infer
    output, weights = run(plan, mask, query, memory, in_weight, in_bias, out_weight, out_bias)
    return (output, weights) if mask is None or is_finite(output) else None


def parameters_of(module: nn.MultiheadAttention, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Weight and bias of both projections; None where one is none of the module's own, or not as it is in most modules.

    Looks where ``nn.Module`` keeps parameters: asking the module takes a third of a microsecond for each.
    """
    own = module._parameters
    try:
        of_output = module._modules["out_proj"]._parameters  # type: ignore[union-attr]
        found = own["in_proj_weight"], own["in_proj_bias"], of_output["weight"], of_output["bias"]
    except (KeyError, AttributeError):
        return None
    in_weight, in_bias, out_weight, out_bias = found
    if in_weight is None or out_weight is None:
        return None
    if type(in_weight) not in _PLAIN or type(out_weight) not in _PLAIN or module.bias_k is not None:
        return None
    if in_weight.dtype != dtype or out_weight.dtype != dtype or module.add_zero_attn or module.bias_v is not None:
        return None
    embed_dim = module.embed_dim
    if in_weight.shape != (3 * embed_dim, embed_dim) or out_weight.shape != (embed_dim, embed_dim):
        return None
    for bias, size in ((in_bias, 3 * embed_dim), (out_bias, embed_dim)):
        if bias is not None and not (type(bias) in _PLAIN and bias.dtype == dtype and bias.shape == (size,)):
            return None
    return found if embed_dim % module.num_heads == 0 else None


def _keys_of(key: Tensor, query: Tensor, batch_first: bool) -> int | None:
    """The number of keys; None where they do not go with the query."""
    if not _is_dense(key):  # first, since a nested tensor has no shape
        return None
    shape, of_query, axis = key.shape, query.shape, 0 if batch_first else 1
    if len(shape) != 3 or key.dtype != query.dtype or not key.numel():
        return None
    return shape[1 - axis] if shape[2] == of_query[2] and shape[axis] == of_query[axis] else None


def _native(
    query: Tensor,
    parameters: tuple[Any, ...],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    embed_dim: int,
    heads: int,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Self-attention in inference by torch's one function for it, whose numbers are those of ``nn.MultiheadAttention``
    to the bit; None where it does not take the call, or where the result is not finite under a mask."""
    weight, bias, out_weight, out_bias = parameters
    if bias is None or out_bias is None:
        return None
    hidden, kind = key_padding_mask, 1
    if key_padding_mask is not None and not (
        _is_mask(key_padding_mask, torch.bool) and key_padding_mask.shape == query.shape[:2]
    ):
        return None
    if attn_mask is not None:
        length = query.shape[1]
        if not _is_mask(attn_mask, torch.bool) or attn_mask.shape != (length, length):
            return None
        hidden, kind = attn_mask, 0
        if key_padding_mask is not None:
            hidden, kind = attn_mask | key_padding_mask[:, None, None], 2
            hidden = hidden.expand(-1, heads, -1, -1)
    output, weights = _NATIVE(
        query, query, query, embed_dim, heads, weight, bias, out_weight, out_bias, hidden, need_weights,
        average_attn_weights, None if hidden is None else kind,
    )  # fmt: skip
    if hidden is not None and not is_finite(output):
        return None
    return output, weights if need_weights else None


def _is_dense(tensor: Any) -> bool:
    """Is this a tensor of torch's own class that has sizes and strides?"""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def _is_mask(mask: Tensor, dtype: torch.dtype) -> bool:
    """Is this a mask on the CPU, boolean or of this dtype, without a gradient?"""
    if not _is_dense(mask) or mask.device.type != "cpu" or mask.requires_grad:
        return False
    return mask.dtype == torch.bool or mask.dtype == dtype


def added(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, scores: tuple[int, int, int, int]
) -> Tensor | None:
    """Both masks as one ``[L, S]`` or ``[N, H | 1, L | 1, S]``, that is added to scores; None where the long way has to
    look at them, or would make less of them."""
    batch, heads, length, keys = scores
    mask = attn_mask
    if attn_mask is not None:
        if not _is_mask(attn_mask, dtype):
            return None
        if attn_mask.shape == (batch * heads, length, keys):
            mask = attn_mask.unflatten(0, (batch, heads))
        elif attn_mask.shape != (length, keys):
            return None
    if key_padding_mask is not None:
        if not _is_mask(key_padding_mask, dtype) or key_padding_mask.shape != (batch, keys):
            return None
        padding = key_padding_mask.view(batch, 1, 1, keys)
        if mask is None:
            mask = padding
        elif mask.numel() * (batch if mask.dim() == 2 else 1) > sdpa.MOST_MERGED or mask.dtype != padding.dtype:
            return None
        elif mask.dtype == torch.bool:
            mask = mask | padding
        else:
            mask = sum_of_biases(mask, padding)
    assert mask is not None
    if mask.dtype != torch.bool:
        return mask
    hiding, seeing = _ADDED[dtype]
    return torch.where(mask, hiding, seeing) if mask.numel() <= sdpa.MOST_MERGED else None


def _is_of_heads(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[1] != 1


def _is_large(mask: Tensor) -> bool:
    """Is there a row that sees nothing, or whose every key carries a large bias?"""
    low, high = (t.item() for t in mask.amax(dim=-1).aminmax())
    return not -_LARGEST_BIAS <= low <= high <= _LARGEST_BIAS
