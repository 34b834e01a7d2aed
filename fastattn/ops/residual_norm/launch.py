"""The norm operators on the Triton kernels: allocate, launch, return. Imports triton, so it is imported late."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.residual_norm.operator import (
    NormInputs,
    NormNeeds,
    NormOptions,
    NormSaved,
    empty_gradients,
    empty_results,
)
from fastattn_kernels.residual_norm.backward import launch_residual_norm_bwd
from fastattn_kernels.residual_norm.forward import launch_residual_norm_fwd
from fastattn_kernels.residual_norm.problem import NormProblem


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _column(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[..., None]


def forward(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """``(norm, r, statistics)``; the contract of ``fastattn::add_norm_forward``."""
    output, total, statistics = empty_results(inputs, options)
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
    return output, total, statistics


def backward(
    d_output: Tensor, d_total: Tensor | None, saved: NormSaved, needs: NormNeeds, options: NormOptions
) -> tuple[Tensor, ...]:
    """The gradients of the six inputs that have one, empty where they are not wanted; that of the residual also where
    it is that of ``x``. The contract of ``fastattn::add_norm_backward``."""
    total = saved.total
    d_x, d_residual = empty_gradients(saved, needs)
    problem = NormProblem(
        total if saved.x is None else saved.x,
        weight=_vector(saved.weight),
        x_bias=_vector(saved.x_bias),
        row_scale=_column(saved.row_scale),
        is_rms=options.kind == "rms",
        eps=options.eps,
        unit_offset=options.unit_offset,
        seed=saved.dropout_state,
        dropout_p=options.dropout_p,
    )
    wanted = (needs.weight, needs.bias, needs.x_bias)
    vectors, d_row_scale = launch_residual_norm_bwd(
        problem,
        d_output,
        d_total,
        total,
        saved.statistics.contiguous(),  # a transform may hand on a view
        d_residual if d_residual.shape == total.shape else None,
        d_x if d_x.shape == total.shape else None,
        wanted,
        needs.row_scale,
        needs.vectors_dtype,
    )
    given = iter(vectors)
    d_vectors = [next(given) if w else total.new_empty(0, dtype=needs.vectors_dtype) for w in wanted]
    of_rows = total.new_empty(0, dtype=torch.float32) if d_row_scale is None else d_row_scale.view(total.shape[:-1])
    return d_x, d_residual, *d_vectors, of_rows
