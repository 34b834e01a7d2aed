"""The torch backend: ``F.scaled_dot_product_attention`` where it can express the call, else plain torch.

Eager calls on a CPU take the first of four paths that serves them, in memory linear in the length:

* ``tiles``: torch's kernel over the keys that each tile of rows may see, in evaluation;
* ``sdpa``: torch's kernel over the whole call;
* ``formula``: the textbook, for small calls with weights or dropout;
* ``blocks``, behind the operators: everything, a block of rows at a time.

A path that finds, at a look at the numbers, that it would be wrong or slow leaves the call to the next. In a graph,
under ``torch.func`` and on other devices nothing looks at numbers, and SDPA and the operators share the calls; where a
graph is for others, ``recorded`` writes down what SDPA has no words for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention import dropout, formula, operator, recorded, tiles
from fastattn.ops.attention import sdpa as torch_sdpa
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.common.tracing import is_eager_on_cpu, is_functorch_active, is_recorded, is_traced, is_transformed


def describe(call: AttentionCall) -> str:
    """Which of the paths the call takes."""
    sdpa, looks = "F.scaled_dot_product_attention", _may_look(call)
    if looks and tiles.takes(call):
        return f"{sdpa}, over the keys that each tile of rows may see if that leaves out many"
    if torch_sdpa.takes(call) if looks else sdpa_serves_unseen(call):
        return sdpa
    if looks and formula.takes(call):
        return "the formula in plain torch (weights or dropout are asked for, and the scores fit one block)"
    if not call.is_plain:
        return f"plain torch in blocks of rows ({sdpa} has not all of its terms)"
    if call.weights != "none" or call.return_lse:
        return "plain torch in blocks of rows (weights or LSE are asked for)"
    return f"plain torch in blocks of rows ({sdpa} would make all scores, or a mask as large)"


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``."""
    if not _may_look(call):
        return _run_unseen(call)
    whole = torch_sdpa.takes(call)
    if whole and not torch_sdpa.hides(call):
        return torch_sdpa.attend(torch_sdpa.without_keys_past_the_diagonal(call), None), None, None
    by_tiles = tiles.takes(call)
    if (by_tiles or whole) and torch_sdpa.is_tame(call):
        output = None
        if by_tiles:
            output = tiles.run(call, *operator.operands(call, None, "torch"), may_decline=whole)
        if output is None and whole:
            output = torch_sdpa.run(call)
        if output is not None:
            return output, None, None
    keep = None if call.dropout_p == 0.0 else dropout.draw(call.query, call.key.shape[2], call.dropout_p)
    if formula.takes(call) and (found := formula.run(call, keep)) is not None:
        return *found, None
    return operator.apply(call, keep, "torch")


def _may_look(call: AttentionCall) -> bool:
    """Is this a call whose numbers may be looked at, and whose derivatives are those of reverse mode?"""
    return is_eager_on_cpu(call.query) and torch.autograd.forward_ad._current_level < 0


def _run_unseen(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`run` for graphs, ``torch.func``, forward mode and other devices."""
    if sdpa_serves_unseen(call):
        return torch_sdpa.run_unseen(call), None, None
    keep = None if call.dropout_p == 0.0 else dropout.draw(call.query, call.key.shape[2], call.dropout_p)
    if is_recorded():
        return recorded.run(call, keep)
    return operator.apply(call, keep, "torch")


def sdpa_serves_unseen(call: AttentionCall) -> bool:
    """Does SDPA have words for the call, and right derivatives of every kind that may be asked for?"""
    if not torch_sdpa.can_express(call):
        return False
    on_cpu, bias = call.device.type == "cpu", call.bias
    if not is_traced():
        if call.dropout_p > 0.0 and is_functorch_active():
            return False  # SDPA draws in place, and so cannot draw anew for each sample of a vmap
        if call.dropout_p == 0.0 and on_cpu and is_transformed():
            return False  # SDPA's CPU kernel has no rules for them
    if bias is None:
        return True
    if bias.dtype != call.query.dtype and not (on_cpu and bias.dtype == torch.float32):
        return False
    # all keys of a row may carry a large bias, beside which the CPU kernel's gradients are wrong
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value))
    return not (on_cpu and trains) or is_recorded()
