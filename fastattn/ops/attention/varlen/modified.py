"""Packed sequences with functions of the user's: one call of ``attention`` over all packed rows and keys.

The functions are told of sequences and of positions within them. So they are wrapped in functions of the packed rows
and keys, which read from tensors to which sequence each belongs, and where in it it stands; and what else a packed call
says by position (bounds, prefixes, a bias, ALiBi) is said in the same functions. Tiles of pairs of different sequences
are left out, as under every mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import on_torch, on_triton
from fastattn.ops.attention.contract import AttentionCall, Function, MaskMod, ScoreMod
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.lookups import extent_of
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.attention.varlen.contract import VarlenCall
from fastattn.ops.common.backends import Backend


class Layout(NamedTuple):
    """Where packed rows and keys stand, int32. A row of no sequence has the number -1, such a key -2."""

    rows: Tensor  # [2, T], the sequence of each row, and its position in it
    keys: Tensor  # [2, Tk]
    shift: Tensor  # [N], where the first row of a sequence stands among its keys


def run(call: VarlenCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call with functions, on a backend."""
    run_attention = on_triton.run if backend == "triton" else on_torch.run
    output, _, lse = run_attention(as_attention(call))
    return output, lse


def run_in_graph(
    call: VarlenCall, score_mod: ScoreMod | None, mask_mod: MaskMod | None, backend: Backend | None
) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call without functions and of these, for ``torch.compile`` to trace."""
    from fastattn.ops.attention.functions import in_graphs  # imports the tracer

    layout, optional, prefix = _tensors(call)
    (of_score, *read_by_score), (of_mask, *read_by_mask) = _apart(score_mod), _apart(mask_mod)
    found = in_graphs.run(
        _without_positions(call),
        (_score_mod(call, of_score), *layout, *optional, *read_by_score) if of_score or optional else None,
        (_mask_mod(call, of_mask), *layout, *prefix, *read_by_mask),
        backend,
    )
    return found[0], found[1] if call.return_lse else None


def as_attention(call: VarlenCall) -> AttentionCall:
    """The call over all packed rows and keys."""
    layout, optional, prefix = _tensors(call)
    (of_score, *read_by_score), (of_mask, *read_by_mask) = map(_of_program, (call.score_mod, call.mask_mod))
    score_mod, extent = None, extent_of(call.query, call.key)
    if of_score or optional:
        tensors = *layout, *optional, *read_by_score
        score_mod = check_function("score_mod", (_score_mod(call, of_score), *tensors), call.query, extent)
    tensors = *layout, *prefix, *read_by_mask
    mask_mod = check_function("mask_mod", (_mask_mod(call, of_mask), *tensors), call.query, extent)
    return _without_positions(call)._replace(score_mod=score_mod, mask_mod=mask_mod)


def _without_positions(call: VarlenCall) -> AttentionCall:
    """The call over all packed rows and keys without what functions say of positions."""
    return AttentionCall(
        call.query,
        call.key,
        call.value,
        sinks=call.sinks,
        softcap=call.softcap,
        scale=call.scale,
        dropout_p=call.dropout_p,
        return_lse=call.return_lse,
    )


def _tensors(call: VarlenCall) -> tuple[Layout, list[Tensor], list[Tensor]]:
    """What the functions read beside what the user's read: where rows and keys stand, what is added to scores, and
    prefixes."""
    added = [tensor for tensor in (call.bias, call.alibi_slopes) if tensor is not None]
    return _layout(call), added, [] if call.prefix is None else [call.prefix]


def _apart(function: Any) -> tuple[Any, ...]:
    """A function and the tensors that it takes behind its other arguments."""
    return function if isinstance(function, tuple) else (function,)


def _of_program(function: Function | None) -> tuple[Any, ...]:
    """A program and the tensors that it reads, in the form of :func:`_apart`."""
    if function is None:
        return (None,)
    text = function.text
    return lambda *arguments: Program.of(text).function(*arguments), *function.captured


def _layout(call: VarlenCall) -> Layout:
    rows = _placed(call.cu_seqlens_q, call.query.shape[2])
    keys = _placed(call.cu_seqlens_k, call.key.shape[2])
    lengths = call.cu_seqlens_k.diff() if call.seqused_k is None else call.seqused_k
    if call.seqused_k is not None and lengths.shape[0]:
        is_in_use = keys[1] < lengths[keys[0].clamp(min=0)]
        keys = torch.where(is_in_use, keys, torch.tensor([[-1], [0]], dtype=torch.int32, device=keys.device))
    shift = lengths - call.cu_seqlens_q.diff() if call.bottom_right else torch.zeros_like(lengths)
    return Layout(rows, torch.stack([torch.where(keys[0] < 0, -2, keys[0]), keys[1]]), shift)


def _placed(cu_seqlens: Tensor, size: int) -> Tensor:
    """``[2, size]``: to which sequence each packed row belongs, and where in it it stands; -1 and 0 behind the last."""
    numbers = torch.arange(size, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, numbers, right=True, out_int32=True) - 1
    is_inside = sequence < cu_seqlens.shape[0] - 1
    position = torch.where(is_inside, numbers - cu_seqlens[sequence], 0)
    return torch.stack([torch.where(is_inside, sequence, -1), position])


def _places(layout: tuple[Tensor, ...], row: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether row and key belong to one sequence, which one, and where they stand in it; the key of another sequence
    stands at 0, so that nothing is read behind the end of what the row's sequence has."""
    rows, keys, _ = layout
    sequence = rows[0, row]
    together = sequence == keys[0, key]
    return together, sequence.clamp(min=0), rows[1, row], torch.where(together, keys[1, key], 0)


def _mask_mod(call: VarlenCall, of_sequence: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """Of packed rows and keys: what a user's function says of a sequence, and what the call itself hides."""
    lower, upper = call.lower, call.upper
    prefixes = 0 if call.prefix is None else call.prefix.shape[0]
    tensors = len(Layout._fields)

    def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor, *read: Tensor) -> Tensor:
        layout, read = read[:tensors], read[tensors:]
        seen, sequence, row, key = _places(layout, query_index, key_index)
        position = row + layout[-1][sequence]
        within = key >= 0
        if lower is not None:
            within = within & (key >= position + lower)
        if upper is not None:
            within = within & (key <= position + upper)
        if prefixes:
            within = within | (key < read[0][sequence if prefixes > 1 else 0])
        if of_sequence is not None:
            within = within & of_sequence(sequence, head, row, key, *read[bool(prefixes) :])
        return seen & within

    return mask_mod


def _score_mod(call: VarlenCall, of_sequence: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """Of packed rows and keys: what a user's function makes of a score, and what the call itself adds."""
    bias = () if call.bias is None else tuple(size > 1 for size in call.bias.shape)
    slopes = 0 if call.alibi_slopes is None else call.alibi_slopes.shape[0]
    tensors = len(Layout._fields)

    def score_mod(
        score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor, *read: Tensor
    ) -> Tensor:
        layout, read = read[:tensors], read[tensors:]
        _, sequence, row, key = _places(layout, query_index, key_index)
        own = read[bool(bias) + bool(slopes) :]
        if of_sequence is not None:
            score = of_sequence(score, sequence, head, row, key, *own)
        if bias:
            places = zip((sequence, head, row, key), bias)
            score = score + read[0][tuple(place if spans else 0 for place, spans in places)]
        if slopes:
            distance = (row + layout[-1][sequence] - key).abs()
            score = score - read[bool(bias)][sequence if slopes > 1 else 0, head] * distance
        return score

    return score_mod
