"""Packed sequences in plain torch: each is a call of ``attention`` by itself. The numbers in the offsets are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import blocks
from fastattn.ops.attention import contract as attention
from fastattn.ops.attention.varlen.contract import (
    VarlenInputs,
    VarlenNeeds,
    VarlenOptions,
    VarlenOutputGradients,
    VarlenResults,
    empty_results,
)
from fastattn.ops.common.blocks import statistics_dtype


class Span(NamedTuple):
    """Where a sequence lies: its number, its rows of the packed queries, and those of the packed keys that are used."""

    number: int
    rows: slice
    keys: slice

    @property
    def lengths(self) -> tuple[int, int]:
        """How many rows and keys it has."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start


def offsets(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """The numbers in offsets, or raise ValueError unless they begin with 0, ascend, and end at ``total`` or before."""
    found: list[int] = cu_seqlens.tolist()
    if found[0] != 0:
        raise ValueError(f"{name} begins with {found[0]}: expected 0")
    for number, (begin, end) in enumerate(itertools.pairwise(found)):
        if end < begin:
            raise ValueError(f"{name} falls from {begin} to {end} at sequence {number}: expected offsets that ascend")
    if found[-1] > total:
        raise ValueError(f"{name} ends with {found[-1]}: expected at most the {total} packed rows")
    return found


def spans(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> list[Span]:
    """Where each sequence lies in ``[1, H, T, D]`` and ``[1, Hk, Tk, D]``.

    Raises:
        ValueError: the offsets do not ascend or pass the packed rows, or more keys are used than a sequence has.
    """
    of_rows = offsets("cu_seqlens_q", cu_seqlens_q, query.shape[2])
    of_keys = offsets("cu_seqlens_k", cu_seqlens_k, key.shape[2])
    lengths = [end - begin for begin, end in itertools.pairwise(of_keys)]
    used: list[int] = lengths if seqused_k is None else seqused_k.tolist()
    for number, (have, wanted) in enumerate(zip(lengths, used)):
        if not 0 <= wanted <= have:
            raise ValueError(f"seqused_k is {wanted} at sequence {number}: expected 0 to its {have} keys")
    return [
        Span(number, slice(*of_rows[number : number + 2]), slice(begin, begin + used[number]))
        for number, begin in enumerate(of_keys[:-1])
    ]


# --------------------------------------------------------------------------------------- a sequence as a call by itself


def alone(span: Span, inputs: VarlenInputs, options: VarlenOptions) -> tuple[attention.Inputs, attention.Options]:
    """The call of ``attention`` that a sequence is by itself; its tensors are views."""
    number, (rows, keys) = span.number, span.lengths
    state = inputs.dropout_state
    own = attention.Inputs(
        query=_part(inputs.query, 2, span.rows),
        key=_part(inputs.key, 2, span.keys),
        value=_part(inputs.value, 2, span.keys),
        bias=of_pairs(inputs.bias, span),
        alibi_slopes=of_sequence(inputs.alibi_slopes, number),
        sinks=of_sequence(inputs.sinks, number),
        mask=None,
        key_padding_mask=None,
        query_documents=None,
        key_documents=None,
        prefix=of_sequence(inputs.prefix, number),
        dropout_state=None if state is None else state + number,  # a seed of its own, or all would drop alike
    )
    shift = keys - rows if options.bottom_right else 0
    return own, attention.Options(
        lower=None if options.lower is None else options.lower + shift,
        upper=None if options.upper is None else options.upper + shift,
        shift=shift,
        softcap=options.softcap,
        scale=options.scale,
        dropout_p=options.dropout_p,
        weights="none",
        backend=options.backend,
        keeps_statistics=options.keeps_statistics,
    )


def of_sequence(tensor: Tensor | None, number: int) -> Tensor | None:
    """What a tensor ``[N | 1, ...]`` has for a sequence, ``[1, ...]``."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor.narrow(0, number, 1)


def of_pairs(tensor: Tensor | None, span: Span) -> Tensor | None:
    """What a tensor ``[N | 1, H | 1, longest | 1, longest | 1]`` has for the pairs of a sequence."""
    found = of_sequence(tensor, span.number)
    if found is None:
        return None
    for axis, length in zip((2, 3), span.lengths):
        if found.shape[axis] != 1:
            found = found.narrow(axis, 0, length)
    return found


def _part(tensor: Tensor, axis: int, part: slice) -> Tensor:
    return tensor.narrow(axis, part.start, part.stop - part.start)


def each(inputs: VarlenInputs, options: VarlenOptions) -> Iterator[tuple[Span, attention.Inputs, attention.Options]]:
    """Every sequence that has rows, and the call that it is by itself."""
    for span in spans(inputs.query, inputs.key, inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqused_k):
        if span.lengths[0]:
            yield span, *alone(span, inputs, options)


# -------------------------------------------------------------------------------------------------------- the operators


def forward(inputs: VarlenInputs, options: VarlenOptions) -> VarlenResults:
    """The contract of ``fastattn::attention_varlen_forward``; the statistics are the LSE again."""
    results = empty_results(inputs, options)
    for span, own, rules in each(inputs, options):
        found = blocks.forward(own, rules)
        results.output[:, :, span.rows] = found.output
        results.lse[:, :, span.rows] = found.lse
        results.statistics[:, :, span.rows] = found.statistics
    return results


def backward(
    gradients: VarlenOutputGradients,
    kept: attention.Kept,
    needs: VarlenNeeds,
    inputs: VarlenInputs,
    options: VarlenOptions,
) -> attention.InputGradients:
    """The contract of ``fastattn::attention_varlen_backward``."""
    d_lse = gradients.d_lse
    whole = {name: torch.zeros_like(getattr(inputs, name)) for name in ("query", "key", "value")}
    optional = {name: getattr(inputs, name) for name in ("bias", "alibi_slopes", "sinks")}
    sums = {
        name: torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, statistics_dtype(inputs.query.dtype)))
        for name, tensor in optional.items()
        if tensor is not None and getattr(needs, f"needs_d_{name}")
    }
    for span, own, rules in each(inputs, options):
        rows = span.rows
        found = blocks.backward(
            attention.OutputGradients(
                gradients.d_output[:, :, rows], None if d_lse is None else d_lse[:, :, rows], d_weights=None
            ),
            attention.Kept(kept.output[:, :, rows], kept.statistics[:, :, rows]),
            attention.Needs(*needs, d_weights_may_be_zeros=False),
            own,
            rules,
        )
        whole["query"][:, :, rows] = found.d_query
        whole["key"][:, :, span.keys] = found.d_key
        whole["value"][:, :, span.keys] = found.d_value
        for name, total in sums.items():
            part = of_pairs(total, span) if name == "bias" else of_sequence(total, span.number)
            assert part is not None
            part += getattr(found, f"d_{name}")
    nothing = inputs.query.new_empty(0)
    return attention.InputGradients(
        *(whole[name] for name in whole),
        *(sums[name].to(tensor.dtype) if name in sums else nothing.clone() for name, tensor in optional.items()),
    )
