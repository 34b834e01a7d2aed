"""The short way of a norm on the CPU: straight to torch's norm where that takes the call as it is.

The long way checks every argument one by one, which takes several times longer than torch's kernel on a few rows. Here
a look at the call tells whether it is of the kind that most calls are: tensors of torch's own class and of one dtype, a
norm over the last axis, at most a residual in front. torch checks the rest, and raises for what it does not take. Any
doubt leaves the call to the long way, which also has the words for what is wrong with it.

The arguments are as the user gave them, but that ``x`` is a tensor of torch's own class on the CPU: the caller looks
for that, which is all that a call on another device has to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn.ops.common import backends
from fastattn.ops.common.short_way import is_looked_at
from fastattn.ops.residual_norm.torch_layer_norm import (
    HALF,
    eager_half_layer_norm,
    eager_layer_norm,
)
from fastattn.ops.residual_norm.torch_rms_norm import eager_add_rms_norm, eager_rms_norm

_PLAIN = (Tensor, Parameter)
_PLAIN_OR_NONE = (*_PLAIN, type(None))


Norm = Tensor | tuple[Tensor, Tensor]


def layer_norm(
    x: Tensor, residual: Any, weight: Any, bias: Any, normalized_shape: Any, eps: Any, returns_sum: Any, backend: Any
) -> Norm | None:
    """What a layer norm returns that has no other arguments than these; None where it has to take the long way."""
    if (
        type(weight) not in _PLAIN_OR_NONE
        or type(bias) not in _PLAIN_OR_NONE
        or type(eps) is not float
        or type(returns_sum) is not bool
        or is_looked_at()
        or not backends.is_torch_on_cpu(backend)
        or x.is_nested
        or (size := _last(x, normalized_shape)) is None
    ):
        return None
    dtype = x.dtype
    try:
        if residual is not None:
            if not _is_alike(residual, x):
                return None
            x = residual + x
        if dtype in HALF:
            if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
                return None
            output = eager_half_layer_norm(x, size, weight, bias, eps)
        else:
            output = eager_layer_norm(x, size, weight, bias, eps)
    except (RuntimeError, TypeError):
        return None
    return (output, x) if returns_sum else output


def rms_norm(
    x: Tensor, residual: Any, weight: Any, normalized_shape: Any, eps: Any, returns_sum: Any, backend: Any
) -> Norm | None:
    """What an RMS norm returns that has no other arguments than these; None where it has to take the long way."""
    if (
        type(weight) not in _PLAIN_OR_NONE
        or (eps is not None and type(eps) is not float)
        or type(returns_sum) is not bool
        or is_looked_at()
        or not backends.is_torch_on_cpu(backend)
        or x.is_nested
        or (weight is not None and weight.dtype is not x.dtype)
        or (size := _last(x, normalized_shape)) is None
        or not x.is_contiguous()  # else the result may be in a channels-last format
    ):
        return None
    try:
        if residual is not None and not (_is_alike(residual, x) and residual.is_contiguous()):
            return None
        if not returns_sum:
            return eager_rms_norm(x, residual, size, weight, eps)
        return eager_add_rms_norm(x, residual, size, weight, eps)
    except (RuntimeError, TypeError):
        return None


def _last(x: Tensor, normalized_shape: Any) -> Sequence[int] | None:
    """What is normalised, if that is the last axis, which torch checks, and has more than one element."""
    kind = type(normalized_shape)
    if kind is tuple or kind is torch.Size:
        return normalized_shape if len(normalized_shape) == 1 and normalized_shape[0] != 1 else None
    if normalized_shape is None:
        return size if (size := x.shape[-1:]) and size[0] != 1 else None
    return (normalized_shape,) if kind is int and normalized_shape != 1 else None


def _is_alike(residual: Any, x: Tensor) -> bool:
    """Is this a tensor of torch's own class that adds to ``x`` as it is?"""
    return (
        type(residual) in _PLAIN
        and residual.is_cpu
        and residual.dtype is x.dtype
        and residual.layout is torch.strided
        and residual.shape == x.shape
    )
