"""Additive attention on the torch backend: the formula where the intermediate fits one block, else blocks of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops.additive_attention import operator
from fastattn.ops.additive_attention.blocks import block_elements
from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common.tracing import is_eager_on_cpu, is_recorded
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY


def describe(call: AdditiveAttentionCall) -> str:
    """Which of the two forms the call takes."""
    return "the formula in plain torch" if _is_small(call) else "plain torch in blocks of rows"


def run(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)``."""
    if _is_small(call):
        output, weights, trusted = _formula(call)
        if trusted:
            return output, weights if call.needs_weights else None
    if is_recorded():
        return _recorded(call)
    return operator.apply(call, "torch")


def _recorded(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor | None]:
    """The call as an exported graph has it: the reference's formula, of torch's own operators alone."""
    output, weights = reference.additive_attention(
        call.query,
        call.key,
        call.value,
        call.weight,
        bias=call.bias,
        mask=call.mask,
        key_padding_mask=call.key_padding_mask,
        upper=call.upper,
    )
    return output, weights if call.needs_weights else None


def _is_small(call: AdditiveAttentionCall) -> bool:
    """Is this an eager CPU call whose intermediate ``[B, H, L, S, A]`` fits one block, so that the formula runs it?

    For a decoder's single step the operators would take three times as long as the formula. In training the formula
    keeps its intermediate for the backward, and a decoder keeps one for every step. That memory is worth its price:
    with the operators for all calls of more than 2^14 elements ``Seq2Seq.loss`` and its backward would take 1.5 to 1.9
    times as long (batches of 8 to 64, sources of 25 to 65, on one core), and keep a third as much (2.5 MiB, not 7.2).
    """
    query, keys = call.query, call.key.shape[2]
    return (
        query.dtype in (torch.float32, torch.float64)
        and is_eager_on_cpu(query)  # before its sizes are looked at, which a graph may leave open
        and 0 < query.numel() * keys <= block_elements(query.device)
    )


def _formula(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor, bool]:
    """Output and weights by the textbook, and whether to trust them. A row that sees nothing, and NaN or inf in hidden
    keys, make the sum of the results not finite; such a call is left to the blocks."""
    bent = torch.tanh(call.query[..., :, None, :] + call.key[..., None, :, :])
    shared = call.weight.shape[0] == 1
    scores = bent @ call.weight[0] if shared else (bent @ call.weight[:, None, :, None]).squeeze(-1)
    mask, value = _merged_mask(call), call.value
    if mask is not None:
        scores = scores + mask
        # A value that no row sees may be so large that its product with a gradient is inf, and 0 * inf is NaN.
        value = value.masked_fill((mask == NEGATIVE_INFINITY).all(dim=-2)[..., None], 0)
    found = weights = torch.softmax(scores, dim=-1)
    if mask is not None and weights.requires_grad:
        # These weights are 0 already. Filling them in stops gradients here, where NaN would reach a pair's whole row.
        weights = weights.masked_fill(mask == NEGATIVE_INFINITY, 0)
    output = weights @ value
    trusted = mask is None or math.isfinite(sum(t.detach().sum().item() for t in (found, output, call.key)))
    return output, weights, trusted


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
