"""The kernels' side of the short way, for a pair of operators over rows and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.operator import apply
from fastattn.ops.common.row_operator import BackwardFunction
from fastattn.ops.common.short_way import Made, tensors_in, with_tensors, without_tensors


class Context(NamedTuple):
    """What the backward has to know of a call beside tensors.

    Attributes:
        arguments: of the call, without their tensors.
        returned: which results the forward returned.
        has_seed: whether there is dropout, and its seed is among what was kept.
        has_more: whether the forward by the kernels made something for the backward beside its results.
    """

    arguments: Any
    returned: tuple[str, ...]
    has_seed: bool
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
        inputs: the names of arguments that are called otherwise among the operators' inputs.
    """

    forward: Callable[[Any, Any], tuple[Any, Tensor | None]]
    backward: Callable[..., Any]
    backward_function: type[BackwardFunction]
    call_of: Callable[[Any], Any]
    seed_of: Callable[[Any], Tensor | None]
    operands: Callable[[Any, Tensor | None, bool], tuple[Any, Any]]
    returned: Callable[[Any], tuple[str, ...]]
    inputs: Mapping[str, str]

    def short_forward(self, arguments: Any, training: bool) -> Made:
        """The call's results, and what its backward reads: results, the seed if there is dropout, what else the kernels
        made for it, and the tensors of the call."""
        call = self.call_of(arguments)
        seed, returned = self.seed_of(call), self.returned(call)
        made, more = self.forward(*self.operands(call, seed, training))
        own = [getattr(made, name) for name in self.backward_function.pair.kept._fields]
        own += [each for each in (seed, more) if each is not None]
        return Made(
            results=tuple(getattr(made, name) for name in returned),
            hidden=(),
            kept=tuple(own + tensors_in(arguments)) if training else (),
            context=Context(without_tensors(arguments), returned, seed is not None, more is not None),
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
        seed = rest.pop(0) if context.has_seed else None
        more = rest.pop(0) if context.has_more else None
        arguments = with_tensors(context.arguments, iter(rest))
        inputs, options = self.operands(self.call_of(arguments), seed, True)
        of_results = dict(zip(context.returned, gradients))
        if of_results["output"] is None:
            of_results["output"] = torch.zeros_like(results.output)
        given = pair.output_gradients(
            *(of_results.get(field.removeprefix("d_")) for field in pair.output_gradients._fields)
        )
        names = [name for name, value in arguments._asdict().items() for _ in tensors_in((value,))]
        wanted = {name for name, is_needed in zip(names, needs) if is_needed}
        asked = pair.ask(*(name in {self.inputs.get(each, each) for each in wanted} for name in pair.optional))
        made = run(given, results, asked, inputs, options, more)
        return [
            getattr(made, f"d_{self.inputs.get(name, name)}").reshape(tensor.shape) if name in wanted else None
            for name, tensor in zip(names, rest)
        ]
