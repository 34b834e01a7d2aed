"""The operators' contract on the Triton kernels: allocate, launch, return. Imports triton, so it is imported late."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention.contract import (
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_results,
)
from fastattn.ops.attention.functions.launch import gradients_of_reads, modifier
from fastattn.ops.attention.functions.on_torch import places_of, read_by_mask_mod, read_by_score_mod
from fastattn.ops.attention.functions.sums import CapturedGradients
from fastattn.ops.common.backends import KernelChoice, Kernels, kernel_choice
from fastattn.ops.common.blocks import Block, empty_in_order_of
from fastattn_kernels.attention import choice
from fastattn_kernels.attention.bias_gradient import launch_attention_bias_bwd
from fastattn_kernels.attention.weights import (
    launch_attention_weights,
    launch_attention_weights_delta,
    launch_dropout_keep,
)
from fastattn_kernels.common.delta import Delta
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.plans import planned
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import tile_map_for


def _problem(inputs: Inputs, options: Options, *, trains: bool = False) -> Problem:
    """The call for the kernels; of a score_mod its gradient as well if it ``trains``, which a backward asks for."""
    lower, upper = options.lower, options.upper
    score_mod = mask_mod = None
    if options.score_mod:
        score_mod = modifier(options.score_mod, read_by_score_mod(inputs, options), trains=trains)
    if options.mask_mod:
        mask_mod = modifier(options.mask_mod, read_by_mask_mod(inputs, options))
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
        score_mod=score_mod,
        mask_mod=mask_mod,
    )


def describe(inputs: Inputs, options: Options) -> str:
    """Which kernels forward and backward would be; returned weights have a gradient."""
    # which kernels run depends only on whether there is a gradient of weights, so that any tensor can stand for it
    d_weights = None if options.weights == "none" else WeightsGradient(inputs.query, inputs.query.shape[1])
    return choice.describe(_problem(inputs, options), kernel_choice().kernels, d_weights)


def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::attention_forward``."""
    results, _ = _forward(inputs, options, kernel_choice().kernels)
    return results


def partial_forward(inputs: Inputs, options: Options) -> Results:
    """:func:`forward` with the output in float32, for parts that are to be added up. By plain Triton's kernels: Gluon's
    store their results through a tile of the query's dtype."""
    results, _ = _forward(inputs, options, "triton", torch.float32)
    return results


def forward_and_map(inputs: Inputs, options: Options) -> tuple[Results, Tensor | None]:
    """:func:`forward`, and the granules of the tile map that it made, which :func:`backward` takes; None: it made
    none."""
    return _forward(inputs, options, kernel_choice().kernels)


@planned
def _forward(
    inputs: Inputs, options: Options, kernels: Kernels, dtype: torch.dtype | None = None
) -> tuple[Results, Tensor | None]:
    problem = _problem(inputs, options)
    results = output, lse, weights, statistics = empty_results(inputs, options, dtype)
    tile_map = tile_map_for(problem)
    choice.launch_attention_fwd(problem, output, lse, statistics, tile_map, kernels)
    if not inputs.query.shape[1]:
        weights.zero_()  # the average of no heads, for which the kernel would divide by zero
    elif options.weights != "none":
        launch_attention_weights(problem, statistics, weights, average=options.weights == "average")
    return results, None if tile_map is None else tile_map.granules


def backward(
    gradients: OutputGradients,
    kept: Kept,
    needs: Needs,
    inputs: Inputs,
    options: Options,
    granules: Tensor | None = None,
) -> InputGradients:
    """The contract of ``fastattn::attention_backward``; ``granules`` are those of :func:`forward_and_map`."""
    return _backward(gradients, kept, needs, inputs, options, kernel_choice(), granules)


def partial_backward(
    gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients:
    """:func:`backward` with the gradients of query, key and value in float32, as :func:`partial_forward`."""
    return _backward(gradients, kept, needs, inputs, options, KernelChoice("triton"), None, torch.float32)


@planned
def _backward(
    gradients: OutputGradients,
    kept: Kept,
    needs: Needs,
    inputs: Inputs,
    options: Options,
    kernels: KernelChoice,
    granules: Tensor | None,
    dtype: torch.dtype | None = None,
) -> InputGradients:
    # vmap expands the statistics that its samples share, and the kernels read them without strides
    statistics = kept.statistics.contiguous()
    problem = _problem(inputs, options, trains=True)
    d_output = gradients.d_output
    delta = Delta(kept.output, d_output, gradients.d_lse)
    d_weights = None
    if gradients.d_weights is not None:
        used = gradients.d_weights.any() if needs.d_weights_may_be_zeros else None  # stays on the device
        d_weights = WeightsGradient(gradients.d_weights, inputs.query.shape[1], used)
        launch_attention_weights_delta(problem, statistics, d_weights, delta.tensor)
    d_query, d_key, d_value = (
        empty_in_order_of(t, tuple(t.shape), dtype) for t in (inputs.query, inputs.key, inputs.value)
    )
    d_bias, d_alibi_slopes, d_sinks = (d_output.new_empty(0) for _ in range(3))
    of_rows = None
    if needs.needs_d_alibi_slopes:
        of_rows = torch.zeros(d_output.shape[:3], dtype=torch.float32, device=d_output.device)
    choice.launch_attention_bwd(
        problem, d_output, statistics, delta, d_weights, Gradients(d_query, d_key, d_value, of_rows),
        tile_map_for(problem, granules), *kernels,
    )  # fmt: skip
    if needs.needs_d_bias:
        d_bias = launch_attention_bias_bwd(problem, d_output, statistics, delta.tensor, d_weights)
    if of_rows is not None and inputs.alibi_slopes is not None:
        d_alibi_slopes = of_rows.sum(2).sum_to_size(inputs.alibi_slopes.shape).to(inputs.alibi_slopes.dtype)
    if needs.needs_d_sinks and inputs.sinks is not None:
        d_sinks = sink_gradients(inputs.sinks, statistics, delta.tensor).sum(2)
        d_sinks = d_sinks.sum_to_size(inputs.sinks.shape).to(inputs.sinks.dtype)
    plain = InputGradients(d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks)
    if not (options.score_mod or options.mask_mod):
        return plain
    of_captured = CapturedGradients(inputs, options, needs)
    for number, access in of_captured.accesses:
        for rows, values in gradients_of_reads(
            problem, options.score_mod, number, access, d_output, statistics, delta, d_weights
        ):
            whole = Block(slice(0, inputs.query.shape[0]), rows, slice(0, inputs.key.shape[2]))
            places = places_of(whole, inputs.query.shape[1], options, inputs.query.device)
            of_captured.add(number, values, places)
    return of_captured.found(plain)


def sink_gradients(sinks: Tensor, statistics: Tensor, delta: Tensor) -> Tensor:
    """``[B, H, L]``: what each row adds to the gradient of its head's sink in ``[B | 1, H]``."""
    # A sink has no value, so dP of its pair is zero, and of its dS = P (dP - delta) only -P delta is left.
    row_max, inverse_sum = statistics.unbind(2)
    return -torch.exp2(sinks[:, :, None].float() * math.log2(math.e) - row_max) * inverse_sum * delta


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """Boolean ``[B, H, L, S]``: the weights that the kernels keep under the state's seed."""
    assert inputs.dropout_state is not None
    shape = (*inputs.query.shape[:3], inputs.key.shape[2])
    keep = torch.empty(shape, dtype=torch.bool, device=inputs.query.device)
    launch_dropout_keep(inputs.dropout_state, options.dropout_p, keep)
    return keep
