"""The contract of packed attention's operators on the Triton kernels. Imports triton, so it is imported late."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention.contract import InputGradients, Kept
from fastattn.ops.attention.launch import sink_gradients
from fastattn.ops.attention.varlen.contract import (
    VarlenInputs,
    VarlenNeeds,
    VarlenOptions,
    VarlenOutputGradients,
    VarlenResults,
    empty_results,
)
from fastattn.ops.common.backends import KernelChoice, Kernels, kernel_choice
from fastattn.ops.common.blocks import empty_in_order_of
from fastattn_kernels.attention import choice
from fastattn_kernels.attention.bias_gradient import launch_attention_bias_bwd
from fastattn_kernels.common.delta import Delta
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.packed import Packed
from fastattn_kernels.common.plans import planned
from fastattn_kernels.common.problem import Problem


def _problem(inputs: VarlenInputs, options: VarlenOptions) -> Problem:
    lower, upper = options.lower, options.upper
    rows, keys = inputs.query.shape[2], inputs.key.shape[2]
    used = inputs.seqused_k
    return Problem(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        scale=options.scale,
        bias=inputs.bias,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        prefix=inputs.prefix,
        # the kernels add positions to these, in 32 bits; further out they rule nothing
        lower=None if lower is None else max(lower, -rows - keys),
        upper=None if upper is None else min(upper, rows + keys),
        softcap=options.softcap,
        seed=inputs.dropout_state,
        dropout_p=options.dropout_p,
        packed=Packed(
            inputs.cu_seqlens_q.contiguous(),
            inputs.cu_seqlens_k.contiguous(),
            None if used is None else used.contiguous(),
            options.bottom_right,
        ),
    )


def describe(inputs: VarlenInputs, options: VarlenOptions) -> str:
    """Which kernels forward and backward would be."""
    return choice.describe(_problem(inputs, options), kernel_choice().kernels)


def forward(inputs: VarlenInputs, options: VarlenOptions) -> VarlenResults:
    """The contract of ``fastattn::attention_varlen_forward``."""
    return _forward(inputs, options, kernel_choice().kernels)


@planned
def _forward(inputs: VarlenInputs, options: VarlenOptions, kernels: Kernels) -> VarlenResults:
    results = empty_results(inputs, options)
    choice.launch_attention_fwd(_problem(inputs, options), *results, None, kernels)
    return results


def backward(
    gradients: VarlenOutputGradients, kept: Kept, needs: VarlenNeeds, inputs: VarlenInputs, options: VarlenOptions
) -> InputGradients:
    """The contract of ``fastattn::attention_varlen_backward``."""
    return _backward(gradients, kept, needs, inputs, options, kernel_choice())


@planned
def _backward(
    gradients: VarlenOutputGradients,
    kept: Kept,
    needs: VarlenNeeds,
    inputs: VarlenInputs,
    options: VarlenOptions,
    kernels: KernelChoice,
) -> InputGradients:
    problem, d_output, statistics = _problem(inputs, options), gradients.d_output, kept.statistics.contiguous()
    delta = Delta(kept.output, d_output, gradients.d_lse)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (inputs.query, inputs.key, inputs.value))
    d_bias, d_alibi_slopes, d_sinks = (d_output.new_empty(0) for _ in range(3))
    of_rows = None
    if needs.needs_d_alibi_slopes:
        of_rows = torch.zeros(d_output.shape[:3], dtype=torch.float32, device=d_output.device)
    choice.launch_attention_bwd(
        problem, d_output, statistics, delta, None, Gradients(d_query, d_key, d_value, of_rows), None, *kernels
    )
    if needs.needs_d_bias:
        d_bias = launch_attention_bias_bwd(problem, d_output, statistics, delta.tensor, None)
    if of_rows is not None and inputs.alibi_slopes is not None:
        d_alibi_slopes = _sum_of_rows(of_rows, inputs.alibi_slopes, inputs.cu_seqlens_q)
    if needs.needs_d_sinks and inputs.sinks is not None:
        row = torch.arange(d_output.shape[2], dtype=torch.int32, device=d_output.device)
        belongs = (row >= inputs.cu_seqlens_q[0]) & (row < inputs.cu_seqlens_q[-1])  # the others are not written
        d_sinks = torch.where(belongs, sink_gradients(inputs.sinks, statistics, delta.tensor), 0.0).sum(2)
        d_sinks = d_sinks.sum_to_size(inputs.sinks.shape).to(inputs.sinks.dtype)
    return InputGradients(d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks)


def _sum_of_rows(of_rows: Tensor, like: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sums of ``[1, H, T]`` in the shape of ``like``, ``[N | 1, H]``, in a fixed order."""
    if like.shape[0] == 1:
        return of_rows.sum(2).to(like.dtype)
    ends = cu_seqlens.long().clamp(0, of_rows.shape[2]).cummax(0).values  # whatever the numbers are
    return torch.segment_reduce(of_rows[0].T.contiguous(), "sum", offsets=ends, axis=0, unsafe=True).to(like.dtype)
