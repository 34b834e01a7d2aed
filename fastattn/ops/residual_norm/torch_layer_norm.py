"""Layer norm by torch's own kernels, with right derivatives beyond the first, and exact gradients in 16 bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.tracing import is_batched, is_eager_on_cpu, is_traced, is_transformed, saved_tensors
from fastattn.reference import add_norm

HALF = (torch.float16, torch.bfloat16)
_backward = torch.ops.aten.native_layer_norm_backward.default


def last_size(x: Tensor) -> torch.Size:
    """The size that is normalised: under ``torch.jit.trace`` a number, as ONNX asks for, where it would be a tensor."""
    return torch.Size(map(int, x.shape[-1:])) if torch.jit.is_tracing() else x.shape[-1:]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.layer_norm`` over the last axis of ``x``, with right derivatives.

    Args:
        x: ``[..., N]``.
        weight: ``[N]``, of the dtype of ``x``, or float32 where that has 16 bits.
        bias: as ``weight``.
        eps: added to the variance.
    """
    if is_traced():
        return F.layer_norm(x, last_size(x), weight, bias, eps)
    if is_transformed() or x.shape[-1] == 1:  # of one element torch's weight has a gradient: what rounding leaves
        output = add_norm(x, None, weight, bias, eps=eps).output
        return output.clone(memory_format=torch.contiguous_format)  # as F.layer_norm lays it out
    return eager_layer_norm(x, x.shape[-1:], weight, bias, eps)


def can_run_eagerly(x: Tensor) -> bool:
    """Whether nothing traces or transforms a call on the CPU, whose rows have more than one element."""
    return x.shape[-1] != 1 and is_eager_on_cpu(x) and not is_transformed()


def eager_layer_norm(x: Tensor, size: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """:func:`layer_norm` of rows of more than one element, where nothing traces or transforms the call.

    torch's derivatives are silently wrong from the third on, and its second fails without a weight. So the node of its
    backward has a hook, which acts where gradients are to be differentiated again. What is registered here is the
    dictionary of hooks of another tensor, made once: a hook of its own would cost each call three times as much.
    """
    output = torch.layer_norm(x, size, weight, bias, eps, False)
    node = output.grad_fn
    if node is not None and type(node).__name__ == "NativeLayerNormBackward0":
        node._register_hook_dict(_hooked(eps))
    return output


@functools.lru_cache(maxsize=64)
def _hooked(eps: float) -> Tensor:
    """A tensor whose hook, in the place of a hook of a layer norm's result, guards the gradients of that norm."""
    leaf = torch.zeros((), device="cpu", requires_grad=True)
    leaf.register_hook(functools.partial(_guard, eps))
    return leaf


def _guard(eps: float, d_output: Tensor | None) -> None:
    """Ahead of the backward of a layer norm: where its gradients may be differentiated again, have them replaced."""
    if d_output is None or not torch.is_grad_enabled():
        return
    node: Any = torch._C._current_autograd_node()
    if _guard not in node.metadata:  # else a graph that was kept goes this way again
        node.metadata[_guard] = True
        node.register_hook(functools.partial(_differentiable_gradients, eps))


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
    """Gradients of input, weight and bias, those that are wanted, which can be differentiated where gradients are
    recorded."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, since one tensor may be made from another, and no gradient is counted twice
        x, weight, bias = (None if t is None else t.view_as(t) for t in saved)
        assert x is not None
        output = add_norm(x, None, weight, bias, eps=eps).output
        wanted = [t for t, is_wanted in zip((x, weight, bias), wants) if is_wanted and t is not None]
        found = iter(torch.autograd.grad([output], wanted, [d_output], create_graph=differentiated))
    return tuple(next(found) if is_wanted else None for is_wanted in wants)


# ------------------------------------------------------------------------------------------------- 16 bits on the CPU


def float32_vectors(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both for torch's layer norm of a 16-bit ``x``, with which it keeps the statistics in float32 as well; without
    them, or with narrow ones, it rounds statistics to 16 bits. The result has the same bits."""
    weight = x.new_ones(x.shape[-1], dtype=torch.float32) if weight is None else weight.float()
    return weight, x.new_zeros(x.shape[-1], dtype=torch.float32) if bias is None else bias.float()


def eager_half_layer_norm(
    x: Tensor, size: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """:func:`eager_layer_norm` of a 16-bit ``x`` on the CPU, with vectors of its dtype, whose gradients are as exact as
    they can be written."""
    trains = torch.is_grad_enabled()
    if trains and any(t is not None and t.requires_grad for t in (weight, bias)):
        return _HalfLayerNorm.apply(x, weight, bias, size, eps)
    if x.numel() >= _FEWEST or (trains and x.requires_grad):
        weight, bias = float32_vectors(x, weight, bias)
    return eager_layer_norm(x, size, weight, bias, eps)


class _HalfLayerNorm(torch.autograd.Function):
    """Layer norm of a 16-bit ``x`` that trains on the CPU: torch's forward, and its gradient of ``x``. Those of the
    vectors are computed in float32: torch sums them in 16 bits, and loses four percent of them over two thousand rows.
    Nothing wider than ``x`` is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, size: Sequence[int], eps: float
    ) -> Tensor:
        vectors = float32_vectors(x, weight, bias)
        output, mean, rstd = torch.native_layer_norm(x, size, *vectors, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (d_output,) = grads
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_batched(d_output):  # the gradients may be differentiated again
            return *_formula_gradients((x, weight, bias), wants, d_output, ctx.eps), None, None
        wide, d_x = x.new_ones(x.shape[-1], dtype=torch.float32) if weight is None else weight.float(), None
        statistics = mean, rstd, wide, wide  # of the bias torch reads nothing
        if x.numel() <= 2 * _BLOCK:  # in two blocks it takes longer
            found = _backward(d_output.float(), x.float(), x.shape[-1:], *statistics, wants)
            return *(None if g is None or not w else g.to(x.dtype) for g, w in zip(found, wants)), None, None
        if wants[0]:
            d_x, _, _ = _backward(d_output, x, x.shape[-1:], *statistics, (True, False, False))
        return d_x, *_vector_gradients(d_output, x, mean, rstd, wants[1:]), None, None


# Elements from which on torch's kernel with wide vectors is faster than it takes to convert the vectors.
_FEWEST = 1 << 15
# Elements that are converted at once: of two tensors in float32 they are half a megabyte, which stays in a core's cache
_BLOCK = 1 << 16
_FEWEST_COLUMNS = 1024


def _vector_gradients(
    d_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, wants: tuple[bool, bool]
) -> list[Tensor | None]:
    """The gradients of weight and bias, those that are wanted, summed in float32, a block of rows and columns at a
    time."""
    wanted = [i for i, is_wanted in enumerate(wants) if is_wanted]
    size, (d_output, x, mean, rstd) = x.shape[-1], (t.reshape(-1, t.shape[-1]) for t in (d_output, x, mean, rstd))
    block = min(x.numel(), _BLOCK * torch.get_num_threads())
    width = min(size, max(_FEWEST_COLUMNS, block // x.shape[0]))
    height = max(1, block // width)
    buffers = x.new_empty(2, height * width, dtype=torch.float32)
    found = x.new_zeros(2, size, dtype=torch.float32)
    # unsafe_split is unsafe to autograd alone, which is off here, and takes a third of split's time
    for sums, *columns in zip(*(t.unsafe_split(width, 1) for t in (found, d_output, x))):
        shape = (-1, sums.shape[1])
        whole = [buffer[: height * shape[1]].view(shape) for buffer in buffers]
        totals, ones = sums.unbind(), whole[0][0]  # of the weight torch reads the dtype
        for *pair, means, roots in zip(*(t.unsafe_split(height) for t in (*columns, mean, rstd))):
            count = means.shape[0]
            wide = [(t if count == height else t[:count]).copy_(narrow) for t, narrow in zip(whole, pair)]
            _, *parts = _backward(*wide, shape[1:], means, roots, ones, ones, (False, *wants))
            for i in wanted:
                totals[i].add_(parts[i])
    return [vector.to(x.dtype) if is_wanted else None for vector, is_wanted in zip(found, wants)]
