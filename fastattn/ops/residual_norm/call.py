"""One residual add with its norm, checked and put into the form that every backend understands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.common.checks import DTYPES, check_dense, check_flags, shape_of
from fastattn.ops.residual_norm.contract import ResidualNormCall
from fastattn.reference.residual_norm import Kind


def check_tensor(name: str, tensor: object, x: Tensor, *, takes_complex: bool = False) -> None:
    """Raise unless ``tensor`` is a floating tensor on the device of ``x``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES and not (takes_complex and tensor.is_complex()):
        raise TypeError(f"{name} is {tensor.dtype}: expected float16, bfloat16, float32 or float64")
    if tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(name, tensor)
    if tensor is not x and tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}: expected one device")


def check_normalized_shape(normalized_shape: int | Sequence[int] | None, x: Tensor) -> tuple[int, ...]:
    """The sizes of the axes to normalise, or raise unless they are the last ones of ``x``."""
    if x.dim() == 0:
        raise ValueError("x has no dimensions: expected [..., N]")
    if normalized_shape is None:
        return (x.shape[-1],)
    sizes = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if not all(isinstance(size, (int, torch.SymInt)) or hasattr(size, "__index__") for size in sizes):
        raise TypeError(f"normalized_shape={normalized_shape!r}: expected an int or a sequence of them")
    if not sizes:
        raise ValueError("normalized_shape=(): expected at least one size")
    if shape_of(x)[-len(sizes) :] != sizes:
        raise ValueError(f"normalized_shape={sizes}: expected the last sizes of x, whose shape is {shape_of(x)}")
    return sizes


def _check_dtype(name: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is None:
        return default
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or None, got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"{name}={dtype}: expected float16, bfloat16, float32 or float64")
    return dtype


def _number(name: str, value: Any) -> float:
    """What torch takes for a number beside numbers: a tensor or an array of one."""
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={value!r}: expected a number") from error


def _output_dtype(x: Tensor) -> torch.dtype:
    """The norm's own: that of ``x``; under autocast on a GPU float32, as torch's norms have it."""
    if x.device.type in ("cuda", "xpu") and torch.is_autocast_enabled(x.device.type):
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


def make_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: Kind,
    eps: float | None,
    normalized_shape: int | Sequence[int] | None = None,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_offset: bool = False,
    dropout_p: float = 0.0,
    round_residual: bool = True,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    return_residual: bool = False,
) -> ResidualNormCall:
    """Check the arguments of the public functions and make a :class:`ResidualNormCall` of them."""
    check_tensor("x", x, x, takes_complex=kind == "rms")  # as torch does
    takes_complex = x.is_complex()
    if residual is not None:
        check_tensor("residual", residual, x, takes_complex=takes_complex)
        if residual.shape != x.shape:
            message = f"x has shape {shape_of(x)}, residual {shape_of(residual)}: expected shapes that broadcast"
            if residual.dim() == 1:  # what F.layer_norm has in this place, a weight, would broadcast too
                raise ValueError(f"{message}, and no vector (weight and bias come behind the residual)")
            try:
                x, residual = torch.broadcast_tensors(x, residual)
            except RuntimeError as error:
                raise ValueError(message) from error
    sizes = check_normalized_shape(normalized_shape, x)
    axes = len(sizes)
    rows = shape_of(x)[: x.dim() - axes]
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if vector is not None:
            check_tensor(name, vector, x, takes_complex=takes_complex)
            if shape_of(vector) != sizes:
                raise ValueError(f"{name} has shape {shape_of(vector)}: expected the normalised sizes {sizes}")
    if row_scale is not None:
        check_tensor("row_scale", row_scale, x)
        if shape_of(row_scale) != rows:
            try:
                row_scale = row_scale.expand(rows)
            except RuntimeError as error:
                message = f"row_scale has shape {shape_of(row_scale)}: expected one that broadcasts to the rows {rows}"
                raise ValueError(message) from error
    if axes > 1:
        x = x.flatten(-axes)
        if residual is not None:
            residual = residual.flatten(-axes)
            if torch.is_grad_enabled() and x.requires_grad and residual.requires_grad:
                # The two have one gradient, and behind two views it would become the ``grad`` of two leaves in one
                # memory, so that a second backward would add to both through each. Behind this it is copied.
                residual = residual.neg().neg()
        weight, bias, x_bias = (None if t is None else t.flatten() for t in (weight, bias, x_bias))
    if not isinstance(dropout_p, (int, float)) or isinstance(dropout_p, bool):
        dropout_p = _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p!r}: expected a number from 0 to 1")
    check_flags(unit_offset=unit_offset, round_residual=round_residual, return_residual=return_residual)
    of_sum = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    residual_dtype = _check_dtype("residual_dtype", residual_dtype, of_sum)
    if eps is None and kind == "rms":  # torch's default for RMS norms: that of the dtype it computes in
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    elif not isinstance(eps, (int, float)) or isinstance(eps, bool):
        eps = _number("eps", eps)
    return ResidualNormCall(
        x,
        residual,
        weight,
        bias,
        x_bias,
        row_scale,
        kind,
        float(eps),
        unit_offset and weight is not None,
        float(dropout_p),
        round_residual,
        _check_dtype("out_dtype", out_dtype, _output_dtype(x)),
        residual_dtype,
        return_residual,
    )
