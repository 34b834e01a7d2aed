"""Additive attention as a pair of operators, ``fastattn::additive_forward`` and ``additive_backward``; see
``row_operator``."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.additive_attention import blocks
from fastattn.ops.additive_attention.contract import (
    AdditiveAttentionCall,
    InputGradients,
    Inputs,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_gradients,
    empty_results,
    stored,
    weights_shape,
)
from fastattn.ops.common.blocks import OF_ROWS, SCORES, Block, statistics_dtype
from fastattn.ops.common.derivatives import Blocked, Formula
from fastattn.ops.common.flops import product_flops
from fastattn.ops.common.operator import apply as apply_function
from fastattn.ops.common.row_operator import BackwardFunction, ForwardFunction, RowOperator
from fastattn.ops.common.tracing import is_eager_on_cpu
from fastattn.reference import additive_attention as reference


def implementation(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` implement the operators for a backend."""
    if backend == "triton":
        from fastattn.ops.additive_attention import launch  # imports triton

        return launch
    return blocks


def _blocked(inputs: Inputs, options: Options) -> Blocked:
    """Output and weights as a formula of the differentiable inputs, cut into blocks."""
    query = inputs.query

    def each() -> Iterator[tuple[Block, Formula]]:
        for block in blocks.blocks(inputs, options):
            yield block, _formula(*blocks.cut(block, inputs, options))

    return Blocked(
        primals=ADDITIVE_ATTENTION.differentiable(inputs),
        axes=ADDITIVE_ATTENTION.differentiable(blocks.INPUT_AXES),
        result_shapes=((*query.shape[:3], inputs.value.shape[3]), weights_shape(inputs, options)),
        result_dtypes=(query.dtype, query.dtype),
        result_axes=(OF_ROWS, SCORES if options.needs_weights else (None,)),
        blocks=each,
    )


def _formula(inputs: Inputs, options: Options) -> Formula:
    """What ``additive_forward`` computes of the differentiable inputs, the statistics left out."""
    compute = torch.promote_types(inputs.query.dtype, torch.float32)

    def function(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result = reference(
            *(t.to(compute) for t in (query, key, value, weight)),
            bias=bias,
            mask=inputs.mask,
            key_padding_mask=inputs.key_padding_mask,
            upper=options.upper,
        )
        weights = result.weights.to(query.dtype) if options.needs_weights else query.new_empty(0)
        return result.output.to(query.dtype), weights

    return function


def _forward_flops(inputs: Any, options: Options) -> int:
    """``P V``: the scores are no product of matrices, and torch's counter counts nothing else."""
    return product_flops(inputs.query, inputs.key, inputs.value[3])


def _backward_flops(inputs: Any, options: Options) -> int:
    """``dV`` and ``dP``."""
    return 2 * product_flops(inputs.query, inputs.key, inputs.value[3])


ADDITIVE_ATTENTION = RowOperator(
    name="additive",
    inputs=Inputs,
    options=Options,
    results=Results,
    kept=Results,
    output_gradients=OutputGradients,
    needs=Needs,
    input_gradients=InputGradients,
    implementation=implementation,
    ask=Needs,
    stored=stored,
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    blocked=_blocked,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


class AdditiveAttentionBackward(BackwardFunction):
    """The gradients of :class:`AdditiveAttention`."""

    pair, operator = ADDITIVE_ATTENTION, ADDITIVE_ATTENTION.backward


class AdditiveAttention(ForwardFunction):
    """``(output, weights, statistics)`` of one call; ``weights`` is empty where none are asked for."""

    pair, operator, backward_function = ADDITIVE_ATTENTION, ADDITIVE_ATTENTION.forward, AdditiveAttentionBackward


def apply(call: AdditiveAttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)`` of a call, through the operators."""
    results = Results(*apply_function(AdditiveAttention, *operands(call, backend)))
    return results.output, results.weights if call.needs_weights else None


def operands(call: AdditiveAttentionCall, backend: str) -> tuple[Inputs, Options]:
    """A call in the form that the operators take."""
    inputs = Inputs(*(getattr(call, name) for name in Inputs._fields))
    return inputs, Options(call.upper, call.needs_weights or (backend == "torch" and _keeps_weights(call)), backend)


def _keeps_weights(call: AdditiveAttentionCall) -> bool:
    """Does the backward of an eager step on a CPU get the weights although nobody asked for them, which saves it to
    make every tangent a third time? It does where they take no more memory than the query and the key, which are kept
    in any case, and are of the dtype in which they are made."""
    query, key = call.query, call.key
    weights = query.shape[:3].numel() * key.shape[2]
    return (
        torch.is_grad_enabled()
        and is_eager_on_cpu(query)
        and statistics_dtype(query.dtype) == query.dtype
        and weights <= query.numel() + key.numel()
    )
