"""Attention in plain torch, a block of rows at a time, so that the [B, H, L, S] intermediates are never whole.

The torch backend runs here what ``F.scaled_dot_product_attention`` cannot express: weights, the LSE, windows,
documents, ALiBi, softcap, sinks, the gradients of all of them, and masks that torch would first expand to ``[L, S]``.
On a CPU the matrix products take most of the time, and the rest is arranged to stay small beside them: query heads that
share a key head are rows of one product; keys that no row of a block may see are left out of it, so that a causal call
does about half the work and one with a window about the window's; the other hidden scores get ``-inf`` by an addition,
since ``masked_fill`` takes as long as a product; and booleans are read as bytes, which torch reduces and converts five
to ten times faster.

Everything is computed in float32, or in float64 where the query or something that is added to the scores is float64.

Hidden positions may hold NaN, inf, or finite numbers whose products overflow. ``0 * NaN`` is NaN, so that these would
reach the results. Both passes therefore check whether their results are finite. If they are not, and the call hides
anything, they run again in a careful form, in which a weight of 0 times anything is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import dropout
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
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.attention.functions.sums import CapturedGradients
from fastattn.ops.common.blocks import OF_KEYS, OF_ROWS, SCORES, Axes, Block, empty_in_order_of, statistics_dtype
from fastattn.ops.common.checks import without_autocast
from fastattn.reference import distances, visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block of scores. 2^20 float32 (4 MiB) stay in the outer caches between the products.
BLOCK_ELEMENTS = 1 << 20
# However narrow the window, a block has at least this many rows: with fewer the cost of its calls dominates.
_LEAST_ROWS = 64

_AXES_BY_NAME: dict[str, Axes] = {
    "query": OF_ROWS,
    "key": OF_KEYS,
    "value": OF_KEYS,
    "bias": SCORES,
    "alibi_slopes": ("batch",),
    "sinks": ("batch",),
    "mask": SCORES,
    "key_padding_mask": ("batch", "keys"),
    "query_documents": ("batch", "rows"),
    "key_documents": ("batch", "keys"),
    "prefix": ("batch",),
    "dropout_state": SCORES,
}


def axes_of(names: Iterable[str]) -> tuple[Axes, ...]:
    """How inputs of these names follow the blocks; what functions read is whole in every block."""
    return tuple(_AXES_BY_NAME.get(name, ()) for name in names)


# -------------------------------------------------------------------------------------------------- cutting into blocks


def cut(block: Block, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """The call that a block is by itself; its dropout state is the block's kept weights, and what a mask_mod says of
    its pairs is part of its mask."""
    own: list[Any] = [t if t is None else block.of(t, axes) for t, axes in zip(inputs, axes_of(inputs._fields))]
    tensors = type(inputs)(*own)
    if options.mask_mod:
        places = functions.places_of(block, inputs.query.shape[1], options, inputs.query.device)
        seen = functions.visible(places, options.mask_mod, functions.read_by_mask_mod(inputs, options))
        tensors = tensors._replace(mask=seen if tensors.mask is None else tensors.mask & seen)
    if tensors.dropout_state is not None and dropout.is_seed(tensors.dropout_state):
        kept = dropout.kept(
            tensors.dropout_state, options.dropout_p, inputs.query.shape[1], block.batch, block.rows, block.keys
        )
        tensors = tensors._replace(dropout_state=kept)
    row, key = block.rows.start, block.keys.start
    if tensors.prefix is not None and key:
        tensors = tensors._replace(prefix=tensors.prefix - key)
    return tensors, options._replace(
        lower=None if options.lower is None else options.lower + row - key,
        upper=None if options.upper is None else options.upper + row - key,
        shift=options.shift + row - key,
        mask_mod="",
    )


def batches(inputs: Inputs, options: Options) -> Iterator[slice]:
    """Whole batch entries together while they fit a block, else one at a time."""
    batch, heads, length = inputs.query.shape[:3]
    elements = heads * length * _span(inputs, options)[1]
    if elements:
        entries = max(1, BLOCK_ELEMENTS // elements)
        yield from (slice(b, min(b + entries, batch)) for b in range(0, batch, entries))


def blocks(inputs: Inputs, options: Options, batch: slice, *, looks: bool, skips: bool = True) -> Iterator[Block]:
    """The blocks of some batch entries.

    The band of lower and upper decides which keys are left out; if ``looks``, so do the values of masks, documents and
    prefixes. A block whose rows see nothing is left out if ``skips``, and otherwise has one key, hidden from its rows.
    """
    heads, length = inputs.query.shape[1:3]
    most_rows, keys = _span(inputs, options)
    rows = max(1, min(length, most_rows, BLOCK_ELEMENTS // (heads * keys)))
    for row in range(0, length, rows):
        block = Block(batch, slice(row, min(row + rows, length)), slice(0, inputs.key.shape[2]))
        block = block._replace(keys=keys_of_band(inputs, options, block, looks))
        if looks and block.keys.start < block.keys.stop:
            block = block._replace(keys=_keys_of_masks(inputs, options, block))
        if block.keys.start < block.keys.stop:
            yield block
        elif not skips:
            yield block._replace(keys=slice(0, 1))


def _span(inputs: Inputs, options: Options) -> tuple[int, int]:
    """How many rows a block has at most, and how many keys then."""
    length, keys = inputs.query.shape[2], inputs.key.shape[2]
    if options.lower is None or options.upper is None or inputs.prefix is not None:
        return length, keys
    width = max(_LEAST_ROWS, options.upper - options.lower + 1)
    return width, min(keys, 2 * width)  # with as many rows as the band is wide, half of the block is visible


def keys_of_band(inputs: Inputs, options: Options, block: Block, looks: bool) -> slice:
    """From the first to the last key that band and prefix let some row of the block see."""
    start, stop = 0, block.keys.stop
    if options.lower is not None and inputs.prefix is None:
        start = max(start, block.rows.start + options.lower)
    if options.upper is not None:
        stop = block.rows.stop + options.upper
        if inputs.prefix is not None:
            stop = max(stop, int(inputs.prefix.max())) if looks else block.keys.stop
    return slice(start, min(stop, block.keys.stop))


def _keys_of_masks(inputs: Inputs, options: Options, block: Block) -> slice:
    """From the first to the last of the block's keys that every mask lets some row of it see."""
    start, stop = block.keys.start, block.keys.stop
    for visible in _masks(cut(block, inputs._replace(dropout_state=None), options)[0]):
        if visible.shape[3] != 1:
            seen = visible.view(torch.uint8).amax((0, 1, 2)).nonzero()
            if not len(seen):
                return slice(0, 0)
            start, stop = max(start, block.keys.start + int(seen[0])), min(stop, block.keys.start + int(seen[-1]) + 1)
    return slice(start, stop)


def _masks(inputs: Inputs) -> Iterator[Tensor]:
    """Boolean tensors that broadcast to the scores; a key is visible where all of them are True."""
    if inputs.mask is not None:
        yield inputs.mask
    if inputs.key_padding_mask is not None:
        yield ~inputs.key_padding_mask[:, None, None, :]
    if inputs.query_documents is not None and inputs.key_documents is not None:
        yield inputs.query_documents[:, None, :, None] == inputs.key_documents[:, None, None, :]


# -------------------------------------------------------------------------------------------------------- hidden values


def _hides(inputs: Inputs, options: Options) -> bool:
    """May there be keys that a row does not see?"""
    hiding = (inputs.bias, inputs.mask, inputs.key_padding_mask, inputs.query_documents, options.lower, options.upper)
    return any(argument is not None for argument in hiding) or bool(options.score_mod or options.mask_mod)


def _visible(own: Inputs, options: Options) -> Tensor:
    """Boolean ``[b | 1, H | 1, n, s]``: which rows of a block see which keys, additive masks of ``-inf`` included."""
    visible = visibility(
        own.query.shape[2],
        own.key.shape[2],
        lower=options.lower,
        upper=options.upper,
        prefix=own.prefix,
        mask=own.mask,
        key_padding_mask=own.key_padding_mask,
        query_documents=own.query_documents,
        key_documents=own.key_documents,
        device=own.query.device,
    )
    return visible if own.bias is None else visible & (own.bias != NEGATIVE_INFINITY)


def _all_finite(*tensors: Tensor) -> bool:
    """Is every element finite, and the sum of each tensor too?"""
    return math.isfinite(sum(t.sum(dtype=statistics_dtype(t.dtype)).item() for t in tensors))


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


def _compute_dtype(inputs: Inputs, options: Options) -> torch.dtype:
    """The dtype that a block is computed in, at least float32.

    Products of 16-bit tensors would round scores to 16 bits (by up to 0.06 at 30 in bfloat16) and overflow float16 at
    65504; torch's own kernel keeps them in float32 too. On a CPU the conversion costs large blocks a tenth of their
    time, and makes small ones three times as fast, since float16 and bfloat16 have no fast path there.
    """
    dtype = statistics_dtype(inputs.query.dtype)
    read = functions.read_by_score_mod(inputs, options) if options.score_mod else []
    for added in (inputs.bias, inputs.alibi_slopes, *read):
        if added is not None and added.is_floating_point():
            dtype = torch.promote_types(dtype, added.dtype)
    return dtype


def _heads_as_rows(tensor: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, n, D]`` as ``[B * Hk, H / Hk * n, D]``: the query heads of one key head under one another."""
    batch, heads, rows, size = tensor.shape
    return tensor.reshape(batch * kv_heads, heads // kv_heads * rows, size).to(dtype)


def _products(queries: Tensor, keys: Tensor, own: Inputs, options: Options) -> tuple[Tensor, Tensor | None]:
    """Capped products ``[b, H, n, s]`` of queries that are scaled already, and the hyperbolic tangent that capped them,
    None without a cap. The backward takes the slope from the tangent: from the product it has one rounding more."""
    scores = torch.bmm(queries, keys.mT).view(*own.query.shape[:3], -1)
    if options.softcap is None:
        return scores, None
    bent = scores.div_(options.softcap).tanh_()
    return bent * options.softcap, bent


def _distances(scores: Tensor, options: Options) -> Tensor:
    """``[n, s]``, in float32 or better: float16 ends at 65504."""
    dtype = statistics_dtype(scores.dtype)
    return distances(scores.shape[2], scores.shape[3], options.shift, scores.device).to(dtype)


def _masked(scores: Tensor, own: Inputs, options: Options, visible: Tensor | None) -> Tensor:
    """The scores, in place, with bias and ALiBi added, and ``-inf`` where the row may not see the key. The careful form
    fills in ``-inf`` by ``visible``; otherwise the masks are added, which is right while all scores are finite."""
    if own.bias is not None:
        scores.add_(own.bias if visible is None else own.bias.where(visible, 0))
    if own.alibi_slopes is not None:
        scores.sub_(own.alibi_slopes[..., None, None] * _distances(scores, options))
    if visible is not None:
        return scores.masked_fill_(~visible, NEGATIVE_INFINITY)
    rows, keys = scores.shape[2:]
    if options.upper is not None:
        start = max(0, options.upper + 1)  # the first key that the first row may not see
        if start < keys:
            seen = visibility(
                rows,
                keys - start,
                upper=options.upper - start,
                prefix=None if own.prefix is None else own.prefix - start,
                device=scores.device,
            )
            _hide(scores[..., start:], seen)
    if options.lower is not None:
        stop = min(keys, rows - 1 + options.lower)  # one past the last key that the last row may not see
        if stop > 0:
            seen = visibility(rows, stop, lower=options.lower, prefix=own.prefix, device=scores.device)
            _hide(scores[..., :stop], seen)
    for seen in _masks(own):
        _hide(scores, seen)
    return scores


def _hide(scores: Tensor, visible: Tensor) -> None:
    """Make ``-inf`` of finite scores that are not visible, in place."""
    # 1 - 1/x maps 1 to 0 and 0 to -inf
    scores.add_(visible.view(torch.uint8).to(scores.dtype).reciprocal_().neg_().add_(1))


def _softmax(scores: Tensor, empty: Tensor | None) -> Tensor:
    """Over the keys; 0 in the rows that are ``empty``."""
    p = torch.softmax(scores, dim=-1)
    return p.masked_fill_(empty, 0) if empty is not None and bool(empty.any()) else p


def _sink_over_keys(top: Tensor, peak: Tensor, sinks: Tensor) -> Tensor:
    """How large the sink's term of each row's denominator is beside those of the keys together, ``[b, H, n, 1]``, from
    the row's largest score and largest weight; inf in a row that sees no key."""
    ratio = (sinks[..., None, None].to(top.dtype) - top).exp() * peak
    return ratio.nan_to_num_(nan=math.inf, posinf=math.inf)  # NaN: inf * 0, where no key is seen


def _dropped(weights: Tensor, own: Inputs) -> Tensor:
    """The weights that dropout keeps, not yet scaled up."""
    return weights if own.dropout_state is None else weights * own.dropout_state.view(torch.uint8)


def _cleared(gradient: Tensor, visible: Tensor | None) -> Tensor:
    """In the careful form the gradient, in place, with 0 where the row may not see the key."""
    return gradient if visible is None else gradient.masked_fill_(~visible, 0)


def _keep_scale(options: Options) -> float:
    return 1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else 0.0


# -------------------------------------------------------------------------------------------------------- the operators


def dropout_keep(inputs: Inputs, options: Options) -> Tensor:
    """What :func:`cut` makes the kept weights of a block from: here the dropout state itself."""
    assert inputs.dropout_state is not None
    return inputs.dropout_state


def forward(inputs: Inputs, options: Options) -> Results:
    """The contract of ``fastattn::attention_forward``; the statistics are the LSE again."""
    with without_autocast(inputs.query.device):
        output, lse, weights = _forward(inputs, options, careful=False)
        if _hides(inputs, options) and not _all_finite(output):
            output, lse, weights = _forward(inputs, options, careful=True)
    return Results(output, lse, weights, statistics=lse.clone())  # an operator may not return one tensor twice


def _forward(inputs: Inputs, options: Options, careful: bool) -> tuple[Tensor, Tensor, Tensor]:
    query, sinks, statistics = inputs.query, inputs.sinks, statistics_dtype(inputs.query.dtype)
    compute, heads, kv_heads = _compute_dtype(inputs, options), query.shape[1], inputs.key.shape[1]
    hides, looks, keep_scale = _hides(inputs, options), query.device.type == "cpu", _keep_scale(options)
    output = empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3]))
    lse = query.new_full(query.shape[:3], math.nan, dtype=statistics)
    weights = query.new_empty(weights_shape(query, inputs.key, options.weights))
    if hides or not (inputs.key.shape[2] and heads):  # the blocks leave out what nobody sees
        output.zero_(), weights.zero_()
        lse.copy_(sinks[..., None]) if sinks is not None else lse.fill_(NEGATIVE_INFINITY)

    for batch in batches(inputs, options):
        keys, values = (_heads_as_rows(t[batch], kv_heads, compute) for t in (inputs.key, inputs.value))
        for block in blocks(inputs, options, batch, looks=looks):
            own, rules = cut(block, inputs, options)
            queries = _heads_as_rows(own.query, kv_heads, compute) * options.scale
            visible = _visible(own, rules) if careful else None
            scores, _ = _products(queries, keys[:, block.keys], own, rules)
            if rules.score_mod:
                scores, visible = functions.modified_of(scores, block, own, rules, visible)
            scores = _masked(scores, own, rules, visible)
            measured = options.keeps_statistics or sinks is not None
            top = scores.amax(dim=-1, keepdim=True) if hides or measured else scores[..., :1]
            p = _softmax(scores, top == NEGATIVE_INFINITY if hides else None)
            if measured:
                # exp(top - lse) is the row's largest weight, or 0 in a row that sees nothing
                peak = p.amax(dim=-1, keepdim=True)
                block_lse = top - peak.where(peak > 0, 1).log()
                if own.sinks is not None:
                    block_lse = torch.logaddexp(block_lse, own.sinks[..., None, None].to(compute))
                    p.mul_(_sink_over_keys(top, peak, own.sinks).add_(1).reciprocal_())
                lse[batch, :, block.rows] = block_lse.squeeze(-1).to(statistics)

            p = _dropped(p, own)
            rows_out = _product(p.view(*queries.shape[:2], -1), values[:, block.keys], careful)
            if inputs.dropout_state is not None:
                rows_out *= keep_scale
            output[batch, :, block.rows] = rows_out.view(*p.shape[:3], -1).to(output.dtype)
            if options.weights == "average":
                weights[batch, block.rows, block.keys] = p.sum(dim=1).mul_(keep_scale / heads).to(weights.dtype)
            elif options.weights == "heads":
                p = p if inputs.dropout_state is None else p.mul_(keep_scale)
                weights[batch, :, block.rows, block.keys] = p.to(weights.dtype)
    return output, lse, weights


def backward(gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs, options: Options) -> InputGradients:
    """The contract of ``fastattn::attention_backward``. Where ``d_weights_may_be_zeros`` they are added all the same:
    that is one addition here."""
    with without_autocast(inputs.query.device):
        results = _backward(gradients, kept.statistics, needs, inputs, options, careful=False)
        if _hides(inputs, options) and not _all_finite(*results):
            results = _backward(gradients, kept.statistics, needs, inputs, options, careful=True)
    return results


def _backward(
    gradients: OutputGradients, lse: Tensor, needs: Needs, inputs: Inputs, options: Options, careful: bool
) -> InputGradients:
    d_output, d_lse, d_weights = gradients
    query, sinks, statistics = inputs.query, inputs.sinks, statistics_dtype(inputs.query.dtype)
    compute, heads, kv_heads = _compute_dtype(inputs, options), query.shape[1], inputs.key.shape[1]
    hides, looks, keep_scale = _hides(inputs, options), query.device.type == "cpu", _keep_scale(options)
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (query, inputs.key, inputs.value))
    if hides or not (d_query.numel() and d_key.numel()):
        d_query.zero_(), d_key.zero_(), d_value.zero_()
    d_bias = _zeros_like(inputs.bias, needs.needs_d_bias, statistics)
    d_alibi_slopes = _zeros_like(inputs.alibi_slopes, needs.needs_d_alibi_slopes, statistics)
    d_sinks = _zeros_like(sinks, needs.needs_d_sinks, statistics)
    of_captured = CapturedGradients(inputs, options, needs)
    # A sink's weight in each row, 1 where the row sees no key, and the mean of dP under the keys' weights
    sink_weight, means = (None, None) if d_sinks is None else (torch.ones_like(lse), torch.zeros_like(lse))
    # The average's gradient reaches every head, divided; and dropout scales what reaches a kept weight.
    d_weights_scale = keep_scale / max(heads, 1) if options.weights == "average" else keep_scale
    if d_weights is not None and options.weights == "average":
        d_weights = d_weights[:, None]

    for batch in batches(inputs, options):
        keys, values = (_heads_as_rows(t[batch], kv_heads, compute) for t in (inputs.key, inputs.value))
        d_keys, d_values = (torch.zeros_like(t) for t in (keys, values))
        for block in blocks(inputs, options, batch, looks=looks):
            own, rules = cut(block, inputs, options)
            queries = _heads_as_rows(own.query, kv_heads, compute) * options.scale
            d_rows = _heads_as_rows(d_output[batch, :, block.rows], kv_heads, compute)
            if inputs.dropout_state is not None:
                d_rows = d_rows * keep_scale
            visible = _visible(own, rules) if careful else None
            scores, bent = _products(queries, keys[:, block.keys], own, rules)
            unmodified = scores
            if rules.score_mod:
                scores, visible = functions.modified_of(scores, block, own, rules, visible)
            scores = _masked(scores, own, rules, visible)
            if own.sinks is None:
                p = _softmax(scores, lse[batch, :, block.rows, None] == NEGATIVE_INFINITY if hides else None)
            else:
                top = scores.amax(dim=-1, keepdim=True)
                p = _softmax(scores, top == NEGATIVE_INFINITY if hides else None)
                ratio = _sink_over_keys(top, p.amax(dim=-1, keepdim=True), own.sinks)
                p.mul_((1 + ratio).reciprocal_())
                if sink_weight is not None:
                    sink_weight[batch, :, block.rows] = (1 + 1 / ratio).reciprocal_().squeeze(-1).to(statistics)
            flat = (*queries.shape[:2], p.shape[3])
            _add_product(d_values[:, block.keys], _dropped(p, own).view(flat).mT, d_rows, careful)

            dp = torch.bmm(d_rows, values[:, block.keys].mT).view(p.shape)
            if d_weights is not None:
                dp.add_(block.of(d_weights, SCORES), alpha=d_weights_scale)
            dp = _cleared(_dropped(dp, own), visible)
            if means is not None:
                means[batch, :, block.rows] = torch.linalg.vecdot(p, dp).to(statistics)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if d_lse is not None:
                ds = _cleared(ds.addcmul_(p, d_lse[batch, :, block.rows, None].to(p.dtype)), visible)
            if d_bias is not None:
                of_bias = block.of(d_bias, SCORES)
                of_bias += ds.sum_to_size(of_bias.shape)
            if d_alibi_slopes is not None:
                of_slopes = block.of(d_alibi_slopes, ("batch",))
                by_head = (ds * _distances(ds, rules)).sum(dim=-1).sum(dim=-1).to(d_alibi_slopes.dtype)
                of_slopes -= by_head.sum_to_size(of_slopes.shape)
            if rules.score_mod:
                places = functions.places_of(block, heads, options, query.device)
                read = functions.read_by_score_mod(inputs, options)
                ds, d_reads = functions.pulled_back(ds, unmodified, places, rules.score_mod, read)
                ds = _cleared(ds, visible)
                for number, _ in of_captured.accesses:
                    of_captured.add(number, _cleared(d_reads[number].expand(ds.shape).clone(), visible), places)
            if bent is not None:
                ds = _cleared(torch.ops.aten.tanh_backward(ds, bent), visible)
            ds = ds.view(flat)
            d_rows = _product(ds, keys[:, block.keys], careful).mul_(options.scale)
            d_query[batch, :, block.rows] = d_rows.view(*p.shape[:3], -1).to(d_query.dtype)
            _add_product(d_keys[:, block.keys], ds.mT, queries, careful)
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
