"""A residual add with its norm, and what the operators take and return."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.reference.residual_norm import Kind


class Arguments(NamedTuple):
    """The arguments of the public functions, as the user gave them: first those that may be tensors, or a tuple."""

    x: Any
    residual: Any
    weight: Any
    bias: Any
    x_bias: Any
    row_scale: Any
    normalized_shape: Any
    kind: Any
    eps: Any
    unit_offset: Any
    dropout_p: Any
    round_residual: Any
    out_dtype: Any
    residual_dtype: Any
    return_residual: Any
    backend: Any


class ResidualNormCall(NamedTuple):
    """A validated call; the words are the reference's. The axes that are normalised are one, the last."""

    x: Tensor  # [..., N]
    residual: Tensor | None  # [..., N]
    weight: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    x_bias: Tensor | None  # [N]
    row_scale: Tensor | None  # [...]
    kind: Kind
    eps: float
    unit_offset: bool
    dropout_p: float
    round_residual: bool
    out_dtype: torch.dtype
    residual_dtype: torch.dtype
    return_residual: bool

    @property
    def device(self) -> torch.device:
        """Where the call's tensors lie."""
        return self.x.device

    @property
    def is_plain(self) -> bool:
        """Is it a norm alone, of ``x`` as it is?"""
        alone = self.residual is None and self.x_bias is None and self.row_scale is None
        return alone and self.dropout_p == 0.0 and self.residual_dtype == self.x.dtype


# ----------------------------------------------------------------------------------- the operators' groups of arguments


class Inputs(NamedTuple):
    """A call's tensors. All have gradients but ``dropout_state``, which is a seed and an offset."""

    x: Tensor  # [..., N]
    residual: Tensor | None  # [..., N]
    weight: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    x_bias: Tensor | None  # [N]
    row_scale: Tensor | None  # [...]
    dropout_state: Tensor | None  # int64 [2]


class Options(NamedTuple):
    """What a call says beside its tensors."""

    kind: str
    eps: float
    unit_offset: bool
    dropout_p: float
    out_dtype: torch.dtype
    residual_dtype: torch.dtype
    returns_residual: bool
    keeps: bool  # False: statistics, and a sum that is not returned, need not be stored


class Results(NamedTuple):
    """What the forward makes; what is not stored is empty."""

    output: Tensor  # [..., N]
    total: Tensor  # [..., N], the sum r; empty where it is x itself
    statistics: Tensor  # float32 [1 or 3, rows]: inverse deviations, and a layer norm's means in two parts


class OutputGradients(NamedTuple):
    """The gradients of the norm and of the sum."""

    d_output: Tensor
    d_total: Tensor | None


class Kept(NamedTuple):
    """What the backward reads beside gradients. With the sum at hand, ``x`` and the residual need not be kept."""

    total: Tensor  # [..., N], the sum r
    statistics: Tensor  # float32 [1 or 3, rows]
    x: Tensor | None  # only where the row scale needs its gradient
    weight: Tensor | None
    x_bias: Tensor | None
    row_scale: Tensor | None
    dropout_state: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted, and the dtypes of those whose tensors are not kept."""

    needs_d_x: bool
    needs_d_residual: bool
    needs_d_weight: bool
    needs_d_bias: bool
    needs_d_x_bias: bool
    needs_d_row_scale: bool
    x_dtype: torch.dtype
    vectors_dtype: torch.dtype


class InputGradients(NamedTuple):
    """What the backward makes; what is not wanted is empty, and the residual's gradient also where it is that of x."""

    d_x: Tensor
    d_residual: Tensor
    d_weight: Tensor
    d_bias: Tensor
    d_x_bias: Tensor
    d_row_scale: Tensor


def is_plain(inputs: Inputs, options: Options) -> bool:
    """Is the sum ``x`` itself? Then it is not stored again."""
    added = (inputs.residual, inputs.x_bias, inputs.row_scale, inputs.dropout_state)
    return all(t is None for t in added) and options.residual_dtype == inputs.x.dtype


def is_stored(inputs: Inputs, options: Options) -> bool:
    """Is the sum a tensor of its own, which the caller or the backward will read?"""
    return (options.keeps or options.returns_residual) and not is_plain(inputs, options)


def shares_gradient(kept: Kept, needs: Needs) -> bool:
    """Is the gradient of ``x`` that of the sum? Then it is computed and stored once."""
    return kept.dropout_state is None and kept.row_scale is None and needs.x_dtype == kept.total.dtype


def computed(kept: Kept, needs: Needs) -> list[bool]:
    """For each input gradient, whether it is more than an empty placeholder."""
    shared = shares_gradient(kept, needs)
    return [
        needs.needs_d_x or (shared and needs.needs_d_residual),
        needs.needs_d_residual and not shared,
        needs.needs_d_weight,
        needs.needs_d_bias,
        needs.needs_d_x_bias,
        needs.needs_d_row_scale,
    ]


def empty_results(inputs: Inputs, options: Options) -> Results:
    """The norm, ``r`` and the statistics, for the kernels to write; empty where they are not to."""
    x = inputs.x
    stored = is_stored(inputs, options)
    rows = math.prod(x.shape[:-1]) if options.keeps else 0
    return Results(
        output=torch.empty(x.shape, dtype=options.out_dtype, device=x.device),
        total=torch.empty(x.shape if stored else (0,), dtype=options.residual_dtype, device=x.device),
        statistics=torch.empty((1 if options.kind == "rms" else 3, rows), dtype=torch.float32, device=x.device),
    )


def empty_row_gradients(kept: Kept, needs: Needs) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of the residual, for the kernels to write; empty where they are not to."""
    total, (of_x, of_residual, *_) = kept.total, computed(kept, needs)
    d_x = torch.empty(total.shape if of_x else (0,), dtype=needs.x_dtype, device=total.device)
    return d_x, torch.empty(total.shape if of_residual else (0,), dtype=total.dtype, device=total.device)


def empty_gradients(kept: Kept, needs: Needs) -> InputGradients:
    """Tensors like all of the input gradients."""
    total, size = kept.total, kept.total.shape[-1]
    d_x, d_residual = empty_row_gradients(kept, needs)

    def vector(needed: bool) -> Tensor:
        return total.new_empty(size if needed else 0, dtype=needs.vectors_dtype)

    return InputGradients(
        d_x,
        d_residual,
        d_weight=vector(needs.needs_d_weight),
        d_bias=vector(needs.needs_d_bias),
        d_x_bias=vector(needs.needs_d_x_bias),
        d_row_scale=total.new_empty(total.shape[:-1] if needs.needs_d_row_scale else (0,), dtype=torch.float32),
    )
