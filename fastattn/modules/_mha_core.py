"""Projection, attention and projection back as one node of autograd, in the place of twenty, for eager CPU calls.

The forward runs torch's kernel of attention or, where weights are asked for, the formula; the backward is written out.
Where gradients are themselves to be differentiated, or are not finite under a mask, they are those of the operators,
which have derivatives of every kind, and to which what is hidden does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.attention import operator
from fastattn.ops.attention.contract import AttentionCall, Weights
from fastattn.ops.common.finite import is_finite
from fastattn.ops.common.tracing import is_batched
from fastattn.reference.attention import NEGATIVE_INFINITY

# What F.scaled_dot_product_attention runs on a CPU. Its output lies as [N, L, H, D].
_FLASH: Any = torch._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SOFTMAX_BACKWARD: Any = torch.ops.aten._softmax_backward_data.out
# Within it a view of a new tensor is none to autograd, as within an operator: results may be changed in place, also
# what is made under no_grad.
_NEW_TENSORS: Any = torch._C._AutoDispatchBelowADInplaceOrView
# Elements of the query up to which the gradients of the three projections are stacked: one product instead of three. A
# node keeps what it has saved while it runs, so that of larger ones the stack would be memory that torch does not take.
_MOST_STACKED = 1 << 15


class Plan(NamedTuple):
    """What is computed, but for the tensors."""

    heads: int
    batch_first: bool  # [N, length, features] instead of [length, N, features]
    is_causal: bool  # hides keys j > i, in the place of a mask
    is_bias: bool  # the mask is more than zeros and -inf
    weights: Weights


def attend(
    plan: Plan,
    mask: Tensor | None,
    query: Tensor,
    memory: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and weights, with gradients.

    Args:
        plan: what to compute.
        mask: ``[L, S]`` or ``[N, H | 1, L | 1, S]``, added to the scores.
        query: ``[N, L, E]``, or ``[L, N, E]``.
        memory: of keys and values, likewise; None where it is the query.
        in_weight: ``[3 E, E]``.
        in_bias: ``[3 E]``.
        out_weight: ``[E, E]``.
        out_bias: ``[E]``.
    """
    found = _Attention.apply(plan, mask, query, memory, in_weight, in_bias, out_weight, out_bias)
    return found if isinstance(found, tuple) else (found, None)


def infer(
    plan: Plan,
    mask: Tensor | None,
    query: Tensor,
    memory: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attend` where nothing has a gradient."""
    with _NEW_TENSORS():
        merged, weights, _ = _attended(plan, mask, *_sides(plan, query, memory, in_weight, in_bias))
        return _linear(merged, out_weight, out_bias).view(query.shape), weights


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        mask: Tensor | None,
        query: Tensor,
        memory: Tensor | None,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
    ) -> Any:
        with _NEW_TENSORS():
            merged, weights, kept = _attended(plan, mask, *_sides(plan, query, memory, in_weight, in_bias))
            output = _linear(merged, out_weight, out_bias).view(query.shape)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, memory, in_weight, in_bias, out_weight, out_bias, mask, merged, *kept)
        return output if weights is None else (output, weights)

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> Any:
        d_output, d_weights = d_results if len(d_results) == 2 else (*d_results, None)
        saved = ctx.saved_tensors  # read once: checkpointing unpacks what was saved a single time
        query, memory, in_weight, _, out_weight, _, mask, merged, q, k, v, attended, kept = saved
        needs, plan = ctx.needs_input_grad, ctx.plan
        heads, batch_first, is_causal, _, weights = plan
        if d_output is None or torch.is_grad_enabled():
            return _by_operators(ctx, saved[:7], d_output, d_weights)
        first, second, embed_dim = query.shape
        d_rows = d_output.reshape(-1, embed_dim)
        d_attended = d_rows.mm(out_weight).view(first, second, heads, -1)
        d_attended = d_attended.transpose(1, 2) if batch_first else d_attended.permute(1, 2, 0, 3)
        if weights == "none":
            dq, dk, dv = _FLASH_BACKWARD(d_attended, q, k, v, attended, kept, 0.0, is_causal, attn_mask=mask)
        else:
            dq, dk, dv = _backward_of_formula(plan, q, k, v, kept, d_attended, d_weights)
        if batch_first:
            dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        else:
            dq, dk, dv = dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)
        d_query = d_memory = d_in_weight = d_in_bias = None
        if memory is None and query.numel() <= _MOST_STACKED:
            d_sides = torch.stack((dq, dk, dv), 2).view(-1, 3 * embed_dim)
            if needs[5] or mask is not None:
                d_in_bias = d_sides.sum(0)
            if needs[2]:
                d_query = d_sides.mm(in_weight).view(query.shape)
            if needs[4]:
                d_in_weight = d_sides.t().mm(query.reshape(-1, embed_dim))
        else:
            del d_attended
            rows = query.reshape(-1, embed_dim)
            of_memory = rows if memory is None else memory.reshape(-1, embed_dim)
            dq, dk, dv = dq.reshape(-1, embed_dim), dk.reshape(-1, embed_dim), dv.reshape(-1, embed_dim)
            w_q, w_k, w_v = in_weight.chunk(3)
            if needs[5] or mask is not None:
                d_in_bias = torch.cat((dq.sum(0), dk.sum(0), dv.sum(0)))
            if needs[4]:
                pairs = (dq, rows), (dk, of_memory), (dv, of_memory)
                if is_batched(d_output):
                    d_in_weight = torch.cat([side.t().mm(source) for side, source in pairs])
                else:
                    d_in_weight = torch.empty_like(in_weight)
                    for part, (side, source) in zip(d_in_weight.chunk(3), pairs):
                        torch.mm(side.t(), source, out=part)
            if needs[2]:
                d_query = dq.mm(w_q)
                if memory is None:
                    d_query = torch.addmm(torch.addmm(d_query, dk, w_k), dv, w_v)
                d_query = d_query.view(query.shape)
            if memory is not None and needs[3]:
                d_memory = torch.addmm(dk.mm(w_k), dv, w_v).view(memory.shape)
        if mask is not None and d_in_bias is not None and not _is_finite(d_in_bias):
            return _by_operators(ctx, saved[:7], d_output, d_weights)
        d_out_weight = d_rows.t().mm(merged) if needs[6] else None
        d_out_bias = d_rows.sum(0) if needs[7] else None
        return None, None, d_query, d_memory, d_in_weight, d_in_bias if needs[5] else None, d_out_weight, d_out_bias


def _by_operators(ctx: Any, saved: Sequence[Any], d_output: Tensor | None, d_weights: Tensor | None) -> Any:
    """The gradients by the operators, of the tensors given to the forward and its mask; differentiable where gradients
    are recorded."""
    plan, needs, differentiated = ctx.plan, ctx.needs_input_grad[2:], torch.is_grad_enabled()
    *given, mask = saved
    if mask is not None and mask.dim() == 2:
        mask = mask[None, None]
    with torch.enable_grad():
        # views, since one may have been made from another
        own: Any = [None if t is None else t.view_as(t) if differentiated else t.detach() for t in given]
        wanted = [
            t if differentiated else t.requires_grad_() for t, needed in zip(own, needs) if t is not None and needed
        ]
        query, memory, in_weight, in_bias, out_weight, out_bias = own
        q, k, v = _sides(plan, query, memory, in_weight, in_bias)
        call = AttentionCall(
            q,
            k,
            v,
            bias=mask if plan.is_bias else None,
            mask=None if mask is None else mask != NEGATIVE_INFINITY,
            upper=0 if plan.is_causal else None,
            scale=1.0 / math.sqrt(q.shape[3]),
            weights=plan.weights,
        )
        output, weights, _ = operator.apply(call, None, "torch")
        merged = output.transpose(1, 2) if plan.batch_first else output.permute(2, 0, 1, 3)
        pairs = [(F.linear(merged.flatten(2), out_weight, out_bias), d_output), (weights, d_weights)]
        results, d_results = zip(*[(result, d) for result, d in pairs if d is not None])
        found = iter(torch.autograd.grad(results, wanted, d_results, create_graph=differentiated, allow_unused=True))
    return None, None, *(next(found) if needed else None for needed in needs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of the rows ``[T, features]``."""
    rows = x.reshape(-1, weight.shape[1])
    return rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def _sides(plan: Plan, query: Tensor, memory: Tensor | None, weight: Tensor, bias: Tensor | None) -> Any:
    """Query, key and value ``[N, H, length, D]``."""
    first, second, embed_dim = query.shape
    order = (2, 0, 3, 1, 4) if plan.batch_first else (2, 1, 3, 0, 4)
    if memory is None:
        sides = _linear(query, weight, bias).view(first, second, 3, plan.heads, -1)
        return sides.permute(order).unbind()
    of_query, of_memory = (None, None) if bias is None else (bias[:embed_dim], bias[embed_dim:])
    q = _linear(query, weight[:embed_dim], of_query).view(first, second, 1, plan.heads, -1)
    kv = _linear(memory, weight[embed_dim:], of_memory).view(memory.shape[0], memory.shape[1], 2, plan.heads, -1)
    return q.permute(order)[0], *kv.permute(order).unbind()


def _attended(
    plan: Plan, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The heads side by side ``[T, E]`` in the query's layout, the weights, and what the backward reads."""
    weights = None
    if plan.weights == "none":
        attended, kept = _FLASH(q, k, v, 0.0, plan.is_causal, attn_mask=mask)
    else:
        attended, kept = _formula(q, k, v, mask)
        weights = kept.mean(dim=1) if plan.weights == "average" else kept
    merged = attended.transpose(1, 2) if plan.batch_first else attended.permute(2, 0, 1, 3)
    return merged.reshape(-1, q.shape[1] * q.shape[3]), weights, (q, k, v, attended, kept)


def _formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, L, D]`` and weights ``[N, H, L, S]``."""
    shape = query.shape
    # each flat one is gone before the next is made, where that is a copy
    scaled = query.flatten(0, 1) * shape[3] ** -0.5
    if mask is None:
        scores = torch.bmm(scaled, key.flatten(0, 1).mT)
    elif mask.dim() == 2:
        scores = torch.baddbmm(mask, scaled, key.flatten(0, 1).mT)
    else:
        scores = torch.bmm(scaled, key.flatten(0, 1).mT).view(*shape[:3], -1).add_(mask).flatten(0, 1)
    del scaled
    weights = torch.softmax(scores, dim=-1, out=scores)  # in place, as torch's own fused function does it
    return torch.bmm(weights, value.flatten(0, 1)).view(shape), weights.view(*shape[:3], -1)


def _backward_of_formula(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, d_output: Tensor, d_weights: Tensor | None
) -> list[Tensor]:
    """The gradients of query, key and value ``[N, H, length, D]``."""
    batch, heads, _, head_dim = query.shape

    def flat(tensor: Tensor) -> Tensor:  # reshape and not flatten, for which vectorised Jacobians have no rule
        return tensor.reshape(batch * heads, tensor.shape[2], tensor.shape[3])

    weights, d_output, scale = flat(weights), flat(d_output), head_dim**-0.5
    dv = torch.bmm(weights.mT, d_output)
    d_scores = torch.bmm(d_output, flat(value).mT)
    if d_weights is not None:
        of_heads = (d_weights / heads)[:, None] if plan.weights == "average" else d_weights
        d_scores = d_scores.view(batch, heads, *weights.shape[1:]).add_(of_heads).view(weights.shape)
    del d_output, d_weights
    if is_batched(d_scores):
        d_scores = torch._softmax_backward_data(d_scores, weights, -1, query.dtype)
    else:
        _SOFTMAX_BACKWARD(d_scores, weights, -1, query.dtype, grad_input=d_scores)
    dq = torch.bmm(d_scores, flat(key)) * scale
    dk = torch.bmm(d_scores.mT, flat(query) * scale)
    return [t.view(batch, heads, -1, head_dim) for t in (dq, dk, dv)]


def _is_finite(tensor: Tensor) -> bool:
    """Are all elements finite, as far as they can be read?"""
    try:
        return is_finite(tensor)
    except RuntimeError:  # torch.autograd.functional.jacobian(vectorize=True) batches gradients
        return True
