"""The torch backend: ``F.scaled_dot_product_attention`` where it can express the call, else plain torch.

Eager calls on a CPU take the first of four paths that can run them, all in memory linear in the length:

* ``tiles``: torch's kernel over the keys that each tile of rows may see, in evaluation;
* ``sdpa``: torch's kernel over the whole call;
* ``formula``: the textbook, for small calls with weights or dropout;
* ``blocks``, behind the operators: everything, a block of rows at a time.

Some paths read the values in the tensors first, and leave the call to the next path where they would be wrong or slow.
In a graph, under ``torch.func`` and on other devices no values can be read (or only at the cost of a synchronisation):
there SDPA runs what it can express, and the operators the rest. In a graph that leaves this process ``recorded`` takes
the operators' place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention import dropout, formula, operator, recorded, tiles
from fastattn.ops.attention import sdpa as torch_sdpa
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.functions.as_words import in_words
from fastattn.ops.common.tracing import is_eager_on_cpu, is_functorch_active, is_recorded, is_traced, is_transformed


def describe(call: AttentionCall) -> str:
    """Which of the paths the call takes."""
    sdpa, looks = "F.scaled_dot_product_attention", _may_look(call)
    if call.is_modified and looks:
        call = in_words(call)
    if looks and tiles.takes(call):
        return f"{sdpa}, over the keys that each tile of rows may see if that leaves out many"
    if torch_sdpa.takes(call) if looks else sdpa_takes_unseen(call):
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
    if call.is_modified:
        call = in_words(call)
    whole = torch_sdpa.takes(call)
    if whole and not torch_sdpa.hides(call):
        return torch_sdpa.attend(torch_sdpa.without_keys_past_the_diagonal(call), None), None, None
    output, by_tiles = None, tiles.takes(call)
    if by_tiles and torch_sdpa.is_tame(call):
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
    """May this call's values be read, and are its derivatives those of reverse mode alone?"""
    return is_eager_on_cpu(call.query) and torch.autograd.forward_ad._current_level < 0


def _run_unseen(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`run` for graphs, ``torch.func``, forward mode and other devices."""
    if sdpa_takes_unseen(call):
        return torch_sdpa.run_unseen(call), None, None
    keep = None if call.dropout_p == 0.0 else dropout.draw(call.query, call.key.shape[2], call.dropout_p)
    if is_recorded():
        return recorded.run(call, keep)
    return operator.apply(call, keep, "torch")


def sdpa_takes_unseen(call: AttentionCall) -> bool:
    """Can SDPA express the call, and are its derivatives of every kind right, when no values can be read?"""
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
    # The CPU kernel's gradients are wrong where all keys of a row carry a large bias, which only the values would show.
    return not (on_cpu and torch_sdpa.trains(call)) or is_recorded()
