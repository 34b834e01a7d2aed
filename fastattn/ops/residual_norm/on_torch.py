"""Residual add and norm in plain torch: its own fused layer norm, and an analytic RMS norm where torch has none."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.tracing import is_eager_on_cpu, is_transformed
from fastattn.ops.residual_norm.contract import ResidualNormCall
from fastattn.ops.residual_norm.torch_layer_norm import (
    HALF,
    can_run_eagerly,
    eager_half_layer_norm,
    float32_vectors,
    layer_norm,
)
from fastattn.ops.residual_norm.torch_rms_norm import rms_norm


def describe(call: ResidualNormCall) -> str:
    """Which of torch's norms runs."""
    if call.kind == "rms" and is_eager_on_cpu(call.x):
        return "F.rms_norm, of many rows in blocks with one backward"
    return f"F.{call.kind}_norm"


def run(call: ResidualNormCall) -> tuple[Tensor, Tensor]:
    """``(output, new residual)``."""
    if call.is_plain:
        return _normalised(call, call.x), call.x
    total = _total_by_rows(call) if _goes_by_rows(call) else _total(call)
    rounded = total if total.dtype is call.residual_dtype else total.to(call.residual_dtype)
    return _normalised(call, rounded if call.round_residual else total), rounded


# Elements of x, for each thread, that are summed at a time where they go by rows: 256 KiB in float32.
_BLOCK = 1 << 16


def _goes_by_rows(call: ResidualNormCall) -> bool:
    """Is this a sum of several steps without derivatives, of rows that leave the cache between two steps?"""
    return (
        call.round_residual
        and _steps(call) > 1
        and (call.residual is None or call.residual.shape == call.x.shape)
        and not _has_gradients(call)  # nor a graph, which cannot hold the number of threads
        and call.x.numel() > _BLOCK * torch.get_num_threads()
    )


def _has_gradients(call: ResidualNormCall) -> bool:
    """May there be derivatives of the sum, or is it one of a graph, which may be differentiated where it is run?"""
    tensors = (call.x, call.residual, call.x_bias, call.row_scale)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return trains or not is_eager_on_cpu(call.x) or is_transformed()


def _total_by_rows(call: ResidualNormCall) -> Tensor:
    """:func:`_total` in the residual's dtype, a block of rows at a time: what is wider is as large as a block.

    What dropout keeps is drawn at once, as with gradients: of blocks torch draws other numbers than of the whole, and a
    reentrant checkpoint runs the same call once without gradients and once with them.
    """
    size = call.x.shape[-1]
    total = call.x.new_empty(call.x.shape, dtype=call.residual_dtype)
    height = max(1, _BLOCK * torch.get_num_threads() // size)
    rows_of = {"x": call.x.reshape(-1, size)}
    if call.residual is not None:
        rows_of["residual"] = call.residual.reshape(-1, size)
    if call.row_scale is not None:
        rows_of["row_scale"] = call.row_scale.expand(call.x.shape[:-1]).reshape(-1)
    keeps = None
    if 0.0 < call.dropout_p < 1.0:
        keep = torch.empty_like(call.x, dtype=torch.bool).bernoulli_(1.0 - call.dropout_p)
        keeps = keep.reshape(-1, size).split(height)
    blocks = zip(*(t.split(height) for t in (total.view(-1, size), *rows_of.values())))
    for (target, *rows), keep in zip(blocks, itertools.repeat(None) if keeps is None else keeps):
        target.copy_(_total(call._replace(**dict(zip(rows_of, rows))), keep))
    return total


def _steps(call: ResidualNormCall) -> int:
    """How many operations make the sum."""
    return (
        (call.residual is not None) + (call.x_bias is not None) + (call.row_scale is not None) + (call.dropout_p > 0.0)
    )


def _total(call: ResidualNormCall, keep: Tensor | None = None) -> Tensor:
    """``residual + dropout(x + x_bias) * row_scale``, rounded once: wider than its dtype where there are more steps.

    Args:
        call: of the sum.
        keep: boolean ``[..., N]``, which elements dropout keeps; default: they are drawn.
    """
    x, residual, steps = call.x, call.residual, _steps(call)
    others = (residual, call.x_bias, call.row_scale)
    same_dtype = call.residual_dtype is x.dtype and all(t is None or t.dtype is x.dtype for t in others)
    is_dropout_alone = steps == 2 and residual is not None and 0.0 < call.dropout_p < 1.0
    if is_dropout_alone and same_dtype and call.round_residual and not _has_gradients(call):
        # this operation computes in float32 and rounds once; its gradients would be of factors rounded to 16 bits
        kept = torch.empty_like(x).bernoulli_(1.0 - call.dropout_p) if keep is None else keep.to(x.dtype)
        return torch.addcmul(residual, x, kept, value=1.0 / (1.0 - call.dropout_p))
    # a narrow bias would have its gradient summed over the rows in its own dtype
    if steps > 1 or not call.round_residual or not same_dtype or (call.x_bias is not None and x.dtype in HALF):
        compute = torch.promote_types(torch.promote_types(x.dtype, call.residual_dtype), torch.float32)
        x = x.to(compute if residual is None else torch.promote_types(compute, residual.dtype))
    if call.x_bias is not None:
        x = x + call.x_bias.to(x.dtype)
    if call.dropout_p > 0.0:
        x = F.dropout(x, call.dropout_p) if keep is None else x * keep * (1.0 / (1.0 - call.dropout_p))
    if call.row_scale is not None:
        x = x * call.row_scale.to(x.dtype)[..., None]
    return x if residual is None else residual + x


def _normalised(call: ResidualNormCall, total: Tensor) -> Tensor:
    weight, bias, dtype = call.weight, call.bias, total.dtype
    is_half_on_cpu = dtype in HALF and call.kind == "layer" and total.device.type == "cpu"
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    same_dtype = call.out_dtype is dtype and all(t is None or t.dtype is dtype for t in (weight, bias))
    # torch's norms take and give one dtype; on the CPU they sum the gradients of 16-bit vectors in 16 bits, and lose
    # four percent of them over two thousand rows
    if is_half_on_cpu and same_dtype and not call.unit_offset and can_run_eagerly(total):
        return eager_half_layer_norm(total, total.shape[-1:], weight, bias, call.eps)
    if call.unit_offset or not same_dtype or (is_half_on_cpu and learns):
        compute = torch.promote_types(dtype, torch.float32)
        total = total.to(compute)
        weight, bias = (None if t is None else t.to(compute) for t in (weight, bias))
        if call.unit_offset and weight is not None:
            weight = 1.0 + weight
    elif is_half_on_cpu:
        weight, bias = float32_vectors(total, weight, bias)
    if call.kind == "layer":
        output = layer_norm(total, weight, bias, call.eps)
    else:
        output = rms_norm(total, weight, call.eps)
        output = output if bias is None else output + bias
    return output if output.dtype is call.out_dtype else output.to(call.out_dtype)
