"""The formula as a path of the torch backend: calls on a CPU with few tangents, or with few queries.

The operators, their autograd rules and their checks cost more than such a call itself. In training the formula keeps
its tangents ``[B, H, L, S, A]`` for the backward, and a decoder keeps them for every step; that is what textbook code
keeps, and half of what it makes. With the operators for all calls of more than 2^14 tangents ``Seq2Seq.loss`` and its
backward would take 1.5 to 1.9 times as long (batches of 8 to 64, sources of 25 to 65, on one core), and keep a third as
much (2.5 MiB, not 7.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.tracing import is_known
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

DTYPES = (torch.float32, torch.float64)
# From so many tangents on the operators are faster in evaluation.
MOST_TANGENTS = 1 << 21
# In training they make each tangent twice, which takes 0.5 ns on one maker's processors and 2.1 on another's, where
# this form has to write it and to read it again, 16 MiB of them at most: 2^22 take 15.1 and 15.7 ms of a step in this
# form, and 14.4 and 22.1 behind the operators.
MOST_IN_TRAINING = 1 << 22
# In a graph of torch.compile, whose code takes 2 ns to make a tangent, and the operators' 0.5.
_MOST_COMPILED, _MOST_COMPILED_IN_TRAINING = 1 << 18, 1 << 19
# With so few queries the tangents are not much more than the key and its gradient.
_FEW_QUERIES = 4


def is_small(query: Tensor, key: Tensor) -> bool:
    """Does the formula take a call of this query and key, ``[..., L, A]`` and ``[..., S, A]``?"""
    length, tangents = query.shape[-2], query.numel() * key.shape[-2]
    if tangents <= MOST_TANGENTS:
        return tangents > 0
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return trains and MOST_TANGENTS > 0 and (tangents <= MOST_IN_TRAINING or length <= _FEW_QUERIES)


def takes(call: AdditiveAttentionCall) -> bool:
    """Can the formula run this eager CPU call?"""
    return call.query.dtype in DTYPES and is_small(call.query, call.key)


def takes_in_graph(call: AdditiveAttentionCall) -> bool:
    """Does a graph that torch.compile makes for a CPU hold the formula of this call, for its compiler to see into?
    Sizes that the graph leaves open are no reason to: each would be compiled anew."""
    if not torch.compiler.is_compiling() or call.device.type != "cpu" or call.query.dtype not in DTYPES:
        return False
    length, tangents = call.query.shape[2], call.query.numel() * call.key.shape[2]
    if not is_known(tangents > 0):
        return False
    if not torch.is_grad_enabled():
        return is_known(tangents <= _MOST_COMPILED)
    few = is_known(length <= _FEW_QUERIES) and is_known(tangents <= MOST_TANGENTS)
    return few or is_known(tangents <= _MOST_COMPILED_IN_TRAINING)


def run(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor] | None:
    """Output ``[B, H, L, Dv]`` and weights ``[B, H, L, S]`` of a call; None where it is left to the blocks."""
    (batch, heads), mask, hidden = call.query.shape[:2], _merged_mask(call), None
    if mask is not None:
        hidden = mask == NEGATIVE_INFINITY
        mask, hidden = (t.expand(batch, heads, *t.shape[2:]).flatten(0, 1) for t in (mask, hidden))
    query, key, value = (t.flatten(0, 1) for t in (call.query, call.key, call.value))
    weight = call.weight[0] if call.weight.shape[0] == 1 else call.weight.repeat(batch, 1)
    found = attend(query, key, value, weight, mask, hidden)
    return None if found is None else (found[0].unflatten(0, (batch, heads)), found[1].unflatten(0, (batch, heads)))


def attend(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Output and weights by the textbook; None where they are not to be trusted. A row that sees nothing, and NaN or
    inf in hidden keys, make the sum of the results not finite; such a call is left to the blocks.

    Args:
        query: ``[G, L, A]``.
        key: ``[G, S, A]``.
        value: ``[G, S, Dv]``.
        weight: ``[A]``, or ``[G, A]``.
        mask: added to the scores, ``[G, L | 1, S | 1]``.
        hidden: boolean, True where the mask, or else this alone, hides a pair.
    """
    steps = query.shape[1] == 1
    # one query for each key broadcasts as it is, and two views take a tenth of a decoder's step
    tangents = (query + key if steps else query.unsqueeze(2) + key.unsqueeze(1)).tanh_()
    if weight.dim() == 1:
        scores = tangents @ weight
    else:
        scores = torch.bmm(tangents if steps else tangents.flatten(1, 2), weight.unsqueeze(2)).squeeze(2)
        scores = scores if steps else scores.unflatten(1, (-1, key.shape[1]))
    if steps:
        scores = scores.unsqueeze(1)
    if hidden is None:
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights, value), weights
    scores = scores.masked_fill(hidden, NEGATIVE_INFINITY) if mask is None else scores + mask
    found = weights = torch.softmax(scores, dim=-1)
    trains = weights.requires_grad or value.requires_grad
    if trains:
        # These weights are 0 already. Filling them in stops gradients here, where NaN would reach a pair's whole row.
        weights = weights.masked_fill(hidden, 0)
        # A value that no row sees may be so large that its product with a gradient is inf, and 0 * inf is NaN.
        unseen = hidden if hidden.shape[1] == 1 else hidden.all(dim=1, keepdim=True)
        value = value.masked_fill(unseen.mT, 0)
    output = torch.bmm(weights, value)
    # In evaluation the output shows what is wrong with the weights, if it has columns; in training it is filled in.
    looked_at = (found, output, key) if trains or not output.shape[2] else (output,)
    if not is_finite(*looked_at):
        return None
    return output, weights


def _merged_mask(call: AdditiveAttentionCall) -> Tensor | None:
    """One mask that is added to the scores and stands for all of the call's masks; None where there are none."""
    visible = call.mask
    if call.upper is not None or call.key_padding_mask is not None:
        visible = visibility(
            call.query.shape[2],
            call.key.shape[2],
            upper=call.upper,
            mask=call.mask,
            key_padding_mask=call.key_padding_mask,
            device=call.device,
        )
    bias = None if call.bias is None else call.bias.to(call.query.dtype)
    if visible is None:
        return bias
    return torch.where(visible, 0.0 if bias is None else bias, NEGATIVE_INFINITY).to(call.query.dtype)
