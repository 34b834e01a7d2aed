"""The opaque operators ``fastattn::additive_forward`` and ``additive_backward``, and their autograd rules.

Built as those of attention are (``_autograd``): derivatives beyond the first come from the formula, in blocks of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.additive_attention import derivatives
from fastattn.ops.additive_attention.call import AdditiveCall
from fastattn.ops.additive_attention.contract import (
    DIFFERENTIABLE,
    INPUTS,
    OPTIONS,
    AdditiveInputs,
    AdditiveOptions,
    empty_gradients,
    empty_results,
    implementation,
)
from fastattn.ops.common import functional
from fastattn.ops.common.availability import OPERATOR_DEVICES
from fastattn.ops.common.flops import make_countable

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? mask, Tensor? key_padding_mask, "
    "SymInt? upper, bool needs_weights, str backend"
)
torch.library.define("fastattn::additive_forward", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fastattn::additive_backward",
    "(Tensor d_output, Tensor? d_weights, Tensor output, Tensor weights, Tensor statistics, bool needs_d_bias, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# Where the inputs are among the arguments of additive_backward, and where it is said whether a bias has its gradient.
_NEEDS_BIAS, _BACKWARD_INPUTS, _BACKWARD_OPTIONS = 5, slice(6, 6 + INPUTS), slice(6 + INPUTS, None)


# ------------------------------------------------------------------------------------------------------ operators


@torch.library.impl("fastattn::additive_forward", OPERATOR_DEVICES)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options = AdditiveInputs(*args[:INPUTS]), AdditiveOptions(*args[INPUTS:])
    return implementation(options.backend).forward(inputs, options)


@torch.library.register_fake("fastattn::additive_forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(AdditiveInputs(*args[:INPUTS]), AdditiveOptions(*args[INPUTS:]))


@torch.library.impl("fastattn::additive_backward", OPERATOR_DEVICES)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, options = AdditiveInputs(*args[_BACKWARD_INPUTS]), AdditiveOptions(*args[_BACKWARD_OPTIONS])
    return implementation(options.backend).backward(args[:2], args[2:5], args[_NEEDS_BIAS], inputs, options)


@torch.library.register_fake("fastattn::additive_backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(AdditiveInputs(*args[_BACKWARD_INPUTS]), args[_NEEDS_BIAS])


# -------------------------------------------------------------------------------------------------------- functions


class Additive(torch.autograd.Function):
    """``(output, weights, statistics)`` of one call; ``weights`` is empty where none are asked for."""

    @staticmethod  # spelled out because torch.compile counts the parameters
    def forward(query, key, value, weight, bias, mask, key_padding_mask,  # type: ignore[no-untyped-def]
                upper, needs_weights, backend):  # fmt: skip
        make_countable()
        return torch.ops.fastattn.additive_forward(
            query, key, value, weight, bias, mask, key_padding_mask, upper, needs_weights, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = AdditiveOptions(*inputs[INPUTS:])
        ctx.save_for_backward(*inputs[:INPUTS], *output)
        ctx.mark_non_differentiable(*output[2 if ctx.options.needs_weights else 1 :])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_output, d_weights, _ = grads
        saved = ctx.saved_tensors  # once: checkpointing unpacks what was saved a single time
        tensors, results = saved[:INPUTS], saved[INPUTS:]
        if d_output is None:
            d_output = torch.zeros_like(results[0])
        if not ctx.options.needs_weights:
            d_weights = None
        needs_d_bias = tensors[4] is not None and ctx.needs_input_grad[4]
        *gradients, d_bias = _additive_backward()(d_output, d_weights, *results, needs_d_bias, *tensors, *ctx.options)
        return *gradients, d_bias if needs_d_bias else None, *(None,) * (INPUTS - DIFFERENTIABLE + OPTIONS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        options = AdditiveOptions(*args[INPUTS:])
        out_dims = (0, 0 if options.needs_weights else None, 0 if options.backend == "triton" else None)
        return functional.looped(_additive(), info, in_dims, args, out_dims)


class AdditiveBackward(torch.autograd.Function):
    """The gradients of :class:`Additive`; its own gradients come from the formula."""

    @staticmethod
    def forward(d_output, d_weights, output, weights, statistics, needs_d_bias,  # type: ignore[no-untyped-def]
                query, key, value, weight, bias, mask, key_padding_mask,
                upper, needs_weights, backend):  # fmt: skip
        make_countable()
        return torch.ops.fastattn.additive_backward(
            d_output, d_weights, output, weights, statistics, needs_d_bias,
            query, key, value, weight, bias, mask, key_padding_mask, upper, needs_weights, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs_d_bias, ctx.options = inputs[_NEEDS_BIAS], AdditiveOptions(*inputs[_BACKWARD_OPTIONS])
        ctx.save_for_backward(*inputs[:2], *inputs[_BACKWARD_INPUTS])
        if not ctx.needs_d_bias:
            ctx.mark_non_differentiable(output[4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:2], AdditiveInputs(*saved[2:])
        cotangents = (*grads[:4], grads[4] if ctx.needs_d_bias else None)
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[_BACKWARD_INPUTS][:DIFFERENTIABLE])
        found = derivatives.backward_vjp(gradients, inputs, ctx.options, cotangents, wanted)
        # Output, weights and statistics get none: the formula already differentiates them through the inputs.
        return *found[:2], *(None,) * 4, *found[2:], *(None,) * (INPUTS - DIFFERENTIABLE + OPTIONS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        out_dims = (0, 0, 0, 0, 0 if args[_NEEDS_BIAS] else None)
        return functional.looped(_additive_backward(), info, in_dims, args, out_dims)


class AdditiveWithForwardMode(Additive):
    """:class:`Additive` for eager mode: torch.compile cannot trace a Function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Additive.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:INPUTS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        inputs = AdditiveInputs(*ctx.saved_tensors[:INPUTS])
        output, weights = derivatives.forward_jvp(inputs, ctx.options, tangents[:DIFFERENTIABLE])
        return output, weights if ctx.options.needs_weights else None, None


class AdditiveBackwardWithForwardMode(AdditiveBackward):
    """:class:`AdditiveBackward` for eager mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AdditiveBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2], *inputs[_BACKWARD_INPUTS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:2], AdditiveInputs(*saved[2:])
        given = (*tangents[:2], *tangents[_BACKWARD_INPUTS][:DIFFERENTIABLE])
        found = derivatives.backward_jvp(gradients, inputs, ctx.options, given)
        return *found[:4], found[4] if ctx.needs_d_bias else None


def _additive() -> Any:
    return (Additive if torch.compiler.is_compiling() else AdditiveWithForwardMode).apply


def _additive_backward() -> Any:
    return (AdditiveBackward if torch.compiler.is_compiling() else AdditiveBackwardWithForwardMode).apply


def apply(call: AdditiveCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """``(output, weights or None)`` of a call, through the operators."""
    output, weights, _ = _additive()(*call[:INPUTS], call.upper, call.needs_weights, backend)
    return output, weights if call.needs_weights else None
