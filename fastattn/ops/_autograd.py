"""The opaque operators ``fastattn::attention_forward`` and ``attention_backward``, and their autograd rules.

The operators are opaque to torch.compile and export. The two Functions above them decide what differentiation means:
the first calls the second in its backward, and the second, like both forward-mode rules, falls back on the reference's
formula (exact, but it makes the L x S intermediates). A raw kernel launch in a backward would lose second-order terms
silently; an operator with ``register_autograd`` alone would give silent zero tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops._call import AttentionCall
from fastattn.reference import attention as reference

_DEVICES = ("cpu", "cuda", "xpu")
_OPTIONS = "SymInt? diagonal, float scale, float dropout_p, str weights, str backend, bool keeps_statistics"
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? key_padding_mask, "
    "Tensor? dropout_state"
)

torch.library.define("fastattn::attention_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "fastattn::attention_backward",
    "(Tensor d_output, Tensor? d_lse, Tensor? d_weights, Tensor output, Tensor statistics, bool needs_d_bias, "
    f"{_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from fastattn.ops import _triton_launch

        return _triton_launch
    from fastattn.ops import _torch_blocks

    return _torch_blocks


class Options(NamedTuple):
    """What a call says beside its tensors."""

    diagonal: int | None
    scale: float
    dropout_p: float
    weights: str
    backend: str
    keeps_statistics: bool = True  # False lets a backend leave out LSE and statistics (they are then NaN)


class Inputs(NamedTuple):
    """A call's tensors. ``dropout_state`` is the backend's own: a seed for the kernels, the kept weights for torch."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    key_padding_mask: Tensor | None
    dropout_state: Tensor | None


def empty_in_order_of(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty dense tensor whose dimensions lie in memory in the order of ``like``'s.

    So that the output of attention over a ``[B, L, H, D]`` view merges its heads without a copy, and the one over a
    ``[B, C, H * W]`` feature map is such a map again.
    """
    order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))
    return torch.empty_permuted(shape, order, dtype=dtype or like.dtype, device=like.device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics are float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_shape(query: Tensor, backend: str) -> tuple[int, ...]:
    """The shape of the statistics from which a backend's backward recomputes the weights: the kernels' maximum and
    inverse sum of every row, or torch's LSE."""
    batch, heads, length = query.shape[:3]
    return (batch, heads, 2, length) if backend == "triton" else (batch, heads, length)


def weights_shape(query: Tensor, key: Tensor, weights: str) -> tuple[int, ...]:
    """The shape of the weights that an operator returns; empty where none are asked for."""
    batch, heads, length = query.shape[:3]
    shapes = {"none": (0,), "average": (batch, length, key.shape[2]), "heads": (batch, heads, length, key.shape[2])}
    return shapes[weights]


# ------------------------------------------------------------------------------------------------------ operators


@torch.library.impl("fastattn::attention_forward", _DEVICES)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options = Inputs(*args[:7]), Options(*args[7:])
    return _implementation(options.backend).forward(inputs, options)


@torch.library.register_fake("fastattn::attention_forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options = Inputs(*args[:7]), Options(*args[7:])
    query, key, value = inputs.query, inputs.key, inputs.value
    output = empty_in_order_of(query, (*query.shape[:3], value.shape[3]))
    dtype = statistics_dtype(query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    statistics = query.new_empty(statistics_shape(query, options.backend), dtype=dtype)
    return output, lse, query.new_empty(weights_shape(query, key, options.weights)), statistics


@torch.library.impl("fastattn::attention_backward", _DEVICES)
def _backward(d_output: Tensor, d_lse: Tensor | None, d_weights: Tensor | None, output: Tensor, statistics: Tensor,
              needs_d_bias: bool, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs, options = Inputs(*args[:7]), Options(*args[7:])
    gradients = (d_output, d_lse, d_weights)
    return _implementation(options.backend).backward(gradients, output, statistics, needs_d_bias, inputs, options)


@torch.library.register_fake("fastattn::attention_backward")
def _backward_fake(d_output: Tensor, d_lse: Tensor | None, d_weights: Tensor | None, output: Tensor, statistics: Tensor,
                   needs_d_bias: bool, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(*args[:7])
    d_qkv = [empty_in_order_of(t, tuple(t.shape)) for t in inputs[:3]]
    bias = inputs.bias
    d_bias = bias.new_empty(bias.shape) if needs_d_bias and bias is not None else d_output.new_empty(0)
    return d_qkv[0], d_qkv[1], d_qkv[2], d_bias


# ---------------------------------------------------------------------------- the formula, for second and forward mode


def _vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    values, pullback = torch.func.vjp(function, *primals)[:2]
    return values, pullback


def _formula(inputs: Inputs, options: Options, *differentiable: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What ``attention_forward`` computes, as a differentiable expression of query, key, value and bias."""
    query, key, value, bias = differentiable
    assert query is not None and key is not None and value is not None
    compute = torch.promote_types(query.dtype, torch.float32)
    keep = None
    if inputs.dropout_state is not None:
        keep = _implementation(options.backend).dropout_keep(inputs, options)
    result = reference(
        query.to(compute),
        key.to(compute),
        value.to(compute),
        bias=bias,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        diagonal=options.diagonal,
        scale=options.scale,
        dropout_keep=keep,
        dropout_p=options.dropout_p,
    )
    weights = {
        "none": lambda: query.new_empty(0),
        "average": lambda: result.weights.mean(dim=1).to(query.dtype),
        "heads": lambda: result.weights.to(query.dtype),
    }[options.weights]()
    return result.output.to(query.dtype), result.lse, weights


def _formula_backward(inputs: Inputs, options: Options, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    """What ``attention_backward`` computes, as a differentiable expression of the gradients and the inputs."""
    gradients, differentiable = arguments[:3], arguments[3:]
    present = [t is not None for t in differentiable]

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        remaining = iter(tensors)
        return _formula(inputs, options, *(next(remaining) if p else None for p in present))

    values, pullback = _vjp(outputs, *(t for t in differentiable if t is not None))
    return pullback(tuple(torch.zeros_like(v) if g is None else g.to(v.dtype) for g, v in zip(gradients, values)))


def _with_tangents(function, inputs, options, primals, tangents):  # type: ignore[no-untyped-def]
    """The forward-mode derivative of ``function``, where arguments and tangents may be None.

    A vjp of the vjp, which is linear in its cotangent: forward mode itself cannot be nested inside a Function's jvp.
    """
    present = [t is not None for t in primals]

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        return function(inputs, options, *(next(remaining) if p else None for p in present))

    given = [(p, torch.zeros_like(p) if t is None else t) for p, t in zip(primals, tangents) if p is not None]
    values, pullback = _vjp(of_tensors, *(p for p, _ in given))
    _, pushforward = _vjp(pullback, tuple(torch.zeros_like(v) for v in values))
    return pushforward(tuple(t for _, t in given))[0]


# -------------------------------------------------------------------------------------------------------- functions


class Attention(torch.autograd.Function):
    """``(output, lse, weights, statistics)`` of one call; ``weights`` is empty where none are asked for."""

    @staticmethod  # spelled out because torch.compile counts the parameters
    def forward(query, key, value, bias, mask, key_padding_mask, dropout_state,  # type: ignore[no-untyped-def]
                diagonal, scale, dropout_p, weights, backend, keeps_statistics):  # fmt: skip
        return torch.ops.fastattn.attention_forward(
            query, key, value, bias, mask, key_padding_mask, dropout_state,
            diagonal, scale, dropout_p, weights, backend, keeps_statistics,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = Options(*inputs[7:])
        ctx.save_for_backward(*inputs[:7], output[0], output[3])
        ctx.mark_non_differentiable(*output[2:] if ctx.options.weights == "none" else output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_output, d_lse, d_weights, _ = grads
        *tensors, output, statistics = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(output)
        if ctx.options.weights == "none":
            d_weights = None
        needs_d_bias = tensors[3] is not None and ctx.needs_input_grad[3]
        d_query, d_key, d_value, d_bias = _attention_backward()(
            d_output, d_lse, d_weights, output, statistics, needs_d_bias, *tensors, *ctx.options
        )
        return d_query, d_key, d_value, d_bias if needs_d_bias else None, *(None,) * 9

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        options = Options(*args[7:])
        out_dims = (0, 0, None if options.weights == "none" else 0, 0)
        if args[6] is not None:  # each sample draws its own dropout, or all of them the same: no folding
            return _looped(_attention(), info, in_dims, args, out_dims)
        folded = _fold(info.batch_size, in_dims[:7], args[:7], broadcasting=(3, 4))
        return _unfolded(info.batch_size, _attention()(*folded, *options), out_dims), out_dims


class AttentionBackward(torch.autograd.Function):
    """The gradients of :class:`Attention`; its own gradients come from the formula."""

    @staticmethod
    def forward(d_output, d_lse, d_weights, output, statistics, needs_d_bias,  # type: ignore[no-untyped-def]
                query, key, value, bias, mask, key_padding_mask, dropout_state,
                diagonal, scale, dropout_p, weights, backend, keeps_statistics):  # fmt: skip
        return torch.ops.fastattn.attention_backward(
            d_output, d_lse, d_weights, output, statistics, needs_d_bias,
            query, key, value, bias, mask, key_padding_mask, dropout_state,
            diagonal, scale, dropout_p, weights, backend, keeps_statistics,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs_d_bias, ctx.options = inputs[5], Options(*inputs[13:])
        ctx.save_for_backward(*inputs[:3], *inputs[6:13])
        if not ctx.needs_d_bias:
            ctx.mark_non_differentiable(output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, inputs = ctx.saved_tensors[:3], Inputs(*ctx.saved_tensors[3:])
        primals = (*gradients, *inputs[:4])
        present = [t is not None for t in primals]
        outputs = 4 if ctx.needs_d_bias else 3

        def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(tensors)
            return _formula_backward(inputs, ctx.options, *(next(remaining) if p else None for p in present))[:outputs]

        _, pullback = _vjp(first_order, *(t for t in primals if t is not None))
        pulled = iter(pullback(grads[:outputs]))
        by_primal = [next(pulled) if p else None for p in present]
        # Output and LSE get none: the formula already differentiates them through query, key and value.
        return *by_primal[:3], None, None, None, *by_primal[3:], *(None,) * 9

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        needs_d_bias = args[5]
        out_dims = (0, 0, 0, 0 if needs_d_bias else None)
        if args[12] is not None:
            return _looped(_attention_backward(), info, in_dims, args, out_dims)
        gradients = _fold(info.batch_size, in_dims[:5], args[:5])
        # a bias that needs its gradient has one a sample
        inputs = _fold(info.batch_size, in_dims[6:13], args[6:13], broadcasting=(4,) if needs_d_bias else (3, 4))
        folded = _attention_backward()(*gradients, needs_d_bias, *inputs, *args[13:])
        *d_qkv, d_bias = _unfolded(info.batch_size, folded, out_dims)
        if needs_d_bias:
            bias = args[9] if in_dims[9] is None else args[9].select(in_dims[9], 0)
            d_bias = d_bias.sum_to_size(info.batch_size, *bias.shape)
        return (*d_qkv, d_bias), out_dims


class AttentionWithForwardMode(Attention):
    """:class:`Attention` for eager mode: torch.compile cannot trace a Function that has a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Attention.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        inputs = Inputs(*ctx.saved_tensors[:7])
        output, lse, weights = _with_tangents(_formula, inputs, ctx.options, inputs[:4], tangents[:4])
        return output, lse, None if ctx.options.weights == "none" else weights, None


class AttentionBackwardWithForwardMode(AttentionBackward):
    """:class:`AttentionBackward` for eager mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        AttentionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], *inputs[6:13])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        gradients, inputs = ctx.saved_tensors[:3], Inputs(*ctx.saved_tensors[3:])
        primals, with_tangents = (*gradients, *inputs[:4]), (*tangents[:3], *tangents[6:10])
        result = _with_tangents(_formula_backward, inputs, ctx.options, primals, with_tangents)
        return result[:4] if ctx.needs_d_bias else (*result[:3], None)


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


def _looped(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], out_dims: Any) -> Any:
    """One call a sample, stacked."""
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)
    ]
    columns = zip(zip(*results), out_dims)
    return tuple(column[0] if dim is None else torch.stack(column) for column, dim in columns), out_dims


def apply(
    call: AttentionCall, dropout_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` of a call, through the operators."""
    output, lse, weights, _ = _attention()(
        call.query,
        call.key,
        call.value,
        call.bias,
        call.mask,
        call.key_padding_mask,
        dropout_state,
        call.diagonal,
        call.scale,
        call.dropout_p,
        call.weights,
        backend,
        call.return_lse or torch.is_grad_enabled(),
    )
    return output, None if call.weights == "none" else weights, lse if call.return_lse else None
