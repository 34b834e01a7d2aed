"""The formula as a path of the torch backend: small eager calls on a CPU with weights, dropout, a trained bias, or
terms that torch's kernel has not.

The operators, their autograd rules and their checks cost more than such a call itself. All scores are made at once, in
float32 or better as in the blocks, so that the same call has the same errors with weights and without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention import cutting
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.sdpa import merged_mask
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import without_autocast
from fastattn.ops.common.finite import is_finite
from fastattn.reference import distances
from fastattn.reference.attention import NEGATIVE_INFINITY

# A call that trains a bias may keep its weights for the backward while they are this many times as long as a head is
# wide, so that they take no more than a few times the memory of query, key and value, and as many blocks. The blocks
# would compute them again: 22 ms for a step of 4 sequences of 256 with 8 heads of 32, and 13 in this form.
_KEPT_KEYS = 8
_KEPT_BLOCKS = 4
# Scores up to which a call with terms that torch's kernel lacks is faster in this form than in blocks. To train
# 2 sequences of 64 with 4 heads of 32 and a softcap takes 0.55 ms instead of 0.9.
_MOST_WITH_TERMS = 1 << 17
# The norm of values from which on they may be garbage that nobody sees, whose products with a gradient overflow.
_LARGE = 1e9


def takes(call: AttentionCall) -> bool:
    """Can the formula run this eager call, without an LSE, prefixes or functions, and of few scores?"""
    query, key = call.query, call.key
    if call.return_lse or call.prefix is not None or call.is_modified or query.shape[1] != key.shape[1]:
        return False
    most = cutting.BLOCK_ELEMENTS if call.is_plain else min(_MOST_WITH_TERMS, cutting.BLOCK_ELEMENTS)
    trains_bias = call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled()
    if trains_bias and key.shape[2] <= _KEPT_KEYS * query.shape[3]:
        most *= _KEPT_BLOCKS
    return 0 < query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= most


def _is_moderate(value: Tensor) -> bool:
    """Are the values finite, and so small that no gradient of a training that works makes their products overflow?"""
    return value.detach().norm().item() < _LARGE


def run(call: AttentionCall, keep: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Output and weights (None where none are asked for).

    None in place of both where a row sees nothing, or where the output is not finite, which may come from NaN or inf at
    hidden positions: the caller then leaves the call to the blocks, which handle both.
    """
    with without_autocast(call.device):
        return _run(call, keep)


def _with_alibi_as_bias(call: AttentionCall) -> AttentionCall:
    if call.alibi_slopes is None:
        return call
    compute = torch.promote_types(statistics_dtype(call.query.dtype), call.alibi_slopes.dtype)
    far = distances(call.query.shape[2], call.key.shape[2], call.shift, call.device).to(compute)
    alibi = call.alibi_slopes[..., None, None].to(compute) * -far
    return call._replace(alibi_slopes=None, bias=alibi if call.bias is None else call.bias + alibi)


def _run(call: AttentionCall, keep: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    call = _with_alibi_as_bias(call)
    query, mask, shape, hidden = call.query, merged_mask(call), call.query.shape[:3], None
    compute = statistics_dtype(query.dtype)
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden = ~mask
            mask = torch.where(mask, 0.0, NEGATIVE_INFINITY)  # added, not filled in: filling takes as long as a product
        compute = torch.promote_types(compute, mask.dtype)
        mask = mask if mask.dtype == compute else mask.to(compute)
    # flat, because a product of 4-D tensors is the same product under six more nodes of autograd
    query, key, value = (t.flatten(0, 1) for t in (query, call.key, call.value))
    if query.dtype != compute:
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    query = query * call.scale
    if mask is not None and mask.shape[:2] == (1, 1) and call.softcap is None:
        scores = torch.baddbmm(mask.squeeze(0), query, key.mT)
    else:
        scores = torch.bmm(query, key.mT)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if mask is not None:
            scores = (scores.view(*shape, -1) + mask).flatten(0, 1)
    if call.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = call.sinks[..., None, None].to(compute).expand(*shape, 1).flatten(0, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    found = weights
    if mask is not None and weights.requires_grad and not (call.weights == "none" and _is_moderate(value)):
        # These weights are 0 already. Filling them in stops gradients here, where NaN would reach a pair's whole row.
        hidden = mask == NEGATIVE_INFINITY if hidden is None else hidden
        if mask.shape[:2] == (1, 1):
            weights = weights.masked_fill(hidden.squeeze(0), 0)
        else:
            weights = weights.view(*shape, -1).masked_fill(hidden, 0).flatten(0, 1)
    if keep is not None:
        weights = weights * keep.flatten(0, 1) * (1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0)
    output = torch.bmm(weights, value)
    if mask is not None and not is_finite(found, output, key):
        return None
    output, weights = output.view(*shape, -1), weights.view(*shape, -1)
    if output.dtype != call.query.dtype:
        output = output.to(call.query.dtype)
    if call.weights == "none":
        return output, None
    weights = weights.mean(dim=1) if call.weights == "average" else weights
    return output, weights if weights.dtype == call.query.dtype else weights.to(call.query.dtype)
