"""The operators' contract on the Triton kernels: allocate, launch, return. Imports triton, so it is imported late."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._autograd import Inputs, Options, empty_in_order_of, statistics_shape, weights_shape
from fastattn_kernels.attention_bwd import launch_attention_bwd, launch_attention_delta
from fastattn_kernels.attention_fwd import launch_attention_fwd
from fastattn_kernels.attention_problem import Problem, WeightsGradient
from fastattn_kernels.attention_weights import (
    launch_attention_weights,
    launch_attention_weights_delta,
    launch_dropout_keep,
)


def _problem(inputs: Inputs, options: Options) -> Problem:
    return Problem(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        scale=options.scale,
        bias=inputs.bias,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        diagonal=options.diagonal,
        seed=inputs.dropout_state,
        dropout_p=options.dropout_p,
    )


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(output, lse, weights, statistics)``; the contract of ``fastattn::attention_forward``."""
    query, key, value = inputs.query, inputs.key, inputs.value
    problem = _problem(inputs, options)
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    weights = query.new_empty(weights_shape(query, key, options.weights))
    statistics = query.new_empty(statistics_shape(query, "triton"), dtype=torch.float32)
    launch_attention_fwd(problem, output, lse, statistics)
    if options.weights != "none":
        launch_attention_weights(problem, statistics, weights, average=options.weights == "average")
    return output, lse, weights, statistics


def backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    output: Tensor,
    statistics: Tensor,
    needs_d_bias: bool,
    inputs: Inputs,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, empty)``; the contract of ``fastattn::attention_backward``."""
    if needs_d_bias:
        raise NotImplementedError("the triton backend has no gradient for an additive mask yet")
    d_output, d_lse, d_weights_tensor = gradients
    problem = _problem(inputs, options)
    delta = launch_attention_delta(output, d_output, d_lse)
    d_weights = None
    if d_weights_tensor is not None:
        d_weights = WeightsGradient(d_weights_tensor, inputs.query.shape[1])
        launch_attention_weights_delta(problem, statistics, d_weights, delta)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (inputs.query, inputs.key, inputs.value))
    launch_attention_bwd(problem, d_output, statistics, delta, d_weights, d_query, d_key, d_value)
    return d_query, d_key, d_value, d_output.new_empty(0)


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B, H, L, S]``: the weights that the kernels keep under the state's seed."""
    assert inputs.dropout_state is not None
    shape = (*inputs.query.shape[:3], inputs.key.shape[2])
    keep = torch.empty(shape, dtype=torch.bool, device=inputs.query.device)
    launch_dropout_keep(inputs.dropout_state, options.dropout_p, keep)
    return keep
