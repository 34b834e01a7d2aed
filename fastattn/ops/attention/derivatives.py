"""Derivatives of attention beyond the first: the reference's formula, a block of rows at a time.

Only dropout's kept weights are ever whole, as booleans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.ops.attention.blocks import INPUT_AXES, OF_ROWS, SCORES, Axes, Block, batches, blocks
from fastattn.ops.attention.contract import DIFFERENTIABLE, Inputs, Options, implementation, weights_shape
from fastattn.ops.common import derivatives
from fastattn.ops.common.derivatives import Blocked, Formula
from fastattn.ops.common.functional import Tensors
from fastattn.reference import attention as reference


def forward_jvp(inputs: Inputs, options: Options, tangents: Tensors) -> list[Tensor]:
    """The tangents of output, LSE and weights, given those of the differentiable inputs (None: zero)."""
    return derivatives.forward_jvp(_blocked(inputs, options), tangents)


def backward_jvp(gradients: Tensors, inputs: Inputs, options: Options, tangents: Tensors) -> list[Tensor | None]:
    """The tangents of the differentiable inputs' gradients (None for absent inputs), given those of the results'
    ``gradients`` and of the inputs."""
    return derivatives.backward_jvp(_blocked(inputs, options), gradients, tangents)


def backward_vjp(
    gradients: Tensors, inputs: Inputs, options: Options, cotangents: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``gradients`` and of the differentiable inputs, those that are ``wanted``, given those of the
    inputs' gradients (None where one is absent or was not computed)."""
    return derivatives.backward_vjp(_blocked(inputs, options), gradients, cotangents, wanted)


def _blocked(inputs: Inputs, options: Options) -> Blocked:
    weights: dict[str, Axes] = {"none": (None,), "average": ("batch", "rows", "keys"), "heads": SCORES}
    shapes = (
        (*inputs.query.shape[:3], inputs.value.shape[3]),
        inputs.query.shape[:3],
        weights_shape(inputs.query, inputs.key, options.weights),
    )

    def each() -> Iterator[tuple[Block, Formula]]:
        for block, own, rules in _each_block(inputs, options):
            yield block, _formula(own, rules)

    axes = (OF_ROWS, OF_ROWS, weights[options.weights])
    return Blocked(inputs[:DIFFERENTIABLE], INPUT_AXES[:DIFFERENTIABLE], shapes, axes, each)


def _formula(inputs: Inputs, options: Options) -> Formula:
    """What ``attention_forward`` computes of the differentiable inputs; the dropout state is the kept weights."""
    compute = torch.promote_types(inputs.query.dtype, torch.float32)

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = reference(
            query.to(compute),
            key.to(compute),
            value.to(compute),
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            mask=inputs.mask,
            key_padding_mask=inputs.key_padding_mask,
            query_documents=inputs.query_documents,
            key_documents=inputs.key_documents,
            prefix=inputs.prefix,
            lower=options.lower,
            upper=options.upper,
            shift=options.shift,
            softcap=options.softcap,
            scale=options.scale,
            dropout_keep=inputs.dropout_state,
            dropout_p=options.dropout_p,
        )
        weights = {
            "none": lambda: query.new_empty(0),
            "average": lambda: result.weights.mean(dim=1).to(query.dtype),
            "heads": lambda: result.weights.to(query.dtype),
        }[options.weights]()
        return result.output.to(query.dtype), result.lse, weights

    return function


def _each_block(inputs: Inputs, options: Options) -> Iterator[tuple[Block, Inputs, Options]]:
    """Every block, and the call that it is by itself."""
    if inputs.dropout_state is not None:
        keep = implementation(options.backend).dropout_keep(inputs, options)
        inputs = inputs._replace(dropout_state=keep)
    (size, _, length), keys = inputs.query.shape[:3], inputs.key.shape[2]
    if not keys:
        yield Block(slice(0, size), slice(0, length), slice(0, 0)), inputs, options
    for batch in batches(inputs, options):
        # nothing looks at numbers, which transforms would not allow; the LSE of a row without keys is its sink
        for block in blocks(inputs, options, batch, looks=False, skips=inputs.sinks is None):
            yield block, *block.cut(inputs, options)
