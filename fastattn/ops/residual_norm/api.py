"""The public functions: layer norm and RMS norm, alone or fused with the residual add in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastattn.ops.common import backends
from fastattn.ops.common.sharded import are_sharded, on_local
from fastattn.ops.common.short_way import ShortWay, in_shape, lies_with_kernels
from fastattn.ops.common.tracing import is_symbolically_traced, recorded
from fastattn.ops.residual_norm import direct, on_torch, on_triton
from fastattn.ops.residual_norm.call import make_call
from fastattn.ops.residual_norm.contract import Arguments
from fastattn.ops.residual_norm.layout import in_channels_last
from fastattn.reference.residual_norm import Kind


def _short() -> ModuleType:
    from fastattn.ops.residual_norm import short  # imports triton

    return short


_SHORT = ShortWay(_short, Arguments)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    normalized_shape: int | Sequence[int] | None,
    kind: Kind,
    eps: float | None,
    unit_offset: bool,
    dropout_p: float,
    round_residual: bool,
    out_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    return_residual: bool,
    backend: backends.Backend | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What a public function returns for its :class:`Arguments`, on the backend that is chosen."""
    if are_sharded(x, residual):
        return _norm_on_local(
            x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias, row_scale=row_scale,
            normalized_shape=normalized_shape, kind=kind, eps=eps, unit_offset=unit_offset, dropout_p=dropout_p,
            round_residual=round_residual, out_dtype=out_dtype, residual_dtype=residual_dtype,
            return_residual=return_residual, backend=backend,
        )  # fmt: skip
    signature = None
    if lies_with_kernels(x):
        values = x, residual, weight, bias, x_bias, row_scale, normalized_shape
        words = kind, eps, unit_offset, dropout_p, round_residual, out_dtype, residual_dtype, return_residual, backend
        signature = _SHORT.key(values, words)
        if signature is not None and not _may_be_short(x, residual, round_residual, return_residual):
            signature = None
        if signature is not None and (entry := _SHORT.find(signature, values + words)) is not None:
            return entry(values)
    call = make_call(
        x, residual, weight, bias, kind=kind, eps=eps, normalized_shape=normalized_shape, x_bias=x_bias,
        row_scale=row_scale, unit_offset=unit_offset, dropout_p=dropout_p, round_residual=round_residual,
        out_dtype=out_dtype, residual_dtype=residual_dtype, return_residual=return_residual,
    )  # fmt: skip
    chosen = backends.choose(call, backend, on_triton.refusals)
    output, total = on_triton.run(call) if chosen == "triton" else on_torch.run(call)
    if signature is not None and chosen == "triton":
        _SHORT.remember(signature)
    shape = x.shape if residual is None else _sum_shape(x, residual)
    output = in_shape(output, shape)
    if kind == "rms":
        output = in_channels_last(output, x, residual)
    return (output, in_shape(total, shape)) if call.return_residual else output


def _norm_on_local(**words: Any) -> Any:
    """:func:`_norm` of DTensors: every leading axis may be cut."""
    given = words["normalized_shape"]
    last = len(given) if isinstance(given, Sequence) else 1
    dims = max(t.dim() for t in (words["x"], words["residual"]) if t is not None)
    leading = tuple(f"axis {number}" for number in range(dims - last))
    vector = (None,) * last
    axes = {"x": (*leading, *vector), "residual": (*leading, *vector), "row_scale": leading}
    axes |= dict.fromkeys(("weight", "bias", "x_bias"), vector)
    returns_pair = bool(words["return_residual"])

    def function(**own: Any) -> Any:
        found = _norm(**own)
        return found if returns_pair else (found,)

    found = on_local(function, axes, words, [axes["x"]] * 2, None, words["dropout_p"])
    return found if returns_pair else found[0]


# Unit offset, dropout, rounding, two dtypes and what is returned, of a norm alone.
_DEFAULTS = (False, 0.0, True, None, None, False)


def _alone(*arguments: Any) -> Tensor:
    output = _norm(*arguments)
    assert isinstance(output, Tensor)
    return output


def _may_be_short(x: Tensor, residual: Tensor | None, round_residual: bool, return_residual: bool) -> bool:
    """Whether a call that has a signature may take the short way: nothing is broadcast to ``x`` but a row scale, the
    sum is kept as it is returned, and ``x`` itself is not returned as the sum."""
    if round_residual is not True:
        return False
    if residual is None:
        return not return_residual
    return isinstance(residual, Tensor) and x.shape == residual.shape


def _sum_shape(x: Tensor, residual: Tensor) -> torch.Size:
    return x.shape if residual.shape == x.shape else torch.broadcast_shapes(x.shape, residual.shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_offset: bool = False,
    dropout_p: float = 0.0,
    round_residual: bool = True,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    return_residual: bool = False,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(r)`` of ``r = residual + dropout(x + x_bias) * row_scale`` in one pass (arXiv:1607.06450).

    Post-norm layers keep the norm, pre-norm layers ``r`` as well (``return_residual``). Everything is computed in
    float32 (float64 for float64), and rounded once where it leaves. Every argument combines with every other; all
    but the flags have gradients, of every order. The backward is bitwise deterministic.

    Args:
        x: ``[..., N]``, float16, bfloat16, float32 or float64; any strides, read as it lies unless its rows need more
            than three of them.
        residual: ``[..., N]``, of any of these dtypes; default none. The shapes broadcast, but no vector does.
        weight: ``[N]``, of any dtype: multiplies what was normalised.
        bias: ``[N]``: added behind ``weight``.
        eps: added to the variance.
        normalized_shape: the sizes of the last axes where more than one of them is to be normalised (``N`` is their
            product, and vectors have this shape); default the last axis.
        x_bias: ``[N]``: added to ``x``; the bias of the linear layer in front.
        row_scale: broadcastable to ``[...]``: multiplies rows of ``x``; stochastic depth (arXiv:1603.09382).
        unit_offset: multiply by ``1 + weight``.
        dropout_p: probability of dropping an element of ``x + x_bias``. Applied whenever it is not 0: pass 0 in
            evaluation.
        round_residual: normalise ``r`` rounded to its dtype, so that the norm is that of the ``r`` returned; else as it
            was summed.
        out_dtype: of the norm; default ``x.dtype`` (under autocast on a GPU float32, as in torch).
        residual_dtype: of ``r``; default what ``x`` and ``residual`` promote to.
        return_residual: also return ``r``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; default what :func:`fastattn.use_backend` or the environment
            variable ``FASTATTN_BACKEND`` says.

    Returns:
        The norm ``[..., N]``, or the pair of it and ``r``, which is ``x`` itself, or a view of it, where nothing is
        added.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit; the message shows them.
        NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
    """
    if (
        type(x) is Tensor
        and x.is_cpu
        and x_bias is row_scale is out_dtype is residual_dtype is None
        and unit_offset is False
        and round_residual is True
        and type(dropout_p) is float
        and dropout_p == 0.0
        and (results := direct.layer_norm(x, residual, weight, bias, normalized_shape, eps, return_residual, backend))
        is not None
    ):
        return results
    tensors = (x, residual, weight, bias)
    if has_torch_function_variadic(*tensors) and is_symbolically_traced(*tensors):
        return recorded(
            add_layer_norm, *tensors, eps, normalized_shape=normalized_shape, x_bias=x_bias, row_scale=row_scale,
            unit_offset=unit_offset, dropout_p=dropout_p, round_residual=round_residual, out_dtype=out_dtype,
            residual_dtype=residual_dtype, return_residual=return_residual, backend=backend,
        )  # fmt: skip
    return _norm(
        x,
        residual,
        weight,
        bias,
        x_bias,
        row_scale,
        normalized_shape,
        "layer",
        eps,
        unit_offset,
        dropout_p,
        round_residual,
        out_dtype,
        residual_dtype,
        return_residual,
        backend,
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_offset: bool = False,
    dropout_p: float = 0.0,
    round_residual: bool = True,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    return_residual: bool = False,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm(r)`` of ``r = residual + dropout(x + x_bias) * row_scale`` in one pass (arXiv:1910.07467).

    As :func:`add_layer_norm`, without the mean.

    Args:
        x: as for :func:`add_layer_norm`, and so are all the others but ``eps``.
        residual: as for :func:`add_layer_norm`.
        weight: as for :func:`add_layer_norm`.
        bias: as for :func:`add_layer_norm`.
        eps: added to the mean square; default, as in ``F.rms_norm``, that of float32 (float64 for float64).
        normalized_shape: as for :func:`add_layer_norm`.
        x_bias: as for :func:`add_layer_norm`.
        row_scale: as for :func:`add_layer_norm`.
        unit_offset: as for :func:`add_layer_norm`.
        dropout_p: as for :func:`add_layer_norm`.
        round_residual: as for :func:`add_layer_norm`.
        out_dtype: as for :func:`add_layer_norm`.
        residual_dtype: as for :func:`add_layer_norm`.
        return_residual: as for :func:`add_layer_norm`.
        backend: as for :func:`add_layer_norm`.

    Returns:
        As :func:`add_layer_norm`.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`add_layer_norm`.
    """
    if (
        type(x) is Tensor
        and x.is_cpu
        and bias is x_bias is row_scale is out_dtype is residual_dtype is None
        and unit_offset is False
        and round_residual is True
        and type(dropout_p) is float
        and dropout_p == 0.0
        and (results := direct.rms_norm(x, residual, weight, normalized_shape, eps, return_residual, backend))
        is not None
    ):
        return results
    tensors = (x, residual, weight, bias)
    if has_torch_function_variadic(*tensors) and is_symbolically_traced(*tensors):
        return recorded(
            add_rms_norm, *tensors, eps, normalized_shape=normalized_shape, x_bias=x_bias, row_scale=row_scale,
            unit_offset=unit_offset, dropout_p=dropout_p, round_residual=round_residual, out_dtype=out_dtype,
            residual_dtype=residual_dtype, return_residual=return_residual, backend=backend,
        )  # fmt: skip
    return _norm(
        x,
        residual,
        weight,
        bias,
        x_bias,
        row_scale,
        normalized_shape,
        "rms",
        eps,
        unit_offset,
        dropout_p,
        round_residual,
        out_dtype,
        residual_dtype,
        return_residual,
        backend,
    )


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: backends.Backend | None = None,
) -> Tensor:
    """``torch.nn.functional.layer_norm``, argument for argument, on this package's backends (arXiv:1607.06450).

    Args:
        input: ``[..., *normalized_shape]``, float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the sizes of the last axes, which are normalised together.
        weight: ``normalized_shape``, of any dtype.
        bias: ``normalized_shape``, of any dtype.
        eps: added to the variance.
        backend: as for :func:`add_layer_norm`.

    Returns:
        A tensor like ``input``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`add_layer_norm`.
    """
    if type(input) is Tensor and input.is_cpu:
        output = direct.layer_norm(input, None, weight, bias, normalized_shape, eps, False, backend)
        if isinstance(output, Tensor):
            return output
    if has_torch_function_variadic(input, weight, bias) and is_symbolically_traced(input, weight, bias):
        return recorded(layer_norm, input, normalized_shape, weight, bias, eps, backend=backend)
    return _alone(input, None, weight, bias, None, None, normalized_shape, "layer", eps, *_DEFAULTS, backend)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: backends.Backend | None = None,
) -> Tensor:
    """``torch.nn.functional.rms_norm``, argument for argument, on this package's backends (arXiv:1910.07467).

    Args:
        input: ``[..., *normalized_shape]``, float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the sizes of the last axes, which are normalised together.
        weight: ``normalized_shape``, of any dtype.
        eps: added to the mean square; default that of float32 (float64 for float64).
        backend: as for :func:`add_layer_norm`.

    Returns:
        A tensor like ``input``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`add_layer_norm`.
    """
    if type(input) is Tensor and input.is_cpu:
        output = direct.rms_norm(input, None, weight, normalized_shape, eps, False, backend)
        if isinstance(output, Tensor):
            return output
    if has_torch_function_variadic(input, weight) and is_symbolically_traced(input, weight):
        return recorded(rms_norm, input, normalized_shape, weight, eps, backend=backend)
    return _alone(input, None, weight, None, None, None, normalized_shape, "rms", eps, *_DEFAULTS, backend)
