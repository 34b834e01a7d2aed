"""The torch backend: ``F.scaled_dot_product_attention`` where it can express the call, else plain torch.

Eager calls on a CPU take the first of four paths that can run them, all in memory linear in the length:

* ``tiles``: torch's kernel over the keys that each tile of rows may see, in evaluation;
* ``sdpa``: torch's kernel over the whole call;
* ``formula``: the textbook, for small calls with weights or dropout;
* ``blocks``, behind the operators: everything, a block of rows at a time.

Some paths read the values in the tensors first, and leave the call to the next path where they would be wrong or slow.
In a graph, under ``torch.func`` and on other devices no values can be read (or only at the cost of a synchronisation):
there SDPA runs what it can express, and the operators the rest. In a graph that leaves this process ``recorded`` takes
the operators' place, and ``in_graph`` for few scores in one that torch.compile makes for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention import blocks, dropout, flash, formula, in_graph, operator, recorded, tiles
from fastattn.ops.attention import sdpa as torch_sdpa
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.functions.as_words import in_words
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.tracing import is_eager_on_cpu, is_functorch_active, is_recorded, is_traced, is_transformed

# The output, the weights and the LSE, these two None where they are not asked for.
Found = tuple[Tensor, Tensor | None, Tensor | None]


def describe(call: AttentionCall) -> str:
    """Which of the paths the call takes."""
    sdpa, looks = "F.scaled_dot_product_attention", _may_look(call)
    if call.is_modified and looks:
        call = in_words(call)
    by_flash = call.dropout_p == 0.0 and flash.takes(*operator.operands(call, None, "torch"))
    if looks and _is_worth_flash(call) and by_flash:
        return "torch's fused CPU kernel, on each tile of rows over the keys that it may see"
    if looks and tiles.takes(call):
        return f"{sdpa}, over the keys that each tile of rows may see if that leaves out many"
    if torch_sdpa.takes(call) if looks else sdpa_takes_unseen(call):
        return sdpa
    if looks and formula.takes(call):
        return "the formula in plain torch (weights or dropout are asked for, and the scores fit one block)"
    if by_flash:
        return "torch's fused CPU kernel, on each tile of rows over the keys that it may see, behind operators"
    if not call.is_plain:
        return f"plain torch in blocks of rows ({sdpa} has not all of its terms)"
    if call.weights != "none" or call.return_lse:
        return "plain torch in blocks of rows (weights or LSE are asked for)"
    return f"plain torch in blocks of rows ({sdpa} would make all scores, or a mask as large)"


def run(call: AttentionCall) -> Found:
    """``(output, weights or None, lse or None)``."""
    if not _may_look(call):
        return _run_unseen(call)
    if call.is_modified:
        call = in_words(call)
    if _is_worth_flash(call) and (by_flash := _flashed(call)) is not None:
        return by_flash
    whole = torch_sdpa.takes(call) and not (_trains(call) and _is_widened(call, trains=True))
    if whole and not torch_sdpa.hides(call):
        return torch_sdpa.attend(torch_sdpa.without_keys_past_the_diagonal(call), None), None, None
    output = None
    if tiles.takes(call):
        output = tiles.run(call, *operator.operands(call, None, "torch"), may_decline=whole)
    if output is None and whole:
        output = torch_sdpa.run(call)
    if output is not None:
        return output, None, None
    keep = None if call.dropout_p == 0.0 else dropout.draw(call.query, call.key.shape[2], call.dropout_p)
    if formula.takes(call) and (found := formula.run(call, keep)) is not None:
        return *found, None
    return _evaluated(call, keep) if not _trains(call) else operator.apply(call, keep, "torch")


def _is_worth_flash(call: AttentionCall) -> bool:
    """Is this a call without gradients of which torch's kernel knows more, or which it does faster, tile by tile?"""
    if _trains(call):
        return False
    if call.alibi_slopes is not None or call.sinks is not None or call.return_lse or _is_wide(call):
        return True
    by_values = (call.mask, call.bias, call.key_padding_mask, call.query_documents, call.prefix)
    if any(rule is not None for rule in by_values) or call.is_modified:
        return False
    if call.lower is not None or call.upper not in (None, 0):
        return True
    length, keys = call.query.shape[2], call.key.shape[2]
    return call.upper is not None and length <= keys and flash.is_worth_tiles(length)


def _is_wide(call: AttentionCall) -> bool:
    """Are there so many scores of a dtype that the kernel is slow with that widening it pays?"""
    return _is_widened(call, trains=False) and not tiles.takes(call)  # which widens its tiles itself


def _is_widened(call: AttentionCall, trains: bool) -> bool:
    return flash.widens(call.query.dtype, trains, flash.scores_of(call.query, call.key))


def _flashed(call: AttentionCall) -> Found | None:
    """By tiles of torch's kernel; None where it cannot, or NaN or inf at hidden pairs reached the output."""
    inputs, options = operator.operands(call, None, "torch", keeps_statistics=call.return_lse)
    if call.dropout_p > 0.0 or not flash.takes(inputs, options):
        return None
    output, lse = flash.forward(inputs, options)
    return (output, None, lse if call.return_lse else None) if is_finite(output) else None


def _evaluated(call: AttentionCall, keep: Tensor | None) -> Found:
    """:func:`run` by blocks of rows without the operators around them, which autograd needs, and nothing else."""
    inputs, options = operator.operands(call, keep, "torch", keeps_statistics=call.return_lse)
    output, lse, weights, _ = blocks.forward(inputs, options)
    return output, None if call.weights == "none" else weights, lse if call.return_lse else None


def _trains(call: AttentionCall) -> bool:
    """Are gradients of anything wanted?"""
    tensors = (call.query, call.key, call.value, call.bias, call.alibi_slopes, call.sinks)
    captured = () if call.score_mod is None else call.score_mod.captured
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *captured))


def _may_look(call: AttentionCall) -> bool:
    """May this call's values be read, and are its derivatives those of reverse mode alone?"""
    return is_eager_on_cpu(call.query) and torch.autograd.forward_ad._current_level < 0


def _run_unseen(call: AttentionCall) -> Found:
    """:func:`run` for graphs, ``torch.func``, forward mode and other devices."""
    if sdpa_takes_unseen(call):
        return torch_sdpa.run_unseen(call), None, None
    if in_graph.takes(call):
        return in_graph.run(call)
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
