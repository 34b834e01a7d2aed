"""The torch backend: ``F.scaled_dot_product_attention`` where it can express the call, else blocks of plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active as is_functorch_active

from fastattn.ops import _autograd, _torch_blocks, _torch_recorded, _torch_tiles
from fastattn.ops._call import AttentionCall
from fastattn.ops._tracing import is_left_open, is_recorded, is_traced
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY


def describe(call: AttentionCall) -> str:
    """Which of the four forms the call takes."""
    if _tiles_serve(call):
        return "F.scaled_dot_product_attention, over the keys that each tile of rows may see if that leaves out many"
    if _sdpa_can(call):
        return "F.scaled_dot_product_attention"
    if _is_small(call):
        return "the formula in plain torch (weights are asked for, and the scores fit one block)"
    why = "weights or LSE are asked for" if call.is_plain else "F.scaled_dot_product_attention has not all of its terms"
    return f"plain torch in blocks of rows ({why})"


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)``."""
    if (
        _tiles_serve(call)
        and (output := _torch_tiles.run(call, *_autograd.operands(call, None, "torch"), _sdpa)) is not None
    ):
        return output, None, None
    # SDPA, which draws in place, cannot draw anew for each sample of a vmap
    if _sdpa_can(call) and not (call.dropout_p > 0.0 and not is_traced() and is_functorch_active()):
        if call.dropout_p == 0.0 and _is_transformed_on_cpu(call.query):
            return _autograd.apply(call, None, "torch")
        return _sdpa(call), None, None
    keep = None
    if call.dropout_p > 0.0:
        keep = _drawn(call)
    if is_recorded():
        return _torch_recorded.run(call, keep)
    if _is_small(call):
        output, weights, trusted = _formula(call, keep)
        if trusted:
            return output, weights, None
    return _autograd.apply(call, keep, "torch")


def _drawn(call: AttentionCall) -> Tensor:
    """The weights that dropout keeps: drawn whole, as nn.MultiheadAttention draws it, so that one seed gives the same
    dropout in both."""
    shape = (*call.query.shape[:3], call.key.shape[2])
    if is_traced() or is_functorch_active():
        # an operator that exporters know, and that vmap draws from as its randomness says; it takes four times as long
        return F.dropout(call.query.new_ones(shape), call.dropout_p) != 0
    return torch.empty(shape, dtype=torch.bool, device=call.query.device).bernoulli_(1.0 - call.dropout_p)


def _tiles_serve(call: AttentionCall) -> bool:
    return _torch_tiles.can_run(call) and is_eager_on_cpu(call.query) and torch.autograd.forward_ad._current_level < 0


def is_eager_on_cpu(tensor: Tensor) -> bool:
    """Is this a plain call on the CPU, that nothing traces or transforms, so that looking at numbers is allowed?"""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not is_traced() and not is_functorch_active()


def _sdpa_can(call: AttentionCall) -> bool:
    return call.weights == "none" and not call.return_lse and call.is_plain


# ------------------------------------------------------------------------------------------------------ small calls


def _is_small(call: AttentionCall) -> bool:
    """Does the formula serve? The operators, their autograd rules and their caution cost more than a small call."""
    query, key = call.query, call.key
    return (
        not call.return_lse
        and call.is_plain
        and query.shape[1] == key.shape[1]
        and is_eager_on_cpu(query)  # before its sizes are looked at, which a graph may leave open
        and 0 < query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= _torch_blocks.BLOCK_ELEMENTS
    )


def _formula(call: AttentionCall, keep: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """Output and weights by the textbook, and whether to trust them: rows that see nothing, and NaN or inf in what is
    hidden, show in the sum and are left to the blocks."""
    mask, shape = _merged_mask(call), call.query.shape[:3]
    # flat, because a product of 4-D tensors is the same product under six more nodes of autograd
    query, key, value = (t.flatten(0, 1) for t in (call.query * call.scale, call.key, call.value))
    if mask is None:
        scores = torch.bmm(query, key.mT)
    else:
        if mask.dtype == torch.bool:  # added, not filled in: filling takes as long as a product
            mask = torch.where(mask, 0.0, NEGATIVE_INFINITY).to(query.dtype)
        if mask.shape[:2] == (1, 1):
            scores = torch.baddbmm(mask.squeeze(0), query, key.mT)
        else:
            scores = (torch.bmm(query, key.mT).view(*shape, -1) + mask).flatten(0, 1)
    weights = torch.softmax(scores, dim=-1)
    if keep is not None:
        weights = weights * keep.flatten(0, 1) * (1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0)
    output = torch.bmm(weights, value).view(*shape, -1)
    weights = weights.view(*shape, -1)
    trusted = mask is None or math.isfinite(output.detach().sum().item() + call.key.detach().sum().item())
    return output, weights.mean(dim=1) if call.weights == "average" else weights, trusted


# ------------------------------------------------------------------------------------------------------------- SDPA


def _sdpa(call: AttentionCall) -> Tensor:
    call = _without_keys_past_the_diagonal(call)
    key, value, mask = call.key, call.value, _merged_mask(call)
    if mask is not None and not _is_known_finite(key, value):
        key, value = _without_unseen(key, value, mask)
    query, scale = call.query, call.scale
    if scale <= 0.0:  # torch's CPU kernel scales what it has hidden: -inf * 0 is NaN, and -inf * -1 everything
        query, scale = (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)
    if query.device.type == "cpu" and call.dropout_p == 0.0:
        query, key, value = _as_the_cpu_kernel_takes_them(query, key, value)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=call.upper is not None and mask is None,
        scale=scale,
        # A branch, and not the comparison: under torch.jit.trace that is a tensor, in a dynamic graph a SymBool.
        **({"enable_gqa": True} if call.query.shape[1] != call.key.shape[1] else {}),
    )
    output = _twice_differentiable(output)  # before it is cut: the hook is on the kernel's own node
    return output if output.shape[3] == call.value.shape[3] else output[..., : call.value.shape[3]]


def _as_the_cpu_kernel_takes_them(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The three with the elements of a row side by side, and all rows as wide.

    Others go to a form of SDPA that makes all scores: for a feature map with channels first, of positions times
    positions. Zeros behind a row change no score, and those behind a value are columns of zeros in the output. At 2304
    positions this takes 18 ms (D = Dv = 32; D 4, Dv 16: 9), that form 42 (35), blocks of rows 29 (17); rows have to
    differ eightfold in width before either is faster.
    """
    width = max(query.shape[3], value.shape[3])
    taken = [t if t.shape[3] == width else F.pad(t, (0, width - t.shape[3])) for t in (query, key, value)]
    # not .contiguous(), to which a row of one element is contiguous whatever its stride
    return [t if t.stride(3) == 1 else t.clone(memory_format=torch.contiguous_format) for t in taken]


def _is_transformed_on_cpu(tensor: Tensor) -> bool:
    """Is this a call under ``torch.func`` or in forward mode, for which SDPA's CPU kernel has no rules?"""
    return (
        tensor.device.type == "cpu"
        and not is_traced()
        and (is_functorch_active() or torch.autograd.forward_ad._current_level >= 0)
    )


def _twice_differentiable(output: Tensor) -> Tensor:
    """``output`` of SDPA, whose gradient, where it came from the CPU kernel, has a gradient too.

    torch has none for that kernel's backward. A hook costs a training step 10 to 20 microseconds; a Function of our own
    in the kernel's place costs 30.
    """
    if output.device.type == "cpu" and not is_traced():
        node = output.grad_fn
        if node is not None and node.name() == "ScaledDotProductFlashAttentionForCpuBackward0":
            node.register_hook(_differentiable_gradients)
    return output


def _differentiable_gradients(
    d_inputs: tuple[Tensor | None, ...], d_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """In the place of the CPU kernel's gradients, those of our operators, where somebody may differentiate them."""
    if not torch.is_grad_enabled() or d_outputs[0] is None:
        return None
    node: Any = torch._C._current_autograd_node()
    query, key, value, bias = saved_tensors(node, "query", "key", "value", "attn_mask")
    call = AttentionCall(
        *(t.view_as(t) for t in (query, key, value)),  # one tensor may be all three, or made from another
        bias=bias,
        upper=0 if node._saved_is_causal else None,
        scale=1.0 / math.sqrt(query.shape[-1]) if node._saved_scale is None else node._saved_scale,
    )
    wanted = [t for t, d_input in zip((call.query, call.key, call.value, bias), d_inputs) if d_input is not None]
    output, _, _ = _autograd.apply(call, None, "torch")
    found = iter(torch.autograd.grad([output], wanted, [d_outputs[0]], create_graph=True))
    return tuple(None if d_input is None else next(found) for d_input in d_inputs)


def saved_tensors(node: Any, *names: str) -> list[Tensor]:
    """What a node of autograd saved, read in a backward pass of its own: checkpointing unpacks a tensor once a pass."""
    found: list[Tensor] = []
    leaf = torch.zeros((), requires_grad=True)
    leaf.register_hook(lambda _: found.extend(getattr(node, f"_saved_{name}") for name in names))
    torch.autograd.grad(leaf * 1, leaf)
    return found


def _without_keys_past_the_diagonal(call: AttentionCall) -> AttentionCall:
    """Cut off the keys that no query may see: less work, and their NaN and inf are out of the way."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.upper is None:
        return call
    if is_left_open(length, keys):  # a mask in their place, under which _without_unseen makes them zero
        below = visibility(length, keys, upper=call.upper, device=call.query.device)
        return call._replace(upper=None, mask=below if call.mask is None else call.mask & below)
    if length == keys:
        return call
    stop = max(0, length + call.upper)
    if stop >= keys:
        return call
    bias, mask = (t if t is None or t.shape[3] == 1 else t[..., :stop] for t in (call.bias, call.mask))
    padding = call.key_padding_mask
    return call._replace(
        key=call.key[:, :, :stop],
        value=call.value[:, :, :stop],
        bias=bias,
        mask=mask,
        key_padding_mask=None if padding is None else padding[:, :stop],
    )


def _is_known_finite(key: Tensor, value: Tensor) -> bool:
    """Where looking is cheap and allowed: do key and value hold numbers alone?"""
    return is_eager_on_cpu(key) and math.isfinite((key.detach().sum() + value.detach().sum()).item())


def _without_unseen(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value, zero where no query may see them: 0 * NaN is NaN."""
    visible = mask if mask.dtype == torch.bool else mask != NEGATIVE_INFINITY
    unseen = ~visible.any(dim=-2)  # [B | 1, H | 1, S | 1]
    if unseen.shape[1] not in (1, key.shape[1]):
        unseen = unseen.unflatten(1, (key.shape[1], -1)).all(dim=2)
    return key.masked_fill(unseen[..., None], 0), value.masked_fill(unseen[..., None], 0)


def _merged_mask(call: AttentionCall) -> Tensor | None:
    """One mask for torch, or None where there is none or SDPA's own ``is_causal`` says all."""
    query, key, padding = call.query, call.key, call.key_padding_mask
    visible = call.mask
    if padding is not None:
        unpadded = ~padding[:, None, None, :]
        visible = unpadded if visible is None else visible & unpadded
    alone = visible is None and call.bias is None
    if call.upper is not None and not (alone and call.upper == 0 and _sdpa_can(call)):
        below = visibility(query.shape[2], key.shape[2], upper=call.upper, device=query.device)
        visible = below if visible is None else visible & below
    if call.bias is None:
        return visible
    bias = call.bias.to(query.dtype)
    return bias if visible is None else torch.where(visible, bias, NEGATIVE_INFINITY)
