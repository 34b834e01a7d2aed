"""The formula as an exported graph holds it, for calls that ``F.scaled_dot_product_attention`` cannot express.

An exported graph may be run where this package is not installed, so that it may not hold this package's operators, and
a loop over blocks of rows would fix their number when the graph is made. So all scores are made at once, as
``nn.MultiheadAttention`` makes them with weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.functions.as_words import score_function, with_mask
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import is_autocast_enabled, without_autocast
from fastattn.ops.common.tracing import promise_not_empty


def run(call: AttentionCall, keep: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` by plain torch, reading no values."""
    for size in (call.query.shape[2], call.key.shape[2]):
        promise_not_empty(size)
    call = with_mask(call)
    hides = any(t is not None for t in (call.bias, call.mask, call.key_padding_mask, call.upper))
    plain = call.is_plain and not (call.return_lse or hides) and call.query.shape[1] == call.key.shape[1]
    # the call has autocast's dtype already; a graph that left it on would compute some of its steps in another
    on = is_autocast_enabled(call.device)
    with without_autocast(call.device):
        # strict export types what is inside autocast as if it were off, and checks that type at every cast
        narrow = on and call.is_plain and not call.return_lse
        compute = call.query.dtype if narrow else statistics_dtype(call.query.dtype)
        output, weights, lse = (*_textbook(call, keep), None) if plain else _reference(call, keep, compute)
    if call.weights == "average":
        weights = weights.mean(dim=1)
    return output, None if call.weights == "none" else weights, lse if call.return_lse else None


def _textbook(call: AttentionCall, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and weights where every query sees every key: the four operators that torch's own module exports."""
    weights = torch.softmax((call.query * call.scale) @ call.key.transpose(2, 3), dim=-1)
    if keep is not None:
        weights = weights * keep * (1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0)
    return weights @ call.value, weights


def _reference(call: AttentionCall, keep: Tensor | None, compute: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and LSE by the reference, computed in the dtype ``compute``."""
    given = call.query.dtype
    query, key, value = (t if compute == given else t.to(compute) for t in (call.query, call.key, call.value))
    found = reference.attention(
        query,
        key,
        value,
        bias=call.bias,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        mask=call.mask,
        key_padding_mask=call.key_padding_mask,
        query_documents=call.query_documents,
        key_documents=call.key_documents,
        prefix=call.prefix,
        lower=call.lower,
        upper=call.upper,
        shift=call.shift,
        softcap=call.softcap,
        score_mod=score_function(call),
        scale=call.scale,
        dropout_keep=keep,
        dropout_p=call.dropout_p,
    )
    if compute == given:
        return found
    return found.output.to(given), found.weights.to(given), found.lse
