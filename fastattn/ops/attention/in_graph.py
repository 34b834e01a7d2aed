"""The formula in plain torch in a graph of torch.compile for the CPU, whose code Inductor makes of it.

Inductor does not look into an operator. What it makes of the formula keeps no order of blocks, but fuses everything
between the two products, and for few scores takes a third to nine tenths of the operators' time. The scores are made at
once, so that many of them are left to the operators, and so is a call whose sizes the graph leaves open.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import without_autocast
from fastattn.ops.common.tracing import is_known, is_recorded
from fastattn.reference.attention import NEGATIVE_INFINITY

# Scores that the graph makes at once: in evaluation, in training, and where the weights are returned, for which torch's
# own module makes them at once too. In evaluation 2^20 scores take 0.8 to 1.2 times the operators' time, by how much is
# hidden, and 2^21 up to 1.2; a training step of 2^21 takes 0.8 to 1.1 times theirs; and with weights 2^22 take half.
MOST_EVALUATED, MOST_TRAINED, MOST_WITH_WEIGHTS = 1 << 20, 1 << 21, 1 << 22
# The operators compute the scores of a band so many times as wide as a window.
_OF_WINDOW = 4


def takes(call: AttentionCall) -> bool:
    """Does the graph that is traced hold the formula of this call?"""
    if not torch.compiler.is_compiling() or is_recorded() or call.device.type != "cpu" or call.is_modified:
        return False
    (batch, heads, length, _), keys = call.query.shape, call.key.shape[2]
    most = MOST_TRAINED if torch.is_grad_enabled() else MOST_EVALUATED
    if call.weights != "none":
        most = MOST_WITH_WEIGHTS
    scores = batch * heads * length * keys
    # Sizes that are known alone: a bound on one that is left open would have every length compiled anew.
    if not (is_known(scores > 0) and is_known(scores <= most)):
        return False
    if call.lower is None or call.upper is None:
        return True
    return is_known(scores * keys <= most * _OF_WINDOW * (call.upper - call.lower + 1))


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``, reading no values."""
    with without_autocast(call.device):
        output, weights, lse = _plain(call) if sees_all(call) else _reference(call)
        output = output if output.dtype == call.query.dtype else output.to(call.query.dtype)
        if call.weights == "none":
            weights = None
        else:
            weights = (weights.mean(dim=1) if call.weights == "average" else weights).to(call.query.dtype)
        return output, weights, lse if call.return_lse else None


def sees_all(call: AttentionCall) -> bool:
    """Is it known without a look at values that every query sees a key, and every key is seen by a query? A window and
    causality say so by their bounds, and documents of self-attention by the diagonal."""
    hiding = (call.mask, call.bias, call.key_padding_mask, call.prefix)
    if any(argument is not None for argument in hiding):
        return False
    length, keys, lower, upper = call.query.shape[2], call.key.shape[2], call.lower, call.upper
    if call.query_documents is not None:
        on_diagonal = (lower is None or is_known(lower <= 0)) and (upper is None or is_known(upper >= 0))
        return call.query_documents is call.key_documents and is_known(length == keys) and on_diagonal
    if lower is not None and not (is_known(lower <= 0) and is_known(length - 1 + lower < keys)):
        return False
    return upper is None or (
        is_known(upper >= 0) and is_known(upper >= keys - length) and (lower is None or is_known(lower <= upper))
    )


def _operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    compute, groups = statistics_dtype(call.query.dtype), call.query.shape[1] // call.key.shape[1]
    query, key, value = (t.to(compute) for t in (call.query, call.key, call.value))
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return query, key, value


def _kept(call: AttentionCall, scores: tuple[int, ...]) -> Tensor | None:
    """Boolean, of the shape of the scores: which weights dropout keeps."""
    return None if call.dropout_p == 0.0 else torch.rand(scores, device=call.device) >= call.dropout_p


def _offsets(call: AttentionCall, dtype: torch.dtype) -> Tensor:
    """``[L, S]``: by how many places key ``j`` is behind query ``i``, ``j - i``."""
    rows, keys = (
        torch.arange(size, dtype=dtype, device=call.device) for size in (call.query.shape[2], call.key.shape[2])
    )
    return keys - rows[:, None]


def _visible(call: AttentionCall) -> Tensor | None:
    """Boolean ``[B | 1, 1, L, S]`` of the rules of a call that :func:`sees_all`; None where there are none."""
    found = []
    if call.upper is not None:  # in int32: of the int64 that torch.tril takes half as many fit a vector of the CPU's
        found.append(_offsets(call, torch.int32) <= call.upper)
    if call.lower is not None:
        found.append(_offsets(call, torch.int32) >= call.lower)
    if call.query_documents is not None and call.key_documents is not None:
        found.append(call.query_documents[:, None, :, None] == call.key_documents[:, None, None, :])
    return functools.reduce(torch.Tensor.logical_and, found) if found else None


def _plain(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and LSE of a call in which nothing has to be put out of sight first."""
    query, key, value = _operands(call)
    scores = (query * call.scale) @ key.mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes[..., None, None] * (_offsets(call, scores.dtype) - call.shift).abs()
    visible = _visible(call)
    if visible is not None:
        scores = torch.where(visible, scores, NEGATIVE_INFINITY)
    if call.sinks is None:
        weights, lse = scores.softmax(dim=-1), scores.logsumexp(dim=-1)
    else:
        sinks = call.sinks[..., None, None].to(scores.dtype)
        largest = torch.maximum(scores.detach().amax(dim=-1, keepdim=True), sinks.detach())
        terms = torch.exp(scores - largest)
        total = terms.sum(dim=-1, keepdim=True) + torch.exp(sinks - largest)
        weights, lse = terms / total, (largest + total.log()).squeeze(-1)
    if visible is not None and call.weights != "none":  # 0 already, but their gradients may be NaN
        weights = torch.where(visible, weights, 0)
    if (keep := _kept(call, weights.shape)) is not None:
        weights = weights * keep * (1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0)
    return weights @ value, weights, lse


def _reference(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and LSE by the reference, which puts out of sight what nobody sees."""
    query, key, value = _operands(call)
    rules = ("bias", "alibi_slopes", "sinks", "mask", "key_padding_mask", "query_documents", "key_documents", "prefix")
    words = ("lower", "upper", "shift", "softcap", "scale", "dropout_p")
    keep = _kept(call, (*query.shape[:3], key.shape[2]))
    return reference.attention(
        query, key, value, **{name: getattr(call, name) for name in (*rules, *words)}, dropout_keep=keep
    )
