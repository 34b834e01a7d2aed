"""Residual add and norm as they are written in the papers, every intermediate made. Differentiable to any order."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["layer", "rms"]


class NormResult(NamedTuple):
    """What a residual add followed by a norm gives."""

    output: Tensor  # [..., N]
    residual: Tensor  # [..., N], the sum that was normalised


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: Kind = "layer",
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_offset: bool = False,
    dropout_keep: Tensor | None = None,
    dropout_p: float = 0.0,
    round_residual: bool = True,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> NormResult:
    """``r = residual + dropout(x + x_bias) * row_scale``, then layer norm (arXiv:1607.06450) or RMS norm
    (arXiv:1910.07467) of ``r`` over its last axis.

    Computed in at least float32, whatever the tensors are; what leaves is rounded once.

    Args:
        x: ``[..., N]``.
        residual: ``[..., N]``.
        weight: ``[N]``: multiplies what was normalised.
        bias: ``[N]``: added behind ``weight``.
        kind: ``"layer"`` subtracts the mean, ``"rms"`` does not.
        eps: added to the variance, or the mean square.
        x_bias: ``[N]``: added to ``x``.
        row_scale: ``[...]``: multiplies the rows of ``x``.
        unit_offset: multiply by ``1 + weight``.
        dropout_keep: boolean ``[..., N]``: the elements of ``x + x_bias`` that dropout keeps.
        dropout_p: the probability with which ``dropout_keep`` was drawn.
        round_residual: normalise the sum as it is returned, rounded to its dtype, and not as it was computed.
        out_dtype: of the output; default ``x.dtype``.
        residual_dtype: of the sum; default the one that ``x`` and ``residual`` promote to.
    """
    out_dtype = out_dtype or x.dtype
    residual_dtype = residual_dtype or (x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    compute = torch.promote_types(torch.promote_types(residual_dtype, x.dtype), torch.float32)
    total = x.to(compute)
    if x_bias is not None:
        total = total + x_bias.to(compute)
    if dropout_keep is not None:
        total = total * dropout_keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    if row_scale is not None:
        total = total * row_scale.to(compute)[..., None]
    if residual is not None:
        total = total + residual.to(compute)
    rounded = total.to(residual_dtype)
    centred = rounded.to(compute) if round_residual else total
    if kind == "layer":
        centred = centred - centred.mean(dim=-1, keepdim=True)
    output = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        output = output * (1.0 + weight.to(compute) if unit_offset else weight.to(compute))
    if bias is not None:
        output = output + bias.to(compute)
    return NormResult(output.to(out_dtype), rounded)
