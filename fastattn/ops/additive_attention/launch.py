"""The operators of additive attention on the Triton kernels: allocate, launch, return. Imported late, as triton is."""

from __future__ import annotations

from fastattn.ops.additive_attention.contract import (
    InputGradients,
    Inputs,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_gradients,
    empty_results,
)
from fastattn_kernels.additive_attention.backward import launch_additive_bwd
from fastattn_kernels.additive_attention.forward import launch_additive_fwd
from fastattn_kernels.additive_attention.pairs import launch_additive_weights
from fastattn_kernels.additive_attention.problem import AdditiveProblem
from fastattn_kernels.common.delta import launch_delta
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.plans import planned
from fastattn_kernels.common.tile_map import tile_map_for


def _problem(inputs: Inputs, options: Options) -> AdditiveProblem:
    return AdditiveProblem(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        scale=1.0,
        bias=inputs.bias,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        upper=options.upper,
        weight=inputs.weight,
    )


@planned
def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::additive_forward``."""
    results = output, weights, statistics = empty_results(inputs, options)
    problem = _problem(inputs, options)
    launch_additive_fwd(problem, output, statistics, tile_map_for(problem))
    if options.needs_weights:
        launch_additive_weights(problem, statistics, weights)
    return results


@planned
def backward(
    gradients: OutputGradients, kept: Results, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients:
    """The contract of ``fastattn::additive_backward``."""
    d_output, d_weights = gradients
    output, weights, statistics = kept
    found = d_query, d_key, d_value, d_weight, d_bias = empty_gradients(inputs, needs)
    delta = launch_delta(output, d_output, None)
    of_weights = None
    if d_weights is not None:
        of_weights = WeightsGradient(d_weights, inputs.query.shape[1])
        products = weights.float() * d_weights
        delta += products.masked_fill(weights == 0, 0).sum(-1)  # what hides a key may hide NaN
    problem = _problem(inputs, options)
    of_weight, d_scores = launch_additive_bwd(
        problem,
        d_output,
        statistics.contiguous(),  # vmap may hand on a view of what its samples share
        delta,
        weights if options.needs_weights else None,
        of_weights,
        Gradients(d_query, d_key, d_value),
        tile_map_for(problem),
    )
    d_weight.copy_(of_weight.sum_to_size(d_weight.shape))
    if needs.needs_d_bias and inputs.bias is not None:
        d_bias.copy_(d_scores.sum_to_size(d_bias.shape))
    return found
