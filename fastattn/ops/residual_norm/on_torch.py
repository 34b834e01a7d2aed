"""Residual add and norm in plain torch: its own fused layer norm, and an analytic RMS norm where torch has none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.tracing import is_eager_on_cpu, is_traced, is_transformed, saved_tensors
from fastattn.ops.residual_norm.contract import ResidualNormCall
from fastattn.reference import add_norm

_HALF = (torch.float16, torch.bfloat16)


def describe(call: ResidualNormCall) -> str:
    """Which of torch's norms runs."""
    if call.kind == "rms" and is_eager_on_cpu(call.x):
        return "F.rms_norm, where it trains with one backward"
    return f"F.{call.kind}_norm"


def run(call: ResidualNormCall) -> tuple[Tensor, Tensor]:
    """``(output, new residual)``."""
    if call.is_plain:
        return _normalised(call, call.x), call.x
    total = _total(call)
    rounded = total if total.dtype is call.residual_dtype else total.to(call.residual_dtype)
    return _normalised(call, rounded if call.round_residual else total), rounded


def _total(call: ResidualNormCall) -> Tensor:
    """``residual + dropout(x + x_bias) * row_scale``, rounded once: wider than its dtype where there are more steps."""
    x, residual = call.x, call.residual
    steps = (residual is not None) + (call.x_bias is not None) + (call.row_scale is not None) + (call.dropout_p > 0.0)
    others = (residual, call.x_bias, call.row_scale)
    same_dtype = call.residual_dtype is x.dtype and all(t is None or t.dtype is x.dtype for t in others)
    # a narrow bias would have its gradient summed over the rows in its own dtype
    if steps > 1 or not call.round_residual or not same_dtype or (call.x_bias is not None and x.dtype in _HALF):
        compute = torch.promote_types(torch.promote_types(x.dtype, call.residual_dtype), torch.float32)
        x = x.to(compute if residual is None else torch.promote_types(compute, residual.dtype))
    if call.x_bias is not None:
        x = x + call.x_bias.to(x.dtype)
    if call.dropout_p > 0.0:
        x = F.dropout(x, call.dropout_p)
    if call.row_scale is not None:
        x = x * call.row_scale.to(x.dtype)[..., None]
    return x if residual is None else residual + x


def _normalised(call: ResidualNormCall, total: Tensor) -> Tensor:
    weight, bias, dtype = call.weight, call.bias, total.dtype
    is_half_on_cpu = dtype in _HALF and call.kind == "layer" and total.device.type == "cpu"
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    same_dtype = call.out_dtype is dtype and all(t is None or t.dtype is dtype for t in (weight, bias))
    # torch's norms take and give one dtype; on the CPU they sum the gradients of 16-bit vectors in 16 bits, and lose
    # four percent of them over two thousand rows
    if is_half_on_cpu and learns and same_dtype and not call.unit_offset and _HalfLayerNorm.can(total):
        return _HalfLayerNorm.apply(total, weight, bias, call.eps)
    if call.unit_offset or not same_dtype or (is_half_on_cpu and learns):
        compute = torch.promote_types(dtype, torch.float32)
        total = total.to(compute)
        weight, bias = (None if t is None else t.to(compute) for t in (weight, bias))
        if call.unit_offset and weight is not None:
            weight = 1.0 + weight
    elif is_half_on_cpu:
        weight, bias = _float32_vectors(total, weight, bias)
    if call.kind == "layer":
        output = _layer_norm(total, weight, bias, call.eps)
    else:
        output = _rms_norm(total, weight, call.eps)
        output = output if bias is None else output + bias
    return output if output.dtype is call.out_dtype else output.to(call.out_dtype)


def _float32_vectors(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both for torch's layer norm of a 16-bit ``x``, with which it keeps the statistics in float32 as well; without
    them, or with narrow ones, it rounds statistics to 16 bits."""
    weight = x.new_ones(x.shape[-1], dtype=torch.float32) if weight is None else weight.float()
    return weight, x.new_zeros(x.shape[-1], dtype=torch.float32) if bias is None else bias.float()


def _last_size(x: Tensor) -> torch.Size:
    """The size that is normalised: under ``torch.jit.trace`` a number, as ONNX asks for, where it would be a tensor."""
    return torch.Size(map(int, x.shape[-1:])) if torch.jit.is_tracing() else x.shape[-1:]


# ----------------------------------------------------------------------------------------------------------- layer norm


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.layer_norm``, with right derivatives beyond the first.

    torch's are silently wrong from the third on, and where reverse mode goes over forward mode; its second fails
    without a weight. A hook costs a training step a few microseconds.
    """
    if is_traced():
        return F.layer_norm(x, _last_size(x), weight, bias, eps)
    if is_transformed() or x.shape[-1] == 1:  # of one element torch's weight has a gradient: what rounding leaves
        output = add_norm(x, None, weight, bias, eps=eps).output
        return output.clone(memory_format=torch.contiguous_format)  # as F.layer_norm lays it out
    output = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    node = output.grad_fn
    if node is not None and node.name() == "NativeLayerNormBackward0":
        node.register_hook(functools.partial(_differentiable_gradients, eps))
    return output


class _HalfLayerNorm(torch.autograd.Function):
    """Layer norm of a 16-bit ``x`` that trains on the CPU: torch's forward, whose result is that of evaluation, and its
    backward in float32. Nothing wider than ``x`` is kept."""

    @staticmethod
    def can(x: Tensor) -> bool:
        return x.shape[-1] > 1 and is_eager_on_cpu(x) and not is_transformed()

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        vectors = _float32_vectors(x, weight, bias)
        output, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *vectors, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (d_output,) = grads
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # the gradients may be differentiated again
            return *_formula_gradients((x, weight, bias), wants, d_output, ctx.eps), None
        vectors = _float32_vectors(x, weight, bias)
        gradients = torch.ops.aten.native_layer_norm_backward(
            d_output.float(), x.float(), x.shape[-1:], mean, rstd, *vectors, wants
        )
        return *(None if g is None or not w else g.to(x.dtype) for g, w in zip(gradients, wants)), None


def _differentiable_gradients(
    eps: float, d_inputs: tuple[Tensor | None, ...], d_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """The formula's gradients, to replace those of torch's layer norm where they may be differentiated again."""
    if not torch.is_grad_enabled() or d_outputs[0] is None:
        return None
    saved = saved_tensors(torch._C._current_autograd_node(), "input", "weight", "bias")
    return _formula_gradients(saved, [d_input is not None for d_input in d_inputs], d_outputs[0], eps)


def _formula_gradients(
    saved: Sequence[Tensor | None], wants: Sequence[bool], d_output: Tensor, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias, those that are wanted, which can be differentiated themselves."""
    # views, since one tensor may be made from another, and no gradient is counted twice
    x, weight, bias = (None if t is None else t.view_as(t) for t in saved)
    assert x is not None
    output = add_norm(x, None, weight, bias, eps=eps).output
    wanted = [t for t, is_wanted in zip((x, weight, bias), wants) if is_wanted and t is not None]
    found = iter(torch.autograd.grad([output], wanted, [d_output], create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in wants)


# ------------------------------------------------------------------------------------------------------------- RMS norm


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``F.rms_norm``; on the CPU, where torch differentiates eight operations, with one backward."""
    trains = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    # of one element the terms of its gradient cancel but for eps, and torch's operations leave less of their rounding
    if not (trains and is_eager_on_cpu(x) and x.numel()) or x.shape[-1] == 1 or x.is_complex() or is_transformed():
        return F.rms_norm(x, _last_size(x), weight, eps)
    if x.dtype in _HALF:
        return _RMSNorm.apply(x.float(), None if weight is None else weight.float(), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """RMS norm of ``x`` ``[..., N]`` in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        rstd = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # as torch does it, to the bit
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        # as F.rms_norm lays it out, but for channels-last results, which are laid out by the caller
        output = x * rstd if x.is_contiguous() else torch.mul(x, rstd, out=x.new_empty(x.shape))
        return output if weight is None else output.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (d_output,) = grads
        x, weight, rstd = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients may be differentiated again
            x = x.view_as(x)  # one tensor may be both, or one made from the other: no gradient is counted twice
            weight = None if weight is None else weight.view_as(weight)
            wanted = [t for t, wants in ((x, wants_x), (weight, wants_weight)) if wants and t is not None]
            output = F.rms_norm(x, x.shape[-1:], weight, ctx.eps)
            found = iter(torch.autograd.grad([output], wanted, [d_output], create_graph=True))
            return next(found) if wants_x else None, next(found) if wants_weight else None, None
        d_x = d_weight = None
        if wants_x:
            # torch's layer norm backward, told a mean of zero, would do; but it sums a row in few chains, whose errors
            # add up where gradients are alike
            scaled = d_output * rstd if weight is None else (d_output * weight).mul_(rstd)
            mean = (scaled * x).mean(-1, keepdim=True)
            d_x = scaled.addcmul_(x, mean.mul_(rstd).mul_(rstd), value=-1.0)
        if wants_weight:
            # in this order: d_output * x overflows near the end of float32, and underflows near zero
            d_weight = (d_output * (x * rstd)).reshape(-1, x.shape[-1]).sum(0)
        return d_x, d_weight, None
