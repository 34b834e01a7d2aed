"""Additive attention on the torch backend: the formula for eager calls that are small, else blocks of rows."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference
from fastattn.ops.additive_attention import formula, operator
from fastattn.ops.additive_attention.contract import AdditiveAttentionCall
from fastattn.ops.common.tracing import is_eager_on_cpu, is_recorded


def describe(call: AdditiveAttentionCall) -> str:
    """Which of the two forms the call takes."""
    is_short = is_eager_on_cpu(call.query) and formula.takes(call)
    return "the formula in plain torch" if is_short else "plain torch in blocks of rows"


def run(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)``."""
    # its sizes are looked at last: a graph may leave them open
    if is_eager_on_cpu(call.query) and formula.takes(call) and (found := formula.run(call)) is not None:
        return found[0], found[1] if call.needs_weights else None
    if is_recorded() or formula.takes_in_graph(call):
        return _recorded(call)
    return operator.apply(call, "torch")


def _recorded(call: AdditiveAttentionCall) -> tuple[Tensor, Tensor | None]:
    """The call as a graph has it: the reference's formula, of torch's own operators alone."""
    masks = (call.bias, call.mask, call.key_padding_mask, call.upper)
    if not is_recorded() and all(mask is None for mask in masks):
        found = formula.run(call)
        assert found is not None  # only masks make it look at values
        return found[0], found[1] if call.needs_weights else None
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
