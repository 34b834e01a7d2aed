"""The opaque operators ``fastattn::attention_forward`` and ``attention_backward``, and their autograd rules.

The operators are opaque to torch.compile and export. The two Functions above them decide what differentiation means:
the first calls the second in its backward, and the second, like both forward-mode rules, falls back on the reference's
formula, in blocks of rows (``_derivatives``). A raw kernel launch in a backward would lose second-order terms silently;
an operator with ``register_autograd`` alone would give silent zero tangents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import derivatives
from fastattn.ops.attention.call import AttentionCall
from fastattn.ops.attention.contract import (
    DIFFERENTIABLE,
    GRADIENTS,
    INPUTS,
    Inputs,
    Options,
    empty_in_order_of,
    implementation,
    statistics_dtype,
    statistics_shape,
    weights_shape,
)
from fastattn.ops.common import functional
from fastattn.ops.common.availability import OPERATOR_DEVICES
from fastattn.ops.common.flops import make_countable

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, "
    "Tensor? key_padding_mask, Tensor? query_documents, Tensor? key_documents, Tensor? prefix, Tensor? dropout_state"
)
_OPTIONS = (
    "SymInt? lower, SymInt? upper, SymInt shift, float? softcap, float scale, float dropout_p, str weights, "
    "str backend, bool keeps_statistics"
)
_GRADIENTS = (
    "Tensor d_output, Tensor? d_lse, Tensor? d_weights, Tensor output, Tensor statistics, bool needs_d_bias, "
    "bool needs_d_slopes, bool needs_d_sinks, bool d_weights_may_be_zeros"
)

torch.library.define("fastattn::attention_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "fastattn::attention_backward",
    f"({_GRADIENTS}, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

# Where things are among the arguments of attention_backward: what it needs to compute, the inputs, the options.
_NEEDS, _MAY_BE_ZEROS = slice(5, 8), 8
_BACKWARD_INPUTS, _BACKWARD_OPTIONS = slice(GRADIENTS, GRADIENTS + INPUTS), slice(GRADIENTS + INPUTS, None)
# Those of the inputs that broadcast over a batch of 1.
_BROADCASTING = tuple(
    Inputs._fields.index(name)
    for name in ("bias", "alibi_slopes", "sinks", "mask", "query_documents", "key_documents", "prefix")
)
_OPTIONAL = range(3, DIFFERENTIABLE)  # the inputs with a gradient only where it is needed


# ------------------------------------------------------------------------------------------------------ operators


@torch.library.impl("fastattn::attention_forward", OPERATOR_DEVICES)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options = Inputs(*args[:INPUTS]), Options(*args[INPUTS:])
    return implementation(options.backend).forward(inputs, options)


@torch.library.register_fake("fastattn::attention_forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options = Inputs(*args[:INPUTS]), Options(*args[INPUTS:])
    query, key, value = inputs.query, inputs.key, inputs.value
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    dtype = statistics_dtype(query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    statistics = query.new_empty(statistics_shape(query, options.backend), dtype=dtype)
    return output, lse, query.new_empty(weights_shape(query, key, options.weights)), statistics


@torch.library.impl("fastattn::attention_backward", OPERATOR_DEVICES)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, options = Inputs(*args[_BACKWARD_INPUTS]), Options(*args[_BACKWARD_OPTIONS])
    output, statistics = args[3:5]
    return implementation(options.backend).backward(
        args[:3], output, statistics, args[_NEEDS], inputs, options, d_weights_may_be_zeros=args[_MAY_BE_ZEROS]
    )


@torch.library.register_fake("fastattn::attention_backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[_BACKWARD_INPUTS])
    d_qkv = (empty_in_order_of(t, tuple(t.shape)) for t in inputs[:3])
    optional = (
        t.new_empty(t.shape) if needed and t is not None else inputs.query.new_empty(0)
        for t, needed in zip(inputs[3:DIFFERENTIABLE], args[_NEEDS])
    )
    return *d_qkv, *optional


# -------------------------------------------------------------------------------------------------------- functions


class Attention(torch.autograd.Function):
    """``(output, lse, weights, statistics)`` of one call; ``weights`` is empty where none are asked for."""

    @staticmethod  # spelled out because torch.compile counts the parameters
    def forward(query, key, value, bias, alibi_slopes, sinks, mask,  # type: ignore[no-untyped-def]
                key_padding_mask, query_documents, key_documents, prefix, dropout_state,
                lower, upper, shift, softcap, scale, dropout_p, weights, backend, keeps_statistics):  # fmt: skip
        make_countable()
        return torch.ops.fastattn.attention_forward(
            query, key, value, bias, alibi_slopes, sinks, mask,
            key_padding_mask, query_documents, key_documents, prefix, dropout_state,
            lower, upper, shift, softcap, scale, dropout_p, weights, backend, keeps_statistics,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = Options(*inputs[INPUTS:])
        ctx.save_for_backward(*inputs[:INPUTS], output[0], output[3])
        ctx.mark_non_differentiable(*output[2:] if ctx.options.weights == "none" else output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_output, d_lse, d_weights, _ = grads
        *tensors, output, statistics = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(output)
        if ctx.options.weights == "none":
            d_weights = None
        # a graph is compiled before a loss is known, and is given zeros for what that does not use
        may_be_zeros = torch.compiler.is_compiling()
        needs = [tensors[i] is not None and ctx.needs_input_grad[i] for i in _OPTIONAL]
        d_query, d_key, d_value, *optional = _attention_backward()(
            d_output, d_lse, d_weights, output, statistics, *needs, may_be_zeros, *tensors, *ctx.options
        )
        optional = [gradient if needed else None for gradient, needed in zip(optional, needs)]
        return d_query, d_key, d_value, *optional, *(None,) * (INPUTS - DIFFERENTIABLE + len(ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        inputs, options = Inputs(*args[:INPUTS]), Options(*args[INPUTS:])
        out_dims = (0, 0, None if options.weights == "none" else 0, 0)
        if inputs.dropout_state is not None:  # each sample draws its own, or all of them the same: no folding
            return functional.looped(_attention(), info, in_dims, args, out_dims)
        folded = _fold(info.batch_size, in_dims[:INPUTS], inputs, broadcasting=_BROADCASTING)
        return _unfolded(info.batch_size, _attention()(*folded, *options), out_dims), out_dims


class AttentionBackward(torch.autograd.Function):
    """The gradients of :class:`Attention`; its own gradients come from the formula."""

    @staticmethod
    def forward(d_output, d_lse, d_weights, output, statistics,  # type: ignore[no-untyped-def]
                needs_d_bias, needs_d_slopes, needs_d_sinks, d_weights_may_be_zeros,
                query, key, value, bias, alibi_slopes, sinks, mask,
                key_padding_mask, query_documents, key_documents, prefix, dropout_state,
                lower, upper, shift, softcap, scale, dropout_p, weights, backend, keeps_statistics):  # fmt: skip
        make_countable()
        return torch.ops.fastattn.attention_backward(
            d_output, d_lse, d_weights, output, statistics,
            needs_d_bias, needs_d_slopes, needs_d_sinks, d_weights_may_be_zeros,
            query, key, value, bias, alibi_slopes, sinks, mask,
            key_padding_mask, query_documents, key_documents, prefix, dropout_state,
            lower, upper, shift, softcap, scale, dropout_p, weights, backend, keeps_statistics,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs, ctx.options = inputs[_NEEDS], Options(*inputs[_BACKWARD_OPTIONS])
        ctx.save_for_backward(*inputs[:3], *inputs[_BACKWARD_INPUTS])
        ctx.mark_non_differentiable(*(t for t, needed in zip(output[3:], ctx.needs) if not needed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing unpacks what was saved a single time
        gradients, inputs = saved[:3], Inputs(*saved[3:])
        cotangents = (*grads[:3], *(g if needed else None for g, needed in zip(grads[3:], ctx.needs)))
        wanted = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[_BACKWARD_INPUTS][:DIFFERENTIABLE])
        found = derivatives.backward_vjp(gradients, inputs, ctx.options, cotangents, wanted)
        # Output and statistics get none: the formula already differentiates them through the inputs.
        rest = (None,) * (INPUTS - DIFFERENTIABLE + len(ctx.options))
        return *found[:3], *(None,) * (GRADIENTS - 3), *found[3:], *rest

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        needs, samples = args[_NEEDS], info.batch_size
        inputs, input_dims = Inputs(*args[_BACKWARD_INPUTS]), in_dims[_BACKWARD_INPUTS]
        out_dims = (0, 0, 0, *(0 if needed else None for needed in needs))
        if inputs.dropout_state is not None:
            return functional.looped(_attention_backward(), info, in_dims, args, out_dims)
        gradients = _fold(samples, in_dims[:5], args[:5])
        # what needs its gradient has one a sample
        alone = [i for i, needed in zip(_OPTIONAL, needs) if needed]
        folded = _fold(samples, input_dims, inputs, broadcasting=tuple(i for i in _BROADCASTING if i not in alone))
        found = _attention_backward()(
            *gradients, *needs, args[_MAY_BE_ZEROS], *folded, *args[_BACKWARD_OPTIONS]
        )  # fmt: skip
        results = list(_unfolded(samples, found, out_dims))
        for i in alone:
            tensor, dim = inputs[i], input_dims[i]
            assert tensor is not None
            shape = tensor.shape if dim is None else tensor.select(dim, 0).shape
            results[i] = results[i].sum_to_size(samples, *shape)
        return tuple(results), out_dims


class AttentionWithForwardMode(Attention):
    """:class:`Attention` for eager mode: torch.compile cannot trace a Function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Attention.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:INPUTS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        inputs = Inputs(*ctx.saved_tensors[:INPUTS])
        output, lse, weights = derivatives.forward_jvp(inputs, ctx.options, tangents[:DIFFERENTIABLE])
        return output, lse, None if ctx.options.weights == "none" else weights, None


class AttentionBackwardWithForwardMode(AttentionBackward):
    """:class:`AttentionBackward` for eager mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AttentionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], *inputs[_BACKWARD_INPUTS])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:3], Inputs(*saved[3:])
        given = (*tangents[:3], *tangents[_BACKWARD_INPUTS][:DIFFERENTIABLE])
        found = derivatives.backward_jvp(gradients, inputs, ctx.options, given)
        return *found[:3], *(t if needed else None for t, needed in zip(found[3:], ctx.needs))


def _attention() -> Any:
    return (Attention if torch.compiler.is_compiling() else AttentionWithForwardMode).apply


def _attention_backward() -> Any:
    return (AttentionBackward if torch.compiler.is_compiling() else AttentionBackwardWithForwardMode).apply


def _fold(
    samples: int, in_dims: tuple[Any, ...], tensors: tuple[Any, ...], *, broadcasting: tuple[int, ...] = ()
) -> list[Tensor | None]:
    """Fold vmap's dimension of every tensor into the batch, the first tensor's. Those at the indices ``broadcasting``
    stay as they are where neither vmap nor the batch tells their entries apart."""
    batch = tensors[0].shape[0] if in_dims[0] is None else tensors[0].select(in_dims[0], 0).shape[0]
    folded: list[Tensor | None] = []
    for index, (tensor, dim) in enumerate(zip(tensors, in_dims)):
        if tensor is None or (dim is None and index in broadcasting and tensor.shape[0] == 1):
            folded.append(tensor)
        else:
            tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
            folded.append(tensor.expand(samples, batch, *tensor.shape[2:]).flatten(0, 1))
    return folded


def _unfolded(samples: int, tensors: tuple[Tensor, ...], out_dims: tuple[int | None, ...]) -> tuple[Tensor, ...]:
    """Undo :func:`_fold` on results. Those without a dimension for vmap are empty placeholders."""
    return tuple(
        t if dim is None else t.view(samples, t.shape[0] // samples, *t.shape[1:]) for t, dim in zip(tensors, out_dims)
    )


def apply(
    call: AttentionCall, dropout_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` of a call, through the operators."""
    inputs, options = operands(call, dropout_state, backend)
    output, lse, weights, _ = _attention()(*inputs, *options)
    return output, None if call.weights == "none" else weights, lse if call.return_lse else None


def operands(call: AttentionCall, dropout_state: Tensor | None, backend: str) -> tuple[Inputs, Options]:
    """A call in the form that the operators take."""
    inputs = Inputs(
        call.query,
        call.key,
        call.value,
        call.bias,
        call.alibi_slopes,
        call.sinks,
        call.mask,
        call.key_padding_mask,
        call.query_documents,
        call.key_documents,
        call.prefix,
        dropout_state,
    )
    options = Options(
        call.lower,
        call.upper,
        call.shift,
        call.softcap,
        call.scale,
        call.dropout_p,
        call.weights,
        backend,
        call.return_lse or torch.is_grad_enabled(),
    )
    return inputs, options
