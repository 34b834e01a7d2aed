"""The operators' contract on the Triton kernels: allocate, launch, return. Imports triton, so it is imported late."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Inputs, Options, empty_in_order_of, statistics_shape, weights_shape
from fastattn.ops.common.kernels import kernel_choice
from fastattn_kernels.attention import choice
from fastattn_kernels.attention.bias_gradient import launch_attention_bias_bwd
from fastattn_kernels.attention.weights import (
    launch_attention_weights,
    launch_attention_weights_delta,
    launch_dropout_keep,
)
from fastattn_kernels.common.delta import launch_delta
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import tile_map_for


def _problem(inputs: Inputs, options: Options) -> Problem:
    lower, upper = options.lower, options.upper
    return Problem(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        scale=options.scale,
        bias=inputs.bias,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        query_documents=inputs.query_documents,
        key_documents=inputs.key_documents,
        prefix=inputs.prefix,
        # the kernels add a row's index to these, in 32 bits; further out they rule nothing
        lower=None if lower is None else max(lower, -inputs.query.shape[2]),
        upper=None if upper is None else min(upper, inputs.key.shape[2]),
        shift=options.shift,
        softcap=options.softcap,
        seed=inputs.dropout_state,
        dropout_p=options.dropout_p,
    )


def describe(inputs: Inputs, options: Options) -> str:
    """Which kernels forward and backward would be; returned weights have a gradient."""
    d_weights = None if options.weights == "none" else WeightsGradient(inputs.query, inputs.query.shape[1])
    return choice.describe(_problem(inputs, options), kernel_choice().kernels, d_weights)


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(output, lse, weights, statistics)``; the contract of ``fastattn::attention_forward``."""
    query, key, value = inputs.query, inputs.key, inputs.value
    problem = _problem(inputs, options)
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    weights = query.new_empty(weights_shape(query, key, options.weights))
    statistics = query.new_empty(statistics_shape(query, "triton"), dtype=torch.float32)
    kernels, _ = kernel_choice()
    choice.launch_attention_fwd(problem, output, lse, statistics, tile_map_for(problem), kernels)
    if not query.shape[1]:
        weights.zero_()  # the average of no heads, which the kernel would divide by zero
    elif options.weights != "none":
        launch_attention_weights(problem, statistics, weights, average=options.weights == "average")
    return output, lse, weights, statistics


def backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    output: Tensor,
    statistics: Tensor,
    needs: tuple[bool, bool, bool],
    inputs: Inputs,
    options: Options,
    *,
    d_weights_may_be_zeros: bool,
) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, bias, slopes and sinks, the last three empty where ``needs`` does not ask for
    them; the contract of ``fastattn::attention_backward``."""
    needs_bias, needs_slopes, needs_sinks = needs
    d_output, d_lse, d_weights_tensor = gradients
    statistics = statistics.contiguous()  # vmap expands what its samples share, and the kernels know no strides of it
    problem = _problem(inputs, options)
    delta = launch_delta(output, d_output, d_lse)
    d_weights = None
    if d_weights_tensor is not None:
        used = d_weights_tensor.any() if d_weights_may_be_zeros else None  # stays on the device
        d_weights = WeightsGradient(d_weights_tensor, inputs.query.shape[1], used)
        launch_attention_weights_delta(problem, statistics, d_weights, delta)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (inputs.query, inputs.key, inputs.value))
    d_bias, d_slopes, d_sinks = (d_output.new_empty(0) for _ in range(3))
    of_rows = torch.zeros_like(delta) if needs_slopes else None
    choice.launch_attention_bwd(
        problem, d_output, statistics, delta, d_weights, Gradients(d_query, d_key, d_value, of_rows),
        tile_map_for(problem), *kernel_choice(),
    )  # fmt: skip
    if needs_bias:
        d_bias = launch_attention_bias_bwd(problem, d_output, statistics, delta, d_weights)
    if of_rows is not None and inputs.alibi_slopes is not None:
        d_slopes = of_rows.sum(2).sum_to_size(inputs.alibi_slopes.shape).to(inputs.alibi_slopes.dtype)
    if needs_sinks and inputs.sinks is not None:
        # a sink's value is zero, so that of its dS = P (dP - delta) the second term is all there is
        row_max, inverse_sum = statistics.unbind(2)
        of_sinks = torch.exp2(inputs.sinks[:, :, None].float() * math.log2(math.e) - row_max) * inverse_sum
        d_sinks = -(of_sinks * delta).sum(2).sum_to_size(inputs.sinks.shape).to(inputs.sinks.dtype)
    return d_query, d_key, d_value, d_bias, d_slopes, d_sinks


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B, H, L, S]``: the weights that the kernels keep under the state's seed."""
    assert inputs.dropout_state is not None
    shape = (*inputs.query.shape[:3], inputs.key.shape[2])
    keep = torch.empty(shape, dtype=torch.bool, device=inputs.query.device)
    launch_dropout_keep(inputs.dropout_state, options.dropout_p, keep)
    return keep
