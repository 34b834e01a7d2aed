"""Attention in plain torch, a block of rows at a time, so that the [B, H, L, S] intermediates are never whole.

The torch backend runs here whatever its other paths do not: weights, softcap, functions, the gradients of biases, of
slopes and of the LSE; what tiles of torch's kernel can make (``flash``) is left to them. On a CPU the matrix products
take most of the time, and the rest is arranged to stay small beside them:

* query heads that share a key head are rows of one product;
* keys that no row of a block may see are left out of it (``cutting``), so that a causal call does about half the work
  and one with a window about the window's;
* the other hidden scores get ``-inf`` by an addition, since ``masked_fill`` takes as long as a product; what is added
  is made once for all heads of a block;
* the heads of a block have their turn a few at a time, so that their scores stay in a core's own cache from the first
  product to the last, and every pass over them is in place, in memory that all blocks share: pages that are touched for
  the first time would cost as much as a pass over them;
* booleans are read as bytes, which torch reduces and converts five to ten times faster.

Everything is computed in float32, or in float64 where the query or something that is added to the scores is float64.

Hidden positions may hold NaN, inf, or finite numbers whose products overflow. ``0 * NaN`` is NaN, so that these would
reach the results. Both passes therefore check whether their results are finite. If they are not, and the call hides
anything, they run again in a careful form, in which a weight of 0 times anything is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention import flash
from fastattn.ops.attention.contract import (
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
    Results,
    weights_shape,
)
from fastattn.ops.attention.cutting import batches, blocks, cut
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.attention.functions.sums import CapturedGradients
from fastattn.ops.attention.scores import Scratch, added_to, compute_dtype, heads_as_rows, scores_of, turns
from fastattn.ops.common.blocks import SCORES, empty_in_order_of, statistics_dtype
from fastattn.ops.common.checks import without_autocast
from fastattn.ops.common.finite import is_finite
from fastattn.reference.attention import NEGATIVE_INFINITY

# With fewer scores to a head, heads are added up by one reduction, and otherwise head by head, in a fifth of the time.
_LONG_HEAD = 1 << 13


# -------------------------------------------------------------------------------------------------------- hidden values


def _hides(inputs: Inputs, options: Options) -> bool:
    """May there be keys that a row does not see?"""
    hiding = (inputs.bias, inputs.mask, inputs.key_padding_mask, inputs.query_documents, options.lower, options.upper)
    return any(argument is not None for argument in hiding) or bool(options.score_mod or options.mask_mod)


def _product(left: Tensor, right: Tensor, careful: bool) -> Tensor:
    """``left @ right``; if ``careful``, a 0 on the left times NaN or inf on the right is 0, so that hidden pairs add
    nothing."""
    finite = right.isfinite() if careful else None
    if finite is None or bool(finite.all()):
        return torch.bmm(left, right)
    result = torch.bmm(left, right.where(finite, 0))
    above, below = (left > 0).to(right.dtype), (left < 0).to(right.dtype)
    plus, minus = (right == math.inf).to(right.dtype), (right == NEGATIVE_INFINITY).to(right.dtype)
    result = torch.where(torch.bmm(above, plus) + torch.bmm(below, minus) > 0, result + math.inf, result)
    result = torch.where(torch.bmm(above, minus) + torch.bmm(below, plus) > 0, result - math.inf, result)
    return torch.where(torch.bmm(above + below, right.isnan().to(right.dtype)) > 0, math.nan, result)


def _add_product(total: Tensor, left: Tensor, right: Tensor, careful: bool) -> None:
    """``total += left @ right``, as :func:`_product` takes it."""
    if careful:
        total += _product(left, right, careful)
    else:
        total.baddbmm_(left, right)


# ----------------------------------------------------------------------------------------------------- one block's work


def _softmax(scores: Tensor, empty: Tensor | None) -> Tensor:
    """Over the keys, in place; 0 in the rows that are ``empty``."""
    p = torch.softmax(scores, dim=-1, out=scores)
    return p.masked_fill_(empty, 0) if empty is not None and bool(empty.any()) else p


def _sink_over_keys(top: Tensor, peak: Tensor, sinks: Tensor) -> Tensor:
    """How large the sink's term of each row's denominator is beside those of the keys together, ``[b, h, n, 1]``, from
    the row's largest score and largest weight; inf in a row that sees no key."""
    ratio = (sinks[..., None, None].to(top.dtype) - top).exp() * peak
    return ratio.nan_to_num_(nan=math.inf, posinf=math.inf)  # NaN: inf * 0, where no key is seen


def _dropped(weights: Tensor, own: Inputs, scratch: Scratch) -> Tensor:
    """The weights that dropout keeps, not yet scaled up."""
    if own.dropout_state is None:
        return weights
    return torch.mul(weights, own.dropout_state.view(torch.uint8), out=scratch.empty("dropped", *weights.shape))


def _cleared(gradient: Tensor, visible: Tensor | None) -> Tensor:
    """In the careful form the gradient, in place, with 0 where the row may not see the key."""
    return gradient if visible is None else gradient.masked_fill_(~visible, 0)


def _keep_scale(options: Options) -> float:
    return 1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else 0.0


def _add_heads(total: Tensor, weights: Tensor, is_first: bool) -> None:
    """``total += weights.sum(1)``; ``total = weights.sum(1)`` of the first heads."""
    if weights[0, 0].numel() < _LONG_HEAD:
        total.copy_(weights.sum(dim=1)) if is_first else total.add_(weights.sum(dim=1))
        return
    for number, head in enumerate(weights.unbind(1)):
        total.copy_(head) if is_first and number == 0 else total.add_(head)


# -------------------------------------------------------------------------------------------------------- the operators


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """What :func:`cut` makes the kept weights of a block from: here the dropout state itself."""
    assert inputs.dropout_state is not None
    return inputs.dropout_state


def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::attention_forward``; the statistics are the LSE again."""
    with without_autocast(inputs.query.device):
        if flash.takes(inputs, options):
            (output, lse), weights = flash.forward(inputs, options), inputs.query.new_empty(0)
        else:
            output, lse, weights = _forward(inputs, options, careful=False)
        if _hides(inputs, options) and not is_finite(output):
            output, lse, weights = _forward(inputs, options, careful=True)
    return Results(output, lse, weights, statistics=lse.clone())  # an operator may not return one tensor twice


def _forward(inputs: Inputs, options: Options, careful: bool) -> tuple[Tensor, Tensor, Tensor]:
    query, sinks, statistics = inputs.query, inputs.sinks, statistics_dtype(inputs.query.dtype)
    compute, heads, kv_heads = compute_dtype(inputs, options), query.shape[1], inputs.key.shape[1]
    hides, looks, keep_scale = _hides(inputs, options), query.device.type == "cpu", _keep_scale(options)
    measured = options.keeps_statistics or sinks is not None
    scratch = Scratch(query, compute)
    output = empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3]))
    lse = query.new_full(query.shape[:3], math.nan, dtype=statistics)
    weights = query.new_empty(weights_shape(query, inputs.key, options.weights))
    if hides or not (inputs.key.shape[2] and heads):  # the blocks leave out what nobody sees
        output.zero_(), weights.zero_()
        lse.copy_(sinks[..., None]) if sinks is not None else lse.fill_(NEGATIVE_INFINITY)

    for batch in batches(inputs, options):
        keys, values = (heads_as_rows(t[batch], kv_heads, compute) for t in (inputs.key, inputs.value))
        for block in blocks(inputs, options, batch, looks=looks, in_turns=True):
            whole, rules = cut(block, inputs, options)
            places = functions.places_of(block, heads, options, query.device) if rules.score_mod else None
            for_all = added_to(whole, rules, compute, places, careful)
            output_rows, lse_rows = output[batch, :, block.rows], lse[batch, :, block.rows]
            average, total = None, None
            if options.weights == "average":
                average = weights[batch, block.rows, block.keys]
                same = average.dtype == compute
                total = average if same else scratch.empty("average", *average.shape)
            for turn in turns(whole, kv_heads):
                own, added = turn.of_inputs(whole), turn.of_added(for_all)
                own_kv_heads = kv_heads * own.query.shape[1] // heads
                queries = heads_as_rows(own.query, own_kv_heads, compute) * options.scale
                made = scores_of(queries, turn.of_keys(keys, block.keys), own, rules, added, scratch, keeps=False)
                scores = made.scores
                top = scores.amax(dim=-1, keepdim=True) if hides or measured else scores[..., :1]
                p = _softmax(scores, top == NEGATIVE_INFINITY if hides else None)
                if measured:
                    # exp(top - lse) is the row's largest weight, or 0 in a row that sees nothing
                    peak = p.amax(dim=-1, keepdim=True)
                    own_lse = top - peak.where(peak > 0, 1).log()
                    if own.sinks is not None:
                        own_lse = torch.logaddexp(own_lse, own.sinks[..., None, None].to(compute))
                        p.mul_(_sink_over_keys(top, peak, own.sinks).add_(1).reciprocal_())
                    turn.of(lse_rows).copy_(own_lse.squeeze(-1))

                p = _dropped(p, own, scratch)
                rows_out = _product(p.view(*queries.shape[:2], -1), turn.of_keys(values, block.keys), careful)
                if inputs.dropout_state is not None:
                    rows_out *= keep_scale
                turn.of(output_rows).copy_(rows_out.view(*p.shape[:3], -1))
                if total is not None:
                    _add_heads(total, p, turn.query is None or turn.query.start == 0)
                elif options.weights == "heads":
                    p = p if inputs.dropout_state is None else p.mul_(keep_scale)
                    turn.of(weights[batch])[:, :, block.rows, block.keys] = p.to(weights.dtype)
            if average is not None and total is not None:
                total.mul_(keep_scale / heads)
                if total is not average:
                    average.copy_(total)
    return output, lse, weights


def backward(
    gradients: OutputGradients,
    kept: Kept,
    needs: Needs,
    inputs: Inputs,
    options: Options,
    *,
    delta: Tensor | None = None,
) -> InputGradients:
    """The contract of ``fastattn::attention_backward``. Where ``d_weights_may_be_zeros`` they are added all the same:
    that is one addition here.

    With ``delta``, ``rowsum(dO * O) - dLSE`` of every row, the call is a part of another: what is kept belongs to rows
    that see more keys than the call has.
    """
    with without_autocast(inputs.query.device):
        results = _of_flash(gradients, kept, needs, inputs, options)
        if results is None:
            results = _backward(gradients, kept.statistics, needs, inputs, options, careful=False, delta=delta)
        if _hides(inputs, options) and not is_finite(*results):
            results = _backward(gradients, kept.statistics, needs, inputs, options, careful=True, delta=delta)
    return results


def _of_flash(
    gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs, options: Options
) -> InputGradients | None:
    """The gradients by tiles of torch's kernel; None where these cannot make all that are needed."""
    d_output, d_lse, d_weights = gradients
    if not (d_lse is d_weights is None) or needs.needs_d_bias or needs.needs_d_alibi_slopes:
        return None
    if not flash.takes_backward(inputs, options, kept.statistics):
        return None
    made = flash.backward(d_output, kept.output, kept.statistics, inputs, options)
    nothing = inputs.query.new_empty(0)
    d_sinks = made.d_sinks if needs.needs_d_sinks and made.d_sinks is not None else nothing
    plain = InputGradients(made.d_query, made.d_key, made.d_value, nothing, nothing, d_sinks)
    return CapturedGradients(inputs, options, needs).found(plain) if options.mask_mod else plain


def _backward(
    gradients: OutputGradients,
    lse: Tensor,
    needs: Needs,
    inputs: Inputs,
    options: Options,
    careful: bool,
    delta: Tensor | None,
) -> InputGradients:
    d_output, d_lse, d_weights = gradients
    query, sinks, statistics = inputs.query, inputs.sinks, statistics_dtype(inputs.query.dtype)
    compute, heads, kv_heads = compute_dtype(inputs, options), query.shape[1], inputs.key.shape[1]
    hides, looks, keep_scale = _hides(inputs, options), query.device.type == "cpu", _keep_scale(options)
    scratch = Scratch(query, compute)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (query, inputs.key, inputs.value))
    if hides or not (d_query.numel() and d_key.numel()):
        d_query.zero_(), d_key.zero_(), d_value.zero_()
    d_bias = _zeros_like(inputs.bias, needs.needs_d_bias, statistics)
    d_alibi_slopes = _zeros_like(inputs.alibi_slopes, needs.needs_d_alibi_slopes, statistics)
    d_sinks = _zeros_like(sinks, needs.needs_d_sinks, statistics)
    of_captured = CapturedGradients(inputs, options, needs)
    # exp(score - inf) is the weight 0 of a row that sees nothing, whatever its scores are
    ceiling = None if delta is None else lse.masked_fill(lse == NEGATIVE_INFINITY, math.inf)
    # A sink's weight in each row, 1 where the row sees no key, and the mean of dP under the keys' weights
    sink_weight, means = (None, None) if d_sinks is None else (torch.ones_like(lse), torch.zeros_like(lse))
    # The average's gradient reaches every head, divided; and dropout scales what reaches a kept weight.
    d_weights_scale = keep_scale / max(heads, 1) if options.weights == "average" else keep_scale
    if d_weights is not None and options.weights == "average":
        d_weights = d_weights[:, None]

    for batch in batches(inputs, options):
        keys, values = (heads_as_rows(t[batch], kv_heads, compute) for t in (inputs.key, inputs.value))
        d_keys, d_values = (torch.zeros_like(t) for t in (keys, values))
        for block in blocks(inputs, options, batch, looks=looks, in_turns=True):
            whole, rules = cut(block, inputs, options)
            places = functions.places_of(block, heads, options, query.device) if rules.score_mod else None
            for_all = added_to(whole, rules, compute, places, careful)
            of_weights = None if d_weights is None else block.of(d_weights, SCORES)
            for turn in turns(whole, kv_heads):
                own, added = turn.of_inputs(whole), turn.of_added(for_all)
                own_kv_heads = kv_heads * own.query.shape[1] // heads
                own_keys, own_values = turn.of_keys(keys, block.keys), turn.of_keys(values, block.keys)
                queries = heads_as_rows(own.query, own_kv_heads, compute) * options.scale
                d_rows = heads_as_rows(turn.of(d_output[batch, :, block.rows]), own_kv_heads, compute)
                if inputs.dropout_state is not None:
                    d_rows = d_rows * keep_scale
                scores, bent, unmodified, visible = scores_of(queries, own_keys, own, rules, added, scratch, keeps=True)
                if ceiling is not None:
                    p = scores.sub_(turn.of(ceiling[batch, :, block.rows, None]).to(scores.dtype)).exp_()
                elif own.sinks is None:
                    empty = turn.of(lse[batch, :, block.rows, None]) == NEGATIVE_INFINITY if hides else None
                    p = _softmax(scores, empty)
                else:
                    top = scores.amax(dim=-1, keepdim=True)
                    p = _softmax(scores, top == NEGATIVE_INFINITY if hides else None)
                    ratio = _sink_over_keys(top, p.amax(dim=-1, keepdim=True), own.sinks)
                    p.mul_((1 + ratio).reciprocal_())
                    if sink_weight is not None:
                        of_rows = (1 + 1 / ratio).reciprocal_().squeeze(-1)
                        turn.of(sink_weight[batch, :, block.rows]).copy_(of_rows)
                flat = (*queries.shape[:2], p.shape[3])
                d_own_values = turn.of_keys(d_values, block.keys)
                _add_product(d_own_values, _dropped(p, own, scratch).view(flat).mT, d_rows, careful)

                dp = scratch.product("dp", d_rows, own_values.mT).view(p.shape)
                if of_weights is not None:
                    dp.add_(turn.of(of_weights), alpha=d_weights_scale)
                dp = _cleared(_dropped(dp, own, scratch), visible)
                if means is not None:
                    turn.of(means[batch, :, block.rows]).copy_(torch.linalg.vecdot(p, dp))
                if delta is not None:
                    ds = _cleared(dp.sub_(turn.of(delta[batch, :, block.rows, None]).to(p.dtype)).mul_(p), visible)
                else:
                    ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
                if d_lse is not None and delta is None:
                    of_rows = turn.of(d_lse[batch, :, block.rows, None]).to(p.dtype)
                    ds = _cleared(ds.addcmul_(p, of_rows), visible)
                if d_bias is not None:
                    of_bias = turn.of(block.of(d_bias, SCORES))
                    of_bias += ds.sum_to_size(of_bias.shape)
                if d_alibi_slopes is not None and added.distances is not None:
                    of_slopes = turn.of(block.of(d_alibi_slopes, ("batch",)))
                    by_head = (ds * added.distances).sum(dim=-1).sum(dim=-1).to(d_alibi_slopes.dtype)
                    of_slopes -= by_head.sum_to_size(of_slopes.shape)
                if added.places is not None:
                    read = functions.read_by_score_mod(inputs, options)
                    ds, d_reads = functions.pulled_back(ds, unmodified, added.places, rules.score_mod, read)
                    ds = _cleared(ds, visible)
                    for number, _ in of_captured.accesses:
                        of_read = _cleared(d_reads[number].expand(ds.shape).clone(), visible)
                        of_captured.add(number, of_read, added.places)
                if bent is not None:
                    ds = _cleared(torch.ops.aten.tanh_backward(ds, bent), visible)
                ds = ds.view(flat)
                d_rows = _product(ds, own_keys, careful).mul_(options.scale)
                turn.of(d_query[batch, :, block.rows]).copy_(d_rows.view(*p.shape[:3], -1))
                _add_product(turn.of_keys(d_keys, block.keys), ds.mT, queries, careful)
        d_key[batch] = d_keys.view(d_key[batch].shape).to(d_key.dtype)
        d_value[batch] = d_values.view(d_value[batch].shape).to(d_value.dtype)

    if d_sinks is not None and sinks is not None and sink_weight is not None and means is not None:
        of_rows = sink_weight * ((0 if d_lse is None else d_lse) - means)
        of_rows = of_rows.where(sinks[..., None] != NEGATIVE_INFINITY, 0)  # a sink of -inf is none
        d_sinks += of_rows.sum(dim=-1).sum_to_size(d_sinks.shape)
    optional = ((d_bias, inputs.bias), (d_alibi_slopes, inputs.alibi_slopes), (d_sinks, sinks))
    found = (query.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in optional)
    plain = InputGradients(d_query, d_key, d_value, *found)
    return of_captured.found(plain) if options.score_mod or options.mask_mod else plain


def _zeros_like(tensor: Tensor | None, needed: bool, at_least: torch.dtype) -> Tensor | None:
    """What the gradient of an optional input is added up in; None where it is not needed."""
    if tensor is None or not needed:
        return None
    return tensor.new_zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, at_least))
