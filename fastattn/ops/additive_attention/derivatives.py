"""Derivatives of additive attention beyond the first: the reference's formula, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.ops.additive_attention.blocks import INPUT_AXES, blocks, cut
from fastattn.ops.additive_attention.contract import DIFFERENTIABLE, AdditiveInputs, AdditiveOptions, weights_shape
from fastattn.ops.attention.blocks import OF_ROWS, SCORES, Axes, Block
from fastattn.ops.common import derivatives
from fastattn.ops.common.derivatives import Blocked, Formula
from fastattn.ops.common.functional import Tensors
from fastattn.reference import additive_attention as reference


def forward_jvp(inputs: AdditiveInputs, options: AdditiveOptions, tangents: Tensors) -> list[Tensor]:
    """The tangents of output and weights, given those of the differentiable inputs (None: zero)."""
    found = derivatives.forward_jvp(_blocked(inputs, options), tangents)
    return [t.to(inputs.query.dtype) for t in found]


def backward_jvp(
    gradients: Tensors, inputs: AdditiveInputs, options: AdditiveOptions, tangents: Tensors
) -> list[Tensor | None]:
    """The tangents of the inputs' gradients, given those of the results' ``gradients`` and of the inputs."""
    return derivatives.backward_jvp(_blocked(inputs, options), gradients, tangents)


def backward_vjp(
    gradients: Tensors,
    inputs: AdditiveInputs,
    options: AdditiveOptions,
    cotangents: Tensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``gradients`` and of the inputs, those that are ``wanted``, given those of the inputs'
    gradients (None where one is absent or was not computed)."""
    return derivatives.backward_vjp(_blocked(inputs, options), gradients, cotangents, wanted)


def _blocked(inputs: AdditiveInputs, options: AdditiveOptions) -> Blocked:
    result_axes: tuple[Axes, Axes] = (OF_ROWS, SCORES if options.needs_weights else (None,))

    def each() -> Iterator[tuple[Block, Formula]]:
        for block in blocks(inputs, options):
            yield block, _formula(*cut(block, inputs, options))

    return Blocked(
        inputs[:DIFFERENTIABLE],
        INPUT_AXES[:DIFFERENTIABLE],
        ((*inputs.query.shape[:3], inputs.value.shape[3]), weights_shape(inputs, options)),
        result_axes,
        each,
    )


def _formula(inputs: AdditiveInputs, options: AdditiveOptions) -> Formula:
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
