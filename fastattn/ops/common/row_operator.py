"""A forward and a backward operator over rows and keys, whose derivatives beyond the first are their formula's.

Attention and additive attention are such pairs. The backward of the forward's Function applies the second operator. The
second Function's own backward, like the forward-mode rules of both, is ``torch.func`` over the formula, a block of rows
at a time (``derivatives``). A kernel launched in a Function's backward as it is would lose second-order terms silently,
and an operator with ``register_autograd`` alone would give zero tangents silently.

What belongs together is found by name: the gradient of the result ``weights`` is ``d_weights`` among the output
gradients, that of the input ``bias`` is ``d_bias`` among the input gradients, and ``needs_d_bias`` says whether it is
to be computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common import derivatives
from fastattn.ops.common.derivatives import Blocked
from fastattn.ops.common.operator import ForwardArguments, Operator, OperatorFunction, looped, take
from fastattn.ops.common.short_way import is_looked_at
from fastattn.ops.common.tracing import is_batched


def _without(prefix: str, names: Sequence[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names]


class BackwardArguments(NamedTuple):
    """The groups of the backward operator's arguments."""

    gradients: Any  # of the results that have one
    kept: Any  # results of the forward that the backward reads
    needs: Any  # which optional gradients to compute
    inputs: Any
    options: Any


@dataclasses.dataclass(eq=False, kw_only=True)
class RowOperator:
    """The pair of operators ``<name>_forward`` and ``<name>_backward``.

    Attributes:
        name: of the pair.
        inputs: NamedTuple type of the tensors of a call, the differentiable ones first, the query ahead of all.
        options: NamedTuple type of the rest of a call. Its field ``backend`` says which implementation runs.
        results: NamedTuple type of what the forward returns; a result that is not asked for is an empty placeholder.
        kept: NamedTuple type of the results that the backward reads, ``output`` among them.
        output_gradients: NamedTuple type, ``d_<result>`` for each differentiable result, ``d_output`` ahead.
        needs: NamedTuple type, ``needs_d_<input>`` for each optional differentiable input; it may have further flags.
        input_gradients: NamedTuple type, ``d_<input>`` for each differentiable input; empty where it is not needed.
        implementation: of a backend's name, the module with its ``forward(inputs, options)`` and
            ``backward(gradients, kept, needs, inputs, options)``.
        ask: makes ``needs`` of the flags of the optional inputs.
        stored: of ``options``: for each result, in their order, whether it is more than an empty placeholder.
        empty_results: of ``(inputs, options)``: the results, to be written.
        empty_gradients: of ``(inputs, needs)``: the input gradients, to be written.
        blocked: the differentiable results as a formula, of ``(inputs, options)``.
        forward_flops: how many operations a forward takes, of ``(inputs, options)`` with shapes for tensors; None: no
            counter counts them.
        backward_flops: the same of a backward.

    Raises:
        ValueError: names of the groups do not fit one another, or the operators' arguments are no schema.
    """

    name: str
    inputs: Any
    options: Any
    results: Any
    kept: Any
    output_gradients: Any
    needs: Any
    input_gradients: Any
    implementation: Callable[[str], ModuleType]
    ask: Callable[..., Any]
    stored: Callable[[Any], tuple[bool, ...]]
    empty_results: Callable[[Any, Any], Any]
    empty_gradients: Callable[[Any, Any], Any]
    blocked: Callable[[Any, Any], Blocked]
    forward_flops: Callable[[Any, Any], int] | None
    backward_flops: Callable[[Any, Any], int] | None
    forward: Operator = dataclasses.field(init=False)
    backward: Operator = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._check_names()
        self.forward = Operator(
            f"{self.name}_forward",
            ForwardArguments(self.inputs, self.options),
            self.results,
            run=lambda inputs, options: self.implementation(options.backend).forward(inputs, options),
            fake=self.empty_results,
            flops=self.forward_flops,
        )
        count = self.backward_flops
        self.backward = Operator(
            f"{self.name}_backward",
            BackwardArguments(self.output_gradients, self.kept, self.needs, self.inputs, self.options),
            self.input_gradients,
            run=self.run_backward,
            fake=lambda gradients, kept, needs, inputs, options: self.empty_gradients(inputs, needs),
            flops=None if count is None else lambda gradients, kept, needs, inputs, options: count(inputs, options),
        )
        names = [field.removeprefix("d_") for field in self.input_gradients._fields]
        self._differentiable = len(names)
        self.optional = [name for name in names if f"needs_d_{name}" in self.needs._fields]
        self._with_gradient = [field.removeprefix("d_") for field in self.output_gradients._fields]

    def _check_names(self) -> None:
        """Raise where a name connects nothing: left to itself it fails in a backward, by an error that names neither
        the group nor the operator, or not at all."""
        inputs, gradients = self.inputs._fields, self.input_gradients._fields
        ahead = tuple(f"d_{name}" for name in inputs)[: len(gradients)]
        if gradients != ahead:
            raise ValueError(
                f"{self.name}: input_gradients has the fields {', '.join(gradients)}: expected {', '.join(ahead)}, the "
                "gradients of the inputs in their order, the differentiable ones first"
            )
        needs = [name for name in self.needs._fields if name.startswith("needs_d_")]
        known = {
            "inputs": (inputs, ("query",)),
            "options": (self.options._fields, ("backend",)),
            "kept": (self.kept._fields, ("output",)),
            "output_gradients": (self.output_gradients._fields[:1], ("d_output",)),
            "results": (self.results._fields, (*self.kept._fields, *_without("d_", self.output_gradients._fields))),
            "input_gradients": (gradients, _without("needs_", needs)),
        }
        for group, (fields, wanted) in known.items():
            if missing := [name for name in wanted if name not in fields]:
                where = "does not begin with" if group == "output_gradients" else "has no"
                raise ValueError(f"{self.name}: {group} {where} {', '.join(missing)}: it has {', '.join(fields)}")

    def run_backward(self, gradients: Any, kept: Any, needs: Any, inputs: Any, options: Any) -> Any:
        """The input gradients, by the backend that the options name."""
        return self.implementation(options.backend).backward(gradients, kept, needs, inputs, options)

    def differentiable(self, inputs: Any) -> Any:
        """What a group of the inputs has for the differentiable ones."""
        return inputs[: self._differentiable]

    def needs_of(self, inputs: Any, wanted: Any) -> Any:
        """What the backward is to compute, from the inputs and from whether autograd wants a gradient of each."""
        return self.ask(*(getattr(inputs, name) is not None and getattr(wanted, name) for name in self.optional))

    def computed(self, needs: Any) -> list[bool]:
        """For each input gradient, whether it is more than an empty placeholder."""
        return [
            getattr(needs, f"needs_{field}") if f"needs_{field}" in needs._fields else True
            for field in self.input_gradients._fields
        ]

    def has_gradient(self, options: Any) -> Any:
        """For each result, whether it is differentiable: it is stored, and the backward takes a gradient of it."""
        stored = zip(self.results._fields, self.stored(options))
        return self.results(*(is_stored and name in self._with_gradient for name, is_stored in stored))

    def gradients_of(self, grads: Sequence[Tensor | None], kept: Any, options: Any) -> Any:
        """The output gradients, from what autograd has for each result: None where nobody used it."""
        found, flags = self.results(*grads), self.has_gradient(options)
        gradients = self.output_gradients(
            *(getattr(found, name) if getattr(flags, name) else None for name in self._with_gradient)
        )
        if gradients.d_output is None:
            gradients = gradients._replace(d_output=torch.zeros_like(kept.output))
        return gradients


class BackwardFunction(OperatorFunction):
    """The input gradients of a call. Their own gradients come from the formula, which differentiates the results that
    were kept as functions of the inputs: so kept results get no gradient."""

    pair: ClassVar[RowOperator]

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        arguments = cls.operator.split(inputs)
        ctx.needs, ctx.options = arguments.needs, arguments.options
        computed = cls.pair.computed(arguments.needs)
        ctx.mark_non_differentiable(*(t for t, is_computed in zip(output, computed) if not is_computed))
        ctx.save_for_backward(*arguments.gradients, *arguments.inputs)
        ctx.save_for_forward(*arguments.gradients, *arguments.inputs)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        gradients, inputs = take(ctx.saved_tensors, cls.pair.output_gradients, cls.pair.inputs)
        cotangents = [g if computed else None for g, computed in zip(grads, cls.pair.computed(ctx.needs))]
        needed = cls.operator.split(ctx.needs_input_grad)
        wanted = (*needed.gradients, *cls.pair.differentiable(needed.inputs))
        found = derivatives.backward_vjp(cls.pair.blocked(inputs, ctx.options), gradients, cotangents, wanted)
        return cls.operator.join(gradients=found[: len(gradients)], inputs=found[len(gradients) :])

    @classmethod
    def jvp(cls, ctx: Any, *grad_inputs: Any) -> Any:
        gradients, inputs = take(ctx.saved_tensors, cls.pair.output_gradients, cls.pair.inputs)
        given = cls.operator.split(grad_inputs)
        tangents = (*given.gradients, *cls.pair.differentiable(given.inputs))
        found = derivatives.backward_jvp(cls.pair.blocked(inputs, ctx.options), gradients, tangents)
        return tuple(t if computed else None for t, computed in zip(found, cls.pair.computed(ctx.needs)))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        computed = cls.pair.computed(cls.operator.split(args).needs)
        return looped(cls, info, in_dims, args, [0 if is_computed else None for is_computed in computed])


class ForwardFunction(OperatorFunction):
    """The results of a call."""

    pair: ClassVar[RowOperator]
    backward_function: ClassVar[type[BackwardFunction]]

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.options = cls.operator.split(inputs)
        results = cls.pair.results(*output)
        flags = cls.pair.has_gradient(ctx.options)
        ctx.mark_non_differentiable(*(t for t, has_gradient in zip(results, flags) if not has_gradient))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(getattr(results, name) for name in cls.pair.kept._fields))
        ctx.save_for_forward(*tensors)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        # read once: checkpointing unpacks what was saved a single time
        inputs, kept = take(ctx.saved_tensors, cls.pair.inputs, cls.pair.kept)
        gradients = cls.pair.gradients_of(grads, kept, ctx.options)
        needs = cls.pair.needs_of(inputs, cls.operator.split(ctx.needs_input_grad).inputs)
        found = cls.backward_function.apply(*gradients, *kept, *needs, *inputs, *ctx.options)
        return cls.operator.join(
            inputs=[g if is_computed else None for g, is_computed in zip(found, cls.pair.computed(needs))]
        )

    @classmethod
    def jvp(cls, ctx: Any, *grad_inputs: Any) -> Any:
        (inputs,) = take(ctx.saved_tensors, cls.pair.inputs)
        tangents = cls.pair.differentiable(cls.operator.split(grad_inputs).inputs)
        found = iter(derivatives.forward_jvp(cls.pair.blocked(inputs, ctx.options), tangents))
        by_name = {field.removeprefix("d_"): next(found) for field in cls.pair.output_gradients._fields}
        flags = cls.pair.has_gradient(ctx.options)._asdict()
        return tuple(by_name[name] if has_gradient else None for name, has_gradient in flags.items())

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        stored = cls.pair.stored(cls.operator.split(args).options)
        return looped(cls, info, in_dims, args, [0 if is_stored else None for is_stored in stored])


# -------------------------------------------------------------------------------------------- calls that nobody watches


def apply_unwatched(function: type[ForwardFunction], inputs: Any, options: Any) -> tuple[Tensor, ...]:
    """The results of a Function over an operator, without the operator: for an eager call that nothing traces,
    transforms or watches. torch's dispatcher takes longer over the arguments than a small call over its work."""
    return _Unwatched.apply(function, inputs, options, *function.pair.differentiable(inputs))


class _Unwatched(torch.autograd.Function):
    """The forward and the backward themselves. A backward that is watched, or differentiated, is the operator's."""

    @staticmethod
    def forward(ctx: Any, function: type[ForwardFunction], inputs: Any, options: Any, *tensors: Tensor | None) -> Any:
        pair = function.pair
        results = pair.implementation(options.backend).forward(inputs, options)
        flags = pair.has_gradient(options)
        ctx.mark_non_differentiable(*(t for t, has_gradient in zip(results, flags) if not has_gradient))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *(getattr(results, name) for name in pair.kept._fields))
        ctx.function, ctx.options = function, options
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        backward_function, options = ctx.function.backward_function, ctx.options
        pair = ctx.function.pair
        inputs, kept = take(ctx.saved_tensors, pair.inputs, pair.kept)
        gradients = pair.gradients_of(grads, kept, options)
        wanted = ctx.needs_input_grad[3:]
        needs = pair.needs_of(inputs, pair.inputs(*wanted, *(False,) * (len(inputs) - len(wanted))))
        if torch.is_grad_enabled() or is_looked_at() or any(g is not None and is_batched(g) for g in gradients):
            found = backward_function.apply(*gradients, *kept, *needs, *inputs, *options)
        else:
            found = pair.run_backward(gradients, kept, needs, inputs, options)
        return None, None, None, *(g if is_computed else None for g, is_computed in zip(found, pair.computed(needs)))
