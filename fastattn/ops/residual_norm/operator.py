"""The opaque operators ``fastattn::add_norm_forward`` and ``add_norm_backward``, and their autograd rules.

Built as those of attention are (``_autograd``). The sum ``r`` is a result of the first operator and what the second
reads: saved alone, it lets ``x`` and ``residual`` go. In the second's own backward its gradient flows back through
it, as that of any ``r`` that was returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common import functional
from fastattn.ops.common.availability import OPERATOR_DEVICES
from fastattn.ops.residual_norm.call import NormCall
from fastattn.reference import add_norm as reference


class NormInputs(NamedTuple):
    """A call's tensors, those that have gradients first. ``dropout_state`` is a seed and an offset."""

    x: Tensor  # [..., N]
    residual: Tensor | None  # [..., N]
    weight: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    x_bias: Tensor | None  # [N]
    row_scale: Tensor | None  # [...]
    dropout_state: Tensor | None  # int64 [2]


class NormOptions(NamedTuple):
    """What a call says beside its tensors."""

    kind: str
    eps: float
    unit_offset: bool
    dropout_p: float
    out_dtype: torch.dtype
    residual_dtype: torch.dtype
    returns_residual: bool
    keeps: bool  # False: statistics, and a sum that is not returned, need not be stored


class NormSaved(NamedTuple):
    """What the backward reads beside gradients."""

    total: Tensor  # [..., N], the sum r
    statistics: Tensor  # float32 [1 or 3, rows]: inverse deviations, and a layer norm's means in two parts
    x: Tensor | None  # only where the row scale needs its gradient
    weight: Tensor | None
    x_bias: Tensor | None
    row_scale: Tensor | None
    dropout_state: Tensor | None


class NormNeeds(NamedTuple):
    """Which gradients are wanted, and in which dtypes those are whose tensors are not at hand."""

    x: bool
    residual: bool
    weight: bool
    bias: bool
    x_bias: bool
    row_scale: bool
    x_dtype: torch.dtype
    vectors_dtype: torch.dtype


INPUTS, SAVED = len(NormInputs._fields), len(NormSaved._fields)
NEEDS, OPTIONS = len(NormNeeds._fields), len(NormOptions._fields)
DIFFERENTIABLE = 6  # the first of the inputs

_OPTIONS = (
    "str kind, float eps, bool unit_offset, float dropout_p, ScalarType out_dtype, "
    "ScalarType residual_dtype, bool returns_residual, bool keeps"
)
torch.library.define(
    "fastattn::add_norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? row_scale, "
    f"Tensor? dropout_state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastattn::add_norm_backward",
    "(Tensor d_output, Tensor? d_total, Tensor total, Tensor statistics, Tensor? x, Tensor? weight, Tensor? x_bias, "
    "Tensor? row_scale, Tensor? dropout_state, bool needs_x, bool needs_residual, bool needs_weight, bool needs_bias, "
    f"bool needs_x_bias, bool needs_row_scale, ScalarType x_dtype, ScalarType vectors_dtype, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def is_plain(inputs: NormInputs, options: NormOptions) -> bool:
    """Is the sum ``x`` itself? Then it is not stored again."""
    added = (inputs.residual, inputs.x_bias, inputs.row_scale, inputs.dropout_state)
    return all(t is None for t in added) and options.residual_dtype == inputs.x.dtype


def is_stored(inputs: NormInputs, options: NormOptions) -> bool:
    """Is the sum a tensor of its own that somebody, or the backward, will read?"""
    return (options.keeps or options.returns_residual) and not is_plain(inputs, options)


def shares_gradient(saved: NormSaved, needs: NormNeeds) -> bool:
    """Is the gradient of ``x`` that of the sum? Then it is computed and stored once."""
    return saved.dropout_state is None and saved.row_scale is None and needs.x_dtype == saved.total.dtype


# ------------------------------------------------------------------------------------------------------ operators


@torch.library.impl("fastattn::add_norm_forward", OPERATOR_DEVICES)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastattn.ops.residual_norm import launch

    return launch.forward(NormInputs(*args[:INPUTS]), NormOptions(*args[INPUTS:]))


@torch.library.register_fake("fastattn::add_norm_forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(NormInputs(*args[:INPUTS]), NormOptions(*args[INPUTS:]))


def empty_results(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, ``r`` and the statistics, for the kernels to write; empty where they are not to."""
    x = inputs.x
    stored = is_stored(inputs, options)
    rows = math.prod(x.shape[:-1]) if options.keeps else 0
    return (
        torch.empty(x.shape, dtype=options.out_dtype, device=x.device),
        torch.empty(x.shape if stored else (0,), dtype=options.residual_dtype, device=x.device),
        torch.empty((1 if options.kind == "rms" else 3, rows), dtype=torch.float32, device=x.device),
    )


def _split_backward(args: tuple[Any, ...]) -> tuple[Any, Any, NormSaved, NormNeeds, NormOptions]:
    """The arguments of the backward: two gradients, then three groups."""
    d_output, d_total, *rest = args
    return d_output, d_total, NormSaved(*rest[:SAVED]), NormNeeds(*rest[SAVED:-OPTIONS]), NormOptions(*rest[-OPTIONS:])


@torch.library.impl("fastattn::add_norm_backward", OPERATOR_DEVICES)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    from fastattn.ops.residual_norm import launch

    return launch.backward(*_split_backward(args))


@torch.library.register_fake("fastattn::add_norm_backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, saved, needs, _ = _split_backward(args)
    d_x, d_residual = empty_gradients(saved, needs)
    total, size = saved.total, saved.total.shape[-1]
    vectors = [
        total.new_empty(size if needed else 0, dtype=needs.vectors_dtype)
        for needed in (needs.weight, needs.bias, needs.x_bias)
    ]
    d_row_scale = total.new_empty(total.shape[:-1] if needs.row_scale else (0,), dtype=torch.float32)
    return d_x, d_residual, *vectors, d_row_scale


def empty_gradients(saved: NormSaved, needs: NormNeeds) -> tuple[Tensor, Tensor]:
    """Those of ``x`` and of the residual, for the kernels to write; the second is empty where it is the first, and
    either where it is not wanted."""
    total = saved.total
    shared = shares_gradient(saved, needs)
    of_x = needs.x or (shared and needs.residual)
    of_residual = needs.residual and not shared
    d_x = torch.empty(total.shape if of_x else (0,), dtype=needs.x_dtype, device=total.device)
    return d_x, torch.empty(total.shape if of_residual else (0,), dtype=total.dtype, device=total.device)


# -------------------------------------------------------------------------------------------------------- functions


class AddNorm(torch.autograd.Function):
    """``(norm, r, statistics)`` of one call; what is not kept is empty."""

    @staticmethod  # spelled out because torch.compile counts the parameters
    def forward(x, residual, weight, bias, x_bias, row_scale, dropout_state,  # type: ignore[no-untyped-def]
                kind, eps, unit_offset, dropout_p, out_dtype, residual_dtype,
                returns_residual, keeps):  # fmt: skip
        return torch.ops.fastattn.add_norm_forward(
            x, residual, weight, bias, x_bias, row_scale, dropout_state,
            kind, eps, unit_offset, dropout_p, out_dtype, residual_dtype, returns_residual, keeps,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AddNorm.keep(ctx, inputs, output)
        # a gradient that nobody has would be materialised, and read
        stored = is_stored(NormInputs(*inputs[:INPUTS]), ctx.options)
        ctx.mark_non_differentiable(*output[2 if stored and ctx.options.returns_residual else 1 :])

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """What the backward needs."""
        tensors, options = NormInputs(*inputs[:INPUTS]), NormOptions(*inputs[INPUTS:])
        ctx.options = options
        ctx.dtypes = [None if t is None else t.dtype for t in tensors[:DIFFERENTIABLE]]
        ctx.save_for_backward(
            tensors.x if is_plain(tensors, options) else output[1],
            output[2],
            tensors.x if tensors.row_scale is not None and ctx.needs_input_grad[5] else None,
            tensors.weight,
            tensors.x_bias,
            tensors.row_scale,
            tensors.dropout_state,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_output, d_total, _ = grads
        saved, dtypes = NormSaved(*ctx.saved_tensors), ctx.dtypes
        if d_output is None:
            d_output = saved.total.new_zeros(saved.total.shape, dtype=ctx.options.out_dtype)
        wanted: list[Any] = [needed and dtype is not None for needed, dtype in zip(ctx.needs_input_grad, dtypes)]
        of_vectors = {dtype for dtype, needed in zip(dtypes[2:5], wanted[2:5]) if needed}
        vectors_dtype = of_vectors.pop() if len(of_vectors) == 1 else torch.float32
        if d_total is not None and d_total.shape != saved.total.shape:
            d_total = None  # that of a placeholder
        needs = NormNeeds(*wanted, x_dtype=dtypes[0], vectors_dtype=vectors_dtype)
        d_x, d_residual, *rest = _add_norm_backward()(d_output, d_total, *saved, *needs, *ctx.options)
        if shares_gradient(saved, needs):
            d_residual = d_x
        gradients = [
            gradient.to(dtype) if needed else None
            for gradient, needed, dtype in zip((d_x, d_residual, *rest), wanted, dtypes)
        ]
        return *gradients, *(None,) * (INPUTS - DIFFERENTIABLE + OPTIONS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        inputs, options = NormInputs(*args[:INPUTS]), NormOptions(*args[INPUTS:])
        stored = is_stored(inputs, options)
        out_dims = (0, 0 if stored else None, 1 if options.keeps else None)
        of_vectors = in_dims[2:5]
        if inputs.dropout_state is not None or any(d is not None for d in of_vectors):
            return functional.looped(_add_norm(), info, in_dims, args, out_dims)
        samples = info.batch_size
        rowwise = {0, 1, 5}
        folded = [t if i not in rowwise else _front(t, d, samples) for i, (t, d) in enumerate(zip(inputs, in_dims))]
        output, total, statistics = _add_norm()(*folded, *options)
        rows = statistics.shape[1] // max(1, samples)
        if options.keeps:
            statistics = statistics.view(statistics.shape[0], samples, rows)
        return (output, total, statistics), out_dims


class AddNormBackward(torch.autograd.Function):
    """The gradients of :class:`AddNorm`; its own gradients come from the formula."""

    @staticmethod
    def forward(d_output, d_total, total, statistics, x, weight, x_bias,  # type: ignore[no-untyped-def]
                row_scale, dropout_state, needs_x, needs_residual, needs_weight, needs_bias, needs_x_bias,
                needs_row_scale, x_dtype, vectors_dtype,
                kind, eps, unit_offset, dropout_p, out_dtype, residual_dtype,
                returns_residual, keeps):  # fmt: skip
        return torch.ops.fastattn.add_norm_backward(
            d_output, d_total, total, statistics, x, weight, x_bias, row_scale, dropout_state,
            needs_x, needs_residual, needs_weight, needs_bias, needs_x_bias, needs_row_scale, x_dtype, vectors_dtype,
            kind, eps, unit_offset, dropout_p, out_dtype, residual_dtype, returns_residual, keeps,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        d_output, d_total, saved, ctx.needs, ctx.options = _split_backward(inputs)
        ctx.save_for_backward(d_output, d_total, *saved)
        wanted = _computed(saved, ctx.needs)
        ctx.mark_non_differentiable(*(t for t, is_wanted in zip(output, wanted) if not is_wanted))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_output, d_total, *tensors = ctx.saved_tensors
        saved = NormSaved(*tensors)
        computed = _computed(saved, ctx.needs)
        arguments = (d_output, d_total, saved.total, saved.x, saved.weight, saved.x_bias, saved.row_scale)
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5, 6, 7)]
        wanted = [n and t is not None for n, t in zip(needed, arguments)]
        function, primals = functional.of(wanted, _first_order(saved, ctx.needs, ctx.options), arguments)
        _, pullback = functional.vjp(function, *primals)
        found = iter(pullback(tuple(g for g, is_computed in zip(grads, computed) if is_computed)))
        d_d_output, d_d_total, of_total, of_x, of_weight, of_x_bias, of_row_scale = (
            next(found).to(a.dtype) if w and a is not None else None for w, a in zip(wanted, arguments)
        )
        rest = (None,) * (1 + NEEDS + OPTIONS)
        return d_d_output, d_d_total, of_total, None, of_x, of_weight, of_x_bias, of_row_scale, *rest

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        d_output, d_total, saved, needs, options = _split_backward(args)
        samples = info.batch_size
        out_dims = tuple(0 if computed else None for computed in _computed(saved, needs))
        of_vectors = (in_dims[5], in_dims[6])
        sums = needs.weight or needs.bias or needs.x_bias  # over rows: each sample has its own
        if sums or saved.dropout_state is not None or any(d is not None for d in of_vectors):
            return functional.looped(_add_norm_backward(), info, in_dims, args, out_dims)
        gradients = [_front(t, d, samples) for t, d in zip((d_output, d_total), in_dims)]
        total, x, row_scale = (_front(args[i], in_dims[i], samples) for i in (2, 4, 7))
        statistics, dim = saved.statistics, in_dims[3]
        statistics = statistics[:, None].expand(-1, samples, -1) if dim is None else statistics.movedim(dim, 1)
        saved = saved._replace(total=total, x=x, row_scale=row_scale, statistics=statistics.flatten(1))
        return _add_norm_backward()(*gradients, *saved, *needs, *options), out_dims


class AddNormWithForwardMode(AddNorm):
    """:class:`AddNorm` for eager mode: torch.compile cannot trace a Function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AddNorm.keep(ctx, inputs, output)
        # r is differentiable even where it is not returned: the second derivative goes through it
        stored = is_stored(NormInputs(*inputs[:INPUTS]), ctx.options)
        ctx.mark_non_differentiable(*output[2 if stored else 1 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:INPUTS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        inputs = NormInputs(*ctx.saved_tensors[:INPUTS])
        function = _formula(inputs, ctx.options)
        output, total = functional.pushed_forward(function, inputs[:DIFFERENTIABLE], tangents[:DIFFERENTIABLE])
        return output, total if is_stored(inputs, ctx.options) else None, None


class AddNormBackwardWithForwardMode(AddNormBackward):
    """:class:`AddNormBackward` for eager mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AddNormBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[: 2 + SAVED])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        d_output, d_total, *tensors = ctx.saved_tensors
        saved = NormSaved(*tensors)
        positions = (0, 1, 2, 4, 5, 6, 7)  # all but the statistics, which the formula makes of the sum
        arguments = [(d_output, d_total, *saved)[i] for i in positions]
        function = _first_order(saved, ctx.needs, ctx.options)
        found = iter(functional.pushed_forward(function, arguments, [tangents[i] for i in positions]))
        return tuple(next(found) if computed else None for computed in _computed(saved, ctx.needs))


def _add_norm() -> Any:
    return (AddNorm if torch.compiler.is_compiling() else AddNormWithForwardMode).apply


def _add_norm_backward() -> Any:
    return (AddNormBackward if torch.compiler.is_compiling() else AddNormBackwardWithForwardMode).apply


def _computed(saved: NormSaved, needs: NormNeeds) -> tuple[bool, ...]:
    """Which of the six results of the backward are not empty."""
    shared = shares_gradient(saved, needs)
    return needs.x or (shared and needs.residual), needs.residual and not shared, *needs[2:6]


# ---------------------------------------------------------------------------------------------- vmap, the formula


def _front(tensor: Any, dim: int | None, samples: int) -> Any:
    """``tensor`` with vmap's dimension in front, expanded where it has none."""
    if tensor is None:
        return None
    return tensor.expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def dropout_factor(dropout_state: Tensor, like: Tensor, dropout_p: float) -> Tensor:
    """What a call multiplies ``like`` by under this state, float32: what it makes of ones, under any transform."""
    options = NormOptions("rms", 1.0, False, dropout_p, torch.float32, torch.float32, True, False)
    ones = torch.ones(like.shape, dtype=torch.float32, device=like.device)
    return _add_norm()(ones, None, None, None, None, None, dropout_state, *options)[1]


def _factor(dropout_state: Tensor | None, like: Tensor, options: NormOptions) -> Tensor | None:
    return None if dropout_state is None else dropout_factor(dropout_state, like, options.dropout_p)


def _formula(inputs: NormInputs, options: NormOptions) -> Callable[..., tuple[Tensor, Tensor]]:
    """What ``add_norm_forward`` computes, as a differentiable function of the inputs that have gradients."""
    factor = _factor(inputs.dropout_state, inputs.x, options)

    def function(
        x: Tensor, residual: Any, weight: Any, bias: Any, x_bias: Any, row_scale: Any
    ) -> tuple[Tensor, Tensor]:
        if factor is not None:  # as a part of the row scale, element by element
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


def _first_order(saved: NormSaved, needs: NormNeeds, options: NormOptions) -> Callable[..., tuple[Tensor, ...]]:
    """What ``add_norm_backward`` computes, those results that are not empty, as a differentiable function of the
    gradients and of what was saved but the statistics, which are made anew of the sum."""
    factor = _factor(saved.dropout_state, saved.total, options)
    computed = _computed(saved, needs)

    def function(
        d_output: Tensor, d_total: Any, total: Tensor, x: Any, weight: Any, x_bias: Any, row_scale: Any
    ) -> tuple[Tensor, ...]:
        # written out, and not the reference's vjp: one transform inside another does not bear a vmap around both
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
        results = [of_x.to(needs.x_dtype), of_sum.to(saved.total.dtype)]
        leading = tuple(range(of_x.dim() - 1))
        for of_vector in (of_weight, of_bias, of_x):
            results.append((of_vector.sum(leading) if leading else of_vector).to(needs.vectors_dtype))
        branch = None if x is None else x.to(torch.float32) + (0.0 if x_bias is None else x_bias)
        results.append(of_bias if branch is None else (of_branch * branch).sum(-1))
        return tuple(result for result, is_computed in zip(results, computed) if is_computed)

    return function


def apply(call: NormCall, dropout_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(norm, new residual)`` of a call, through the operators."""
    inputs, options = operands(call, dropout_state)
    output, total, _ = _add_norm()(*inputs, *options)
    return output, call.x if call.is_plain else total


def operands(call: NormCall, dropout_state: Tensor | None) -> tuple[NormInputs, NormOptions]:
    """A call in the form that the operators take."""
    inputs = NormInputs(call.x, call.residual, call.weight, call.bias, call.x_bias, call.row_scale, dropout_state)
    differentiates = torch.is_grad_enabled() and (
        # what torch.func differentiates does not say so of itself
        torch._C._are_functorch_transforms_active() or any(t is not None and t.requires_grad for t in inputs)
    )
    options = NormOptions(
        call.kind,
        call.eps,
        call.unit_offset,
        call.dropout_p,
        call.out_dtype,
        call.residual_dtype,
        call.return_residual,
        differentiates,
    )
    return inputs, options
