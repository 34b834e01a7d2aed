"""Packed attention on the torch backend: each sequence is a call of ``attention`` on the parts of the packed tensors.

On the CPU, where the offsets are read without waiting for anything, the calls are those of ``attention`` itself, each
by the fastest path that takes it, and autograd splits and joins them. Elsewhere (in graphs, under ``torch.func``, on
other devices) an operator does the same behind one node; on a GPU it waits for the offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention import on_torch as of_attention
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.varlen import modified, operator
from fastattn.ops.attention.varlen.contract import VarlenCall
from fastattn.ops.attention.varlen.sequences import Span, of_pairs, of_sequence, spans
from fastattn.ops.common.tracing import is_eager_on_cpu, is_recorded


def describe(call: VarlenCall) -> str:
    """Which of the two ways the call goes."""
    if _may_look(call):
        return "attention of each sequence by itself"
    return "plain torch in blocks of rows, sequence after sequence"


def run(call: VarlenCall) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)``.

    Raises:
        NotImplementedError: the call is written into a graph that leaves this process.
    """
    if _may_look(call):
        return _sequence_by_sequence(call)
    if call.score_mod is not None or call.mask_mod is not None:
        return modified.run(call, "torch")
    if is_recorded():
        raise NotImplementedError(
            "attention_varlen cannot be exported: how many sequences there are, and how long they are, is known only "
            "from the numbers in cu_seqlens. Pad the batch and export fastattn.attention with key_padding_mask"
        )
    seed = None
    if call.dropout_p > 0.0:
        seed = torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=call.device)
    return operator.apply(call, seed, "torch")


def _may_look(call: VarlenCall) -> bool:
    return is_eager_on_cpu(call.query) and torch.autograd.forward_ad._current_level < 0


def _sequence_by_sequence(call: VarlenCall) -> tuple[Tensor, Tensor | None]:
    found = spans(call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k)
    if not any(span.lengths[0] for span in found):  # nothing to join, but autograd's graph is to be there
        return operator.apply(call, None, "torch")
    # one node of autograd for all parts of a tensor, whose backward joins their gradients
    queries = _parts(call.query, [span.rows for span in found])
    keys, values = (_parts(tensor, [span.keys for span in found]) for tensor in (call.key, call.value))
    outputs, lses = [], []
    for span, query, key, value in zip(found, queries, keys, values):
        if span.lengths[0]:
            output, _, lse = of_attention.run(_alone(call, span, query, key, value))
            outputs.append(output[0].transpose(0, 1))
            lses.append(lse)
    heads, rest = call.query.shape[1], call.query.shape[2] - found[-1].rows.stop
    if rest:  # rows behind the last sequence
        outputs.append(call.query.new_empty(rest, heads, call.value.shape[3]))
        lses.append(call.query.new_empty(1, heads, rest))
    joined = torch.cat(outputs).transpose(0, 1)[None]
    return joined, torch.cat(lses, 2) if call.return_lse else None


def _parts(tensor: Tensor, parts: list[slice]) -> list[Tensor]:
    """These parts of ``[1, H, T, D]``, which follow one another with gaps."""
    sizes, end = [], 0
    for part in parts:
        sizes += [part.start - end, part.stop - part.start]
        end = part.stop
    return list(tensor.split([*sizes, tensor.shape[2] - end], 2))[1::2]


def _alone(call: VarlenCall, span: Span, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    rows, keys = span.lengths
    shift = keys - rows if call.bottom_right else 0
    return AttentionCall(
        query,
        key,
        value,
        bias=of_pairs(call.bias, span),
        alibi_slopes=of_sequence(call.alibi_slopes, span.number),
        sinks=call.sinks,
        prefix=of_sequence(call.prefix, span.number),
        lower=None if call.lower is None else call.lower + shift,
        upper=None if call.upper is None else call.upper + shift,
        shift=shift,
        softcap=call.softcap,
        scale=call.scale,
        dropout_p=call.dropout_p,
        return_lse=call.return_lse,
        score_mod=call.score_mod,
        mask_mod=call.mask_mod,
        first_batch=span.number,
    )
