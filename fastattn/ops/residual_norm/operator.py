"""Residual add and norm as a pair of operators, ``fastattn::add_norm_forward`` and ``add_norm_backward``.

The sum ``r`` is a result of the first operator, and what the second reads: once it is kept, ``x`` and the residual need
not be. In the second operator's own backward the gradient of ``r`` flows back through the first, as that of an ``r``
that was returned. Derivatives beyond the first are ``torch.func`` over the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.derivatives import pushed_forward, restricted, vjp
from fastattn.ops.common.operator import ForwardArguments, Operator, OperatorFunction, looped, take
from fastattn.ops.common.operator import apply as apply_function
from fastattn.ops.common.tracing import is_functorch_active
from fastattn.ops.residual_norm.contract import (
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
    ResidualNormCall,
    Results,
    empty_gradients,
    empty_results,
    is_plain,
    is_stored,
    shares_gradient,
)
from fastattn.ops.residual_norm.contract import computed as computed_gradients
from fastattn.reference import add_norm as reference


class BackwardArguments(NamedTuple):
    """The groups of the backward operator's arguments."""

    gradients: Any
    kept: Any
    needs: Any
    options: Any


# -------------------------------------------------------------------------------------------------------- the operators


def _run_forward(inputs: Inputs, options: Options) -> Results:
    from fastattn.ops.residual_norm import launch  # imports triton

    return launch.forward(inputs, options)


def _run_backward(gradients: OutputGradients, kept: Kept, needs: Needs, options: Options) -> InputGradients:
    from fastattn.ops.residual_norm import launch  # imports triton

    return launch.backward(gradients, kept, needs, options)


FORWARD = Operator("add_norm_forward", ForwardArguments(Inputs, Options), Results, run=_run_forward, fake=empty_results)
BACKWARD = Operator(
    "add_norm_backward",
    BackwardArguments(OutputGradients, Kept, Needs, Options),
    InputGradients,
    run=_run_backward,
    fake=lambda gradients, kept, needs, options: empty_gradients(kept, needs),
)
# Every input but the state of the dropout has a gradient.
_DIFFERENTIABLE = [field.removeprefix("d_") for field in InputGradients._fields]


def _differentiable(inputs: Any) -> list[Any]:
    """What a group of the inputs has for the differentiable ones."""
    return [getattr(inputs, name) for name in _DIFFERENTIABLE]


class ResidualNormBackward(OperatorFunction):
    """The gradients of :class:`ResidualNorm`; its own gradients come from the formula."""

    operator = BACKWARD

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gradients, kept, ctx.needs, ctx.options = BACKWARD.split(inputs)
        computed = computed_gradients(kept, ctx.needs)
        ctx.mark_non_differentiable(*(t for t, is_computed in zip(output, computed) if not is_computed))
        ctx.save_for_backward(*gradients, *kept)
        ctx.save_for_forward(*gradients, *kept)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        gradients, kept = take(ctx.saved_tensors, OutputGradients, Kept)
        variables = Variables.among(gradients, kept)
        needed = BACKWARD.split(ctx.needs_input_grad)
        wanted = [
            is_needed and t is not None
            for is_needed, t in zip(Variables.among(needed.gradients, needed.kept), variables)
        ]
        function, primals = restricted(wanted, _first_order(kept, ctx.needs, ctx.options), variables)
        _, pullback = vjp(function, *primals)
        computed = computed_gradients(kept, ctx.needs)
        found = iter(pullback(tuple(g for g, is_computed in zip(grads, computed) if is_computed)))
        by_name = {
            name: next(found).to(t.dtype)
            for name, t, is_wanted in zip(Variables._fields, variables, wanted)
            if is_wanted and t is not None
        }
        return BACKWARD.join(
            gradients=[by_name.get(name) for name in OutputGradients._fields],
            kept=[by_name.get(name) for name in Kept._fields],
        )

    @classmethod
    def jvp(cls, ctx: Any, *grad_inputs: Any) -> Any:
        gradients, kept = take(ctx.saved_tensors, OutputGradients, Kept)
        given = BACKWARD.split(grad_inputs)
        tangents = Variables.among(given.gradients, given.kept)
        function = _first_order(kept, ctx.needs, ctx.options)
        found = iter(pushed_forward(function, Variables.among(gradients, kept), tangents))
        return tuple(next(found) if is_computed else None for is_computed in computed_gradients(kept, ctx.needs))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        gradients, kept, needs, options = BACKWARD.split(args)
        dims, samples = BACKWARD.split(in_dims), info.batch_size
        out_dims = tuple(0 if is_computed else None for is_computed in computed_gradients(kept, needs))
        sums = needs.needs_d_weight or needs.needs_d_bias or needs.needs_d_x_bias  # over rows: each sample has its own
        has_vectors = dims.kept.weight is not None or dims.kept.x_bias is not None
        if sums or has_vectors or kept.dropout_state is not None:
            return looped(cls, info, in_dims, args, out_dims)
        gradients = [_in_front(t, dim, samples) for t, dim in zip(gradients, dims.gradients)]
        statistics, dim = kept.statistics, dims.kept.statistics
        statistics = statistics[:, None].expand(-1, samples, -1) if dim is None else statistics.movedim(dim, 1)
        kept = kept._replace(
            total=_in_front(kept.total, dims.kept.total, samples),
            statistics=statistics.flatten(1),
            x=_in_front(kept.x, dims.kept.x, samples),
            row_scale=_in_front(kept.row_scale, dims.kept.row_scale, samples),
        )
        return cls.apply(*gradients, *kept, *needs, *options), out_dims


class ResidualNorm(OperatorFunction):
    """``(norm, r, statistics)`` of one call; what is not stored is empty."""

    operator = FORWARD

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.options = FORWARD.split(inputs)
        results, wanted = Results(*output), FORWARD.split(ctx.needs_input_grad).inputs
        ctx.dtypes = {
            name: None if t is None else t.dtype for name, t in zip(_DIFFERENTIABLE, _differentiable(tensors))
        }
        # r is differentiable even where it is not returned: the second derivative goes through it.
        stored = is_stored(tensors, ctx.options)
        ctx.mark_non_differentiable(*(() if stored else (results.total,)), results.statistics)
        ctx.set_materialize_grads(False)
        kept = Kept(
            total=tensors.x if is_plain(tensors, ctx.options) else results.total,
            statistics=results.statistics,
            x=tensors.x if tensors.row_scale is not None and wanted.row_scale else None,
            weight=tensors.weight,
            x_bias=tensors.x_bias,
            row_scale=tensors.row_scale,
            dropout_state=tensors.dropout_state,
        )
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*tensors)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        (kept,), found = take(ctx.saved_tensors, Kept), Results(*grads)
        d_output, d_total = found.output, found.total
        if d_output is None:
            d_output = kept.total.new_zeros(kept.total.shape, dtype=ctx.options.out_dtype)
        if d_total is not None and d_total.shape != kept.total.shape:
            d_total = None  # the gradient of an empty placeholder
        needed, dtypes = FORWARD.split(ctx.needs_input_grad).inputs, ctx.dtypes
        wanted = {name: getattr(needed, name) and dtype is not None for name, dtype in dtypes.items()}
        needs = Needs(
            *wanted.values(),
            x_dtype=dtypes["x"],
            vectors_dtype=vectors_dtype([name for name in wanted if wanted[name]], dtypes),
        )
        gradients = InputGradients(
            *ResidualNormBackward.apply(*OutputGradients(d_output, d_total), *kept, *needs, *ctx.options)
        )
        if shares_gradient(kept, needs):
            gradients = gradients._replace(d_residual=gradients.d_x)
        columns = zip(gradients, wanted.values(), dtypes.values())
        return FORWARD.join(inputs=[g.to(dtype) if is_wanted else None for g, is_wanted, dtype in columns])

    @classmethod
    def jvp(cls, ctx: Any, *grad_inputs: Any) -> Any:
        (inputs,) = take(ctx.saved_tensors, Inputs)
        tangents = _differentiable(FORWARD.split(grad_inputs).inputs)
        output, total = pushed_forward(_formula(inputs, ctx.options), _differentiable(inputs), tangents)
        return output, total if is_stored(inputs, ctx.options) else None, None

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        inputs, options = FORWARD.split(args)
        dims, samples = FORWARD.split(in_dims).inputs, info.batch_size
        out_dims = (0, 0 if is_stored(inputs, options) else None, 1 if options.keeps else None)
        has_vectors = any(dim is not None for dim in (dims.weight, dims.bias, dims.x_bias))
        if has_vectors or inputs.dropout_state is not None:
            return looped(cls, info, in_dims, args, out_dims)
        rows = {name: _in_front(getattr(inputs, name), getattr(dims, name), samples) for name in _ROWWISE}
        results = Results(*cls.apply(*inputs._replace(**rows), *options))
        if options.keeps:
            statistics = results.statistics
            each = statistics.shape[1] // max(1, samples)
            results = results._replace(statistics=statistics.view(statistics.shape[0], samples, each))
        return tuple(results), out_dims


def vectors_dtype(wanted: Collection[str], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype in which the gradients of the vectors are asked for: the one they share, else float32."""
    found = {dtypes[name] for name in ("weight", "bias", "x_bias") if name in wanted}
    return found.pop() if len(found) == 1 else torch.float32


# The inputs that have a row for each row of x: samples of a vmap become rows of one call.
_ROWWISE = ("x", "residual", "row_scale")


def _in_front(tensor: Any, dim: int | None, samples: int) -> Any:
    """``tensor`` with vmap's dimension in front, expanded where it has none."""
    if tensor is None:
        return None
    return tensor.expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


# ---------------------------------------------------------------------------------------------------------- the formula


class Variables(NamedTuple):
    """What the backward is a differentiable function of: the gradients, and what was kept but the statistics, which the
    formula makes of the sum."""

    d_output: Any
    d_total: Any
    total: Any
    x: Any
    weight: Any
    x_bias: Any
    row_scale: Any

    @classmethod
    def among(cls, gradients: Any, kept: Any) -> Variables:
        """What these groups of the backward's arguments have for the variables."""
        return cls(*(getattr(gradients if name in gradients._fields else kept, name) for name in cls._fields))


def dropout_factor(dropout_state: Tensor, like: Tensor, dropout_p: float) -> Tensor:
    """The factor that dropout applies to each element of ``like`` under this state, float32.

    It is what a call without a norm's other terms makes of ones, and works under any transform."""
    ones = torch.ones(like.shape, dtype=torch.float32, device=like.device)
    inputs = Inputs(ones, None, None, None, None, None, dropout_state)
    options = Options("rms", 1.0, False, dropout_p, torch.float32, torch.float32, returns_residual=True, keeps=False)
    return Results(*apply_function(ResidualNorm, inputs, options)).total


def _factor(dropout_state: Tensor | None, like: Tensor, options: Options) -> Tensor | None:
    return None if dropout_state is None else dropout_factor(dropout_state, like, options.dropout_p)


def _formula(inputs: Inputs, options: Options) -> Callable[..., tuple[Tensor, Tensor]]:
    """What ``add_norm_forward`` computes, as a differentiable function of the inputs that have gradients."""
    factor = _factor(inputs.dropout_state, inputs.x, options)

    def function(
        x: Tensor, residual: Any, weight: Any, bias: Any, x_bias: Any, row_scale: Any
    ) -> tuple[Tensor, Tensor]:
        if factor is not None:  # dropout scales single elements as the row scale does rows
            x = x + x_bias if x_bias is not None else x
            x, x_bias = x * factor, None
        result = reference(
            x,
            residual,
            weight,
            bias,
            kind=options.kind,  # type: ignore[arg-type]
            eps=options.eps,
            x_bias=x_bias,
            row_scale=row_scale,
            unit_offset=options.unit_offset,
            out_dtype=options.out_dtype,
            residual_dtype=options.residual_dtype,
        )
        return result.output, result.residual

    return function


def _first_order(kept: Kept, needs: Needs, options: Options) -> Callable[..., tuple[Tensor, ...]]:
    """The results of ``add_norm_backward`` that are not empty, as a differentiable function of the :class:`Variables`.

    The statistics are no variable: they are computed again from the sum."""
    factor = _factor(kept.dropout_state, kept.total, options)
    computed = computed_gradients(kept, needs)

    def function(
        d_output: Tensor, d_total: Any, total: Tensor, x: Any, weight: Any, x_bias: Any, row_scale: Any
    ) -> tuple[Tensor, ...]:
        # Written out, and not the reference's vjp: vmap fails around a transform that is nested in another.
        total, of_bias = total.to(torch.float32), d_output.to(torch.float32)
        if options.kind == "layer":
            total = total - total.mean(dim=-1, keepdim=True)
        rstd = (total.square().mean(dim=-1, keepdim=True) + options.eps).rsqrt()
        normal = total * rstd
        of_weight, of_normal = of_bias * normal, of_bias
        if weight is not None:
            of_normal = of_bias * (weight.to(torch.float32) + options.unit_offset)
        of_sum = of_normal - normal * (of_normal * normal).mean(dim=-1, keepdim=True)
        if options.kind == "layer":
            of_sum = of_sum - of_normal.mean(dim=-1, keepdim=True)
        of_sum = of_sum * rstd
        if d_total is not None:
            of_sum = of_sum + d_total
        of_branch = of_sum if factor is None else of_sum * factor
        of_x = of_branch if row_scale is None else of_branch * row_scale.to(torch.float32)[..., None]
        results = [of_x.to(needs.x_dtype), of_sum.to(kept.total.dtype)]
        leading = tuple(range(of_x.dim() - 1))
        for of_vector in (of_weight, of_bias, of_x):
            results.append((of_vector.sum(leading) if leading else of_vector).to(needs.vectors_dtype))
        branch = None if x is None else x.to(torch.float32) + (0.0 if x_bias is None else x_bias)
        results.append(of_bias if branch is None else (of_branch * branch).sum(-1))
        return tuple(result for result, is_computed in zip(results, computed) if is_computed)

    return function


# --------------------------------------------------------------------------------------------------------------- a call


def apply(call: ResidualNormCall, dropout_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(norm, new residual)`` of a call, through the operators."""
    results = Results(*apply_function(ResidualNorm, *operands(call, dropout_state)))
    return results.output, call.x if call.is_plain else results.total


def operands(
    call: ResidualNormCall, dropout_state: Tensor | None, *, keeps: bool | None = None
) -> tuple[Inputs, Options]:
    """A call in the form that the operators take; by default it keeps what a backward reads if one may come."""
    inputs = Inputs(*_differentiable(call), dropout_state=dropout_state)
    differentiates = torch.is_grad_enabled() and (
        # a tensor that torch.func differentiates need not have requires_grad
        is_functorch_active() or any(t is not None and t.requires_grad for t in inputs)
    )
    options = Options(
        call.kind,
        call.eps,
        call.unit_offset,
        call.dropout_p,
        call.out_dtype,
        call.residual_dtype,
        returns_residual=call.return_residual,
        keeps=differentiates if keeps is None else keeps,
    )
    return inputs, options
