"""The norm operators on the Triton kernels: allocate, launch, return. Imports triton, so it is imported late."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.residual_norm.contract import (
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_results,
    empty_row_gradients,
)
from fastattn_kernels.common.plans import planned
from fastattn_kernels.residual_norm.backward import launch_residual_norm_bwd
from fastattn_kernels.residual_norm.forward import launch_residual_norm_fwd
from fastattn_kernels.residual_norm.problem import NormProblem


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _column(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[..., None]


@planned
def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::add_norm_forward``."""
    results = output, total, statistics = empty_results(inputs, options)
    problem = NormProblem(
        inputs.x,
        inputs.residual,
        _vector(inputs.weight),
        _vector(inputs.bias),
        _vector(inputs.x_bias),
        _column(inputs.row_scale),
        is_rms=options.kind == "rms",
        eps=options.eps,
        unit_offset=options.unit_offset,
        seed=inputs.dropout_state,
        dropout_p=options.dropout_p,
    )
    stored, kept = total if total.shape == output.shape else None, statistics if options.keeps else None
    launch_residual_norm_fwd(problem, output, stored, kept, options.residual_dtype)
    return results


@planned
def backward(gradients: OutputGradients, kept: Kept, needs: Needs, options: Options) -> InputGradients:
    """The contract of ``fastattn::add_norm_backward``."""
    total = kept.total
    d_x, d_residual = empty_row_gradients(kept, needs)
    problem = NormProblem(
        total if kept.x is None else kept.x,
        weight=_vector(kept.weight),
        x_bias=_vector(kept.x_bias),
        row_scale=_column(kept.row_scale),
        is_rms=options.kind == "rms",
        eps=options.eps,
        unit_offset=options.unit_offset,
        seed=kept.dropout_state,
        dropout_p=options.dropout_p,
    )
    wanted = (needs.needs_d_weight, needs.needs_d_bias, needs.needs_d_x_bias)
    vectors, d_row_scale = launch_residual_norm_bwd(
        problem,
        gradients.d_output,
        gradients.d_total,
        total,
        kept.statistics.contiguous(),  # a transform may hand on a view
        d_residual if d_residual.shape == total.shape else None,
        d_x if d_x.shape == total.shape else None,
        wanted,
        needs.needs_d_row_scale,
        needs.vectors_dtype,
    )
    given = iter(vectors)
    d_vectors = [next(given) if w else total.new_empty(0, dtype=needs.vectors_dtype) for w in wanted]
    of_rows = total.new_empty(0, dtype=torch.float32) if d_row_scale is None else d_row_scale.view(total.shape[:-1])
    return InputGradients(d_x, d_residual, *d_vectors, d_row_scale=of_rows)
