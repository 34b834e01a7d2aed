"""The norms by the short way (``common.short_way``): a call as the user made it, on the kernels. Imports triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.operator import apply
from fastattn.ops.common.short_way import Made, in_shape
from fastattn.ops.residual_norm import launch, on_triton
from fastattn.ops.residual_norm.call import make_call
from fastattn.ops.residual_norm.contract import (
    Arguments,
    InputGradients,
    Kept,
    Needs,
    Options,
    OutputGradients,
    ResidualNormCall,
    is_stored,
    shares_gradient,
)
from fastattn.ops.residual_norm.layout import in_channels_last
from fastattn.ops.residual_norm.operator import ResidualNormBackward, operands, vectors_dtype


class Context(NamedTuple):
    """What the backward has to know of a call beside tensors.

    Attributes:
        options: of the operators.
        flat: the shape in which rows are normalised, ``[..., N]``.
        names: of the tensors among the arguments.
        shapes: of these tensors.
        dtypes: of these tensors.
        kept: the names of what was kept.
        returned: whether the sum is the second result.
    """

    options: Options
    flat: torch.Size
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    kept: tuple[str, ...]
    returned: bool


def _call(arguments: Arguments) -> ResidualNormCall:
    words = arguments._asdict()
    del words["backend"]
    return make_call(**words)


def short_forward(arguments: Arguments, needs: tuple[bool, ...]) -> Made:
    """The call's results, and what its backward reads: the sum, or ``x`` where nothing was added to it, statistics, and
    what else the gradients depend on."""
    x = arguments.x
    training = any(needs)
    call = _call(arguments)
    seed = on_triton.draw_seed(call)
    inputs, options = operands(call, seed, keeps=training)
    made = launch.forward(inputs, options)
    output = in_shape(made.output, x.shape)
    if call.kind == "rms":
        output = in_channels_last(output, x, arguments.residual)
    results, hidden, total = [output], [], x
    if is_stored(inputs, options):
        total = in_shape(made.total, x.shape)
        (results if call.return_residual else hidden).append(total)
    tensors = {name: each for name, each in arguments._asdict().items() if isinstance(each, Tensor)}
    needed = {"total": total, "statistics": made.statistics, "dropout_state": seed}
    needed |= {name: tensors.get(name) for name in ("weight", "x_bias", "row_scale")}
    if dict(zip(tensors, needs)).get("row_scale"):
        needed["x"] = x
    kept = {name: each for name, each in needed.items() if training and each is not None}
    context = Context(
        options=options,
        flat=call.x.shape,
        names=tuple(tensors),
        shapes=tuple(each.shape for each in tensors.values()),
        dtypes=tuple(each.dtype for each in tensors.values()),
        kept=tuple(kept),
        returned=call.return_residual,
    )
    return Made(tuple(results), tuple(hidden) if training else (), tuple(kept.values()), context)


def short_backward(
    context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors among the arguments, by the kernels."""
    return _backward(context, kept, gradients, needs, launch.backward)


def short_backward_by_operators(
    context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """:func:`short_backward`, differentiable."""

    def run(*groups: Any) -> InputGradients:
        return InputGradients(*apply(ResidualNormBackward, *groups))

    return _backward(context, kept, gradients, needs, run)


def _backward(
    context: Context,
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    run: Callable[[OutputGradients, Kept, Needs, Options], InputGradients],
) -> list[Tensor | None]:
    own, flat = dict(zip(context.kept, kept)), context.flat
    wanted = {name for name, is_needed in zip(context.names, needs) if is_needed}
    shapes, dtypes = dict(zip(context.names, context.shapes)), dict(zip(context.names, context.dtypes))
    vector, row_scale = flat[-1:], own.get("row_scale")
    saved = Kept(
        total=in_shape(own["total"], flat),
        statistics=own["statistics"],
        x=in_shape(own["x"], flat) if "x" in own else None,
        weight=in_shape(own["weight"], vector) if "weight" in own else None,
        x_bias=in_shape(own["x_bias"], vector) if "x_bias" in own else None,
        row_scale=None if row_scale is None else row_scale.expand(flat[:-1]),
        dropout_state=own.get("dropout_state"),
    )
    d_output, d_total = (*gradients, None)[:2]
    if d_output is None:
        d_output = saved.total.new_zeros(flat, dtype=context.options.out_dtype)
    given = OutputGradients(in_shape(d_output, flat), None if d_total is None else in_shape(d_total, flat))
    asked = Needs(
        *(name in wanted for name in ("x", "residual", "weight", "bias", "x_bias", "row_scale")),
        x_dtype=dtypes["x"],
        vectors_dtype=vectors_dtype(wanted, dtypes),
    )
    made = run(given, saved, asked, context.options)
    is_shared = shares_gradient(saved, asked)
    if is_shared:
        made = made._replace(d_residual=made.d_x)
    found = {
        name: _like(getattr(made, f"d_{name}"), shapes[name], dtypes[name]) for name in context.names if name in wanted
    }
    if is_shared and wanted >= {"x", "residual"} and dtypes["x"] == dtypes["residual"]:
        # Two views of one gradient would become the ``grad`` of two leaves in one memory, and a second backward would
        # add to both through each: autograd copies a tensor that it meets twice, but does not compare memory.
        found["residual"] = found["x"]
    return [found.get(name) for name in context.names]


def _like(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient in the shape and dtype of its tensor; that of a row scale may have been broadcast."""
    gradient = gradient.to(dtype)
    return in_shape(gradient, shape) if gradient.numel() == shape.numel() else gradient.sum_to_size(shape)
