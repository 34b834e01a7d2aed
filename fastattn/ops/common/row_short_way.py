"""The kernels' side of the short way, for a pair of operators over rows and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.operator import apply
from fastattn.ops.common.row_operator import BackwardFunction
from fastattn.ops.common.short_way import Made, in_shape, tensors_in, with_tensors, without_tensors


class Context(NamedTuple):
    """What the backward has to know of a call beside tensors.

    Attributes:
        inputs: of the operators, without their tensors.
        options: of the operators.
        names: of each tensor among the arguments, the name of the input that its gradient is that of.
        shapes: of these tensors.
        input_shapes: of the tensors among the inputs.
        returned: which results the forward returned.
        has_more: whether the forward by the kernels made something for the backward beside its results.
    """

    inputs: Any
    options: Any
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    input_shapes: tuple[torch.Size, ...]
    returned: tuple[str, ...]
    has_more: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShortWay:
    """The implementation that :class:`fastattn.ops.common.short_way.ShortWay` asks for.

    Attributes:
        forward: runs the kernels on ``(inputs, options)`` of the operators. It returns the results, and a tensor that
            the backward takes beside them (attention: the granules of its tile map), or None.
        backward: runs the kernels on the groups of arguments of the backward operator and on that tensor.
        backward_function: the Function of the backward operator, for derivatives beyond the first.
        call_of: makes a validated call out of the arguments.
        seed_of: draws the seed of a call's dropout; None without dropout.
        operands: makes the operators' inputs and options of ``(call, seed, training)``.
        returned: which results are returned, of a call.
        views: of the inputs that are views of an argument made in the call, the argument's name. The argument is kept
            in their place: derivatives beyond the first flow into it, and autograd notices when it is written to.
    """

    forward: Callable[[Any, Any], tuple[Any, Tensor | None]]
    backward: Callable[..., Any]
    backward_function: type[BackwardFunction]
    call_of: Callable[[Any], Any]
    seed_of: Callable[[Any], Tensor | None]
    operands: Callable[[Any, Tensor | None, bool], tuple[Any, Any]]
    returned: Callable[[Any], tuple[str, ...]]
    views: Mapping[str, str]

    def short_forward(self, arguments: Any, needs: tuple[bool, ...]) -> Made:
        """The call's results, and what its backward reads: results, what else the kernels made for it, and inputs."""
        training = any(needs)
        call = self.call_of(arguments)
        inputs, options = self.operands(call, self.seed_of(call), training)
        returned = self.returned(call)
        made, more = self.forward(inputs, options)
        own = [getattr(made, name) for name in self.backward_function.pair.kept._fields]
        if more is not None:
            own.append(more)
        viewed = {name: getattr(arguments, argument) for name, argument in self.views.items()}
        given = [each if each is None else viewed.get(name, each) for name, each in inputs._asdict().items()]
        tensors = [(name, each) for name, value in arguments._asdict().items() for each in tensors_in(value)]
        differentiable = self.backward_function.pair.differentiable(inputs._fields)
        gradients_of = {argument: name for name, argument in self.views.items() if name in differentiable}
        return Made(
            results=tuple(getattr(made, name) for name in returned),
            hidden=(),
            kept=(*own, *(each for each in given if each is not None)) if training else (),
            context=Context(
                inputs=without_tensors(inputs),
                options=options,
                names=tuple(gradients_of.get(name, name) for name, _ in tensors),
                shapes=tuple(each.shape for _, each in tensors),
                input_shapes=tuple(each.shape for each in inputs if each is not None),
                returned=returned,
                has_more=more is not None,
            ),
        )

    def short_backward(
        self, context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """The gradients of the tensors among the arguments, by the kernels."""
        return self._backward(context, kept, gradients, needs, self.backward)

    def short_backward_by_operators(
        self, context: Context, kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """:meth:`short_backward`, differentiable."""

        def run(*arguments: Any) -> Any:
            *groups, _ = arguments
            return self.backward_function.pair.input_gradients(*apply(self.backward_function, *groups))

        return self._backward(context, kept, gradients, needs, run)

    def _backward(
        self,
        context: Context,
        kept: tuple[Tensor, ...],
        gradients: tuple[Tensor | None, ...],
        needs: tuple[bool, ...],
        run: Callable[..., Any],
    ) -> list[Tensor | None]:
        pair = self.backward_function.pair
        results, rest = pair.kept(*kept[: len(pair.kept._fields)]), list(kept[len(pair.kept._fields) :])
        more = rest.pop(0) if context.has_more else None
        inputs = with_tensors(context.inputs, map(in_shape, rest, context.input_shapes))
        of_results = dict(zip(context.returned, gradients))
        if of_results["output"] is None:
            of_results["output"] = torch.zeros_like(results.output)
        given = pair.output_gradients(
            *(of_results.get(field.removeprefix("d_")) for field in pair.output_gradients._fields)
        )
        wanted = {name for name, is_needed in zip(context.names, needs) if is_needed}
        made = run(given, results, pair.ask(*(name in wanted for name in pair.optional)), inputs, context.options, more)
        return [
            in_shape(getattr(made, f"d_{name}"), shape) if is_needed else None
            for name, shape, is_needed in zip(context.names, context.shapes, needs)
        ]
