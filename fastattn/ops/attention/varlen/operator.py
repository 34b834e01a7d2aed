"""Packed attention as the operators ``fastattn::attention_varlen_forward`` and ``_backward``; see ``row_operator``."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.contract import InputGradients, Kept
from fastattn.ops.attention.operator import each_block, formula
from fastattn.ops.attention.varlen import sequences
from fastattn.ops.attention.varlen.contract import (
    VarlenCall,
    VarlenInputs,
    VarlenNeeds,
    VarlenOptions,
    VarlenOutputGradients,
    VarlenResults,
    empty_gradients,
    empty_results,
    stored,
)
from fastattn.ops.common.blocks import OF_KEYS, OF_ROWS, Axes, Block, statistics_dtype
from fastattn.ops.common.derivatives import Blocked, Formula
from fastattn.ops.common.operator import apply as apply_function
from fastattn.ops.common.row_operator import BackwardFunction, ForwardFunction, RowOperator


def implementation(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` implement the operators for a backend."""
    if backend == "triton":
        from fastattn.ops.attention.varlen import launch  # imports triton

        return launch
    return sequences


# ---------------------------------------------------------------------------------------------------------- the formula


class PackedBlock(NamedTuple):
    """A block of a sequence: where it lies in the packed tensors, and where in those that have a part for each
    sequence."""

    batch: slice
    rows: slice
    keys: slice
    sequence: slice
    rows_inside: slice
    keys_inside: slice

    place_in = Block.place_in
    of = Block.of


_AXES: tuple[Axes, ...] = (
    OF_ROWS,
    OF_KEYS,
    OF_KEYS,
    ("sequence", None, "rows_inside", "keys_inside"),  # the bias
    ("sequence",),  # ALiBi's slopes
    ("sequence",),  # the sinks
)


def _blocked(inputs: VarlenInputs, options: VarlenOptions) -> Blocked:
    """Output and LSE as a formula of the differentiable inputs, cut into blocks of sequences."""
    query = inputs.query

    def each() -> Iterator[tuple[PackedBlock, Formula]]:
        for span, own, rules in sequences.each(inputs, options):
            for block, of_block, rules_of_block in each_block(own, rules):
                packed = PackedBlock(
                    batch=block.batch,
                    rows=_behind(block.rows, span.rows.start),
                    keys=_behind(block.keys, span.keys.start),
                    sequence=slice(span.number, span.number + 1),
                    rows_inside=block.rows,
                    keys_inside=block.keys,
                )
                yield packed, _without_weights(formula(of_block, rules_of_block, block))

    return Blocked(
        primals=ATTENTION_VARLEN.differentiable(inputs),
        axes=_AXES,
        result_shapes=((*query.shape[:3], inputs.value.shape[3]), query.shape[:3]),
        result_dtypes=(query.dtype, statistics_dtype(query.dtype)),
        result_axes=(OF_ROWS, OF_ROWS),
        blocks=each,
    )


def _behind(part: slice, start: int) -> slice:
    return slice(part.start + start, part.stop + start)


def _without_weights(function: Formula) -> Formula:
    return lambda *primals: function(*primals)[:2]


# -------------------------------------------------------------------------------------------------------- the operators

ATTENTION_VARLEN = RowOperator(
    name="attention_varlen",
    inputs=VarlenInputs,
    options=VarlenOptions,
    results=VarlenResults,
    kept=Kept,
    output_gradients=VarlenOutputGradients,
    needs=VarlenNeeds,
    input_gradients=InputGradients,
    implementation=implementation,
    ask=VarlenNeeds,
    stored=stored,
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    blocked=_blocked,
    forward_flops=None,  # how many there are is written in the offsets, which counters do not see
    backward_flops=None,
)


class AttentionVarlenBackward(BackwardFunction):
    """The gradients of :class:`AttentionVarlen`."""

    pair, operator = ATTENTION_VARLEN, ATTENTION_VARLEN.backward


class AttentionVarlen(ForwardFunction):
    """``(output, lse, statistics)`` of one call."""

    pair, operator, backward_function = ATTENTION_VARLEN, ATTENTION_VARLEN.forward, AttentionVarlenBackward


def apply(call: VarlenCall, dropout_state: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call, through the operators."""
    results = VarlenResults(*apply_function(AttentionVarlen, *operands(call, dropout_state, backend)))
    return results.output, results.lse if call.return_lse else None


def operands(
    call: VarlenCall, dropout_state: Tensor | None, backend: str, *, keeps_statistics: bool | None = None
) -> tuple[VarlenInputs, VarlenOptions]:
    """A call in the form that the operators take; statistics are kept where autograd may ask for them, by default."""
    if keeps_statistics is None:
        keeps_statistics = call.return_lse or torch.is_grad_enabled()
    own = call._asdict()
    tensors, words = (
        {name: own[name] for name in kind._fields if name in own} for kind in (VarlenInputs, VarlenOptions)
    )
    inputs = VarlenInputs(**tensors, dropout_state=dropout_state)
    return inputs, VarlenOptions(**words, backend=backend, keeps_statistics=keeps_statistics)
