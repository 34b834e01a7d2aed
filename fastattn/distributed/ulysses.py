"""Context parallelism by heads: an all-to-all turns shards of the sequence into shards of heads (arXiv:2309.14509).

Each rank then computes some heads of the whole sequence, as one ordinary call, and a second all-to-all brings its rows
home. The messages are a share ``1 / W`` of what an all-gather sends, and the number of heads limits the ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fastattn.distributed import exchange, functions
from fastattn.distributed.layout import Piece, in_order, out_of_order
from fastattn.distributed.parts import Done, Run, kept_weights
from fastattn.ops.attention import operator
from fastattn.ops.attention.contract import InputGradients, Inputs, Kept, Needs, OutputGradients
from fastattn.ops.common.blocks import statistics_dtype


def refusal(heads: int, kv_heads: int, world: int) -> str | None:
    """Why heads cannot be shared out among so many ranks; None where they can."""
    if heads % world:
        return f"the {heads} query heads are no multiple of the {world} ranks"
    if kv_heads % world and world % kv_heads:
        return f"the {kv_heads} key heads are neither a multiple nor a divisor of the {world} ranks"
    return None


def forward(run: Run, inputs: Inputs) -> Done:
    """This rank's rows."""
    own = of_heads(run, inputs)
    world = run.place.world
    of_rows, of_keys = (Piece(slice(0, tokens * world), 0, 1) for tokens in (run.rows, run.keys))
    run_of_heads = dataclasses.replace(run, first_head=own_heads(run).start)
    own = own._replace(dropout_state=kept_weights(run_of_heads, own, of_rows, of_keys))
    own = functions.at(own, inputs, run.options, run_of_heads.first_head, of_rows, of_keys)
    found = operator.implementation(run.options.backend).forward(own, run.options)
    output, lse = to_rows(run, [found.output, found.lse])
    return Done(output, lse, own, Kept(found.output, found.statistics))


def backward(run: Run, gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs) -> InputGradients:
    """The gradients of the inputs; of those that all ranks have alike this rank's share, which is that of its heads."""
    gradients = gradients_of_heads(run, gradients)
    found = operator.implementation(run.options.backend).backward(gradients, kept, needs, inputs, run.options)
    return home(run, found, needs)


# --------------------------------------------------------------------------------------------------- from rows to heads


def to_heads(run: Run, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of ``[B, H, n, ...]``, this rank's heads of the whole sequence, in its order."""
    world = run.place.world
    split = [t.unflatten(1, (world, t.shape[1] // world)).movedim(1, 0) for t in tensors]
    return [in_order(list(t), 2, run.balance) for t in exchange.all_to_all(split, run.place)]


def to_rows(run: Run, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`to_heads`."""
    split = [out_of_order(t, 2, run.place.world, run.balance) for t in tensors]
    return [t.movedim(0, 1).flatten(1, 2) for t in exchange.all_to_all(split, run.place)]


def own_heads(run: Run) -> slice:
    """Which of all heads this rank has."""
    heads = run.heads // run.place.world
    return slice(run.place.rank * heads, (run.place.rank + 1) * heads)


def of_heads(run: Run, inputs: Inputs) -> Inputs:
    """The call on the tokens of all ranks and this rank's heads; its dropout state is that of all heads."""
    place, heads = run.place, own_heads(run)
    key, value = inputs.key, inputs.value
    if run.kv_heads % place.world:  # each key head goes to several ranks
        key, value = (t.repeat_interleave(place.world // run.kv_heads, dim=1) for t in (key, value))
    query, key, value = to_heads(run, [inputs.query, key, value])
    by_token = {
        name: tensor
        for name in ("key_padding_mask", "query_documents", "key_documents")
        if (tensor := getattr(inputs, name)) is not None
    }
    if by_token:
        gathered = exchange.all_gather(list(by_token.values()), place)
        by_token = {name: in_order(list(t), 1, run.balance) for name, t in zip(by_token, gathered)}
    return inputs._replace(
        query=query,
        key=key,
        value=value,
        bias=_mask_of_heads(run, inputs.bias),
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[:, heads],
        sinks=None if inputs.sinks is None else inputs.sinks[:, heads],
        mask=_mask_of_heads(run, inputs.mask),
        **by_token,
    )


def gradients_of_heads(run: Run, gradients: OutputGradients) -> OutputGradients:
    """The gradients of output and LSE, of this rank's heads, from those of its rows."""
    given = [t for t in (gradients.d_output, gradients.d_lse) if t is not None]
    found = to_heads(run, given)
    return OutputGradients(found[0], None if gradients.d_lse is None else found[1], None)


def home(run: Run, found: InputGradients, needs: Needs) -> InputGradients:
    """The gradients of this rank's inputs, from those of :func:`of_heads`."""
    d_query, d_key, d_value = to_rows(run, [found.d_query, found.d_key, found.d_value])
    repeats = d_key.shape[1] // run.kv_heads
    if repeats > 1:
        d_key, d_value = (t.unflatten(1, (run.kv_heads, repeats)).sum(dim=2) for t in (d_key, d_value))
    found = found._replace(d_query=d_query, d_key=d_key, d_value=d_value)
    if needs.needs_d_bias:
        found = found._replace(d_bias=_bias_home(run, found.d_bias))
    if needs.needs_d_alibi_slopes:
        found = found._replace(d_alibi_slopes=_among_all_heads(run, found.d_alibi_slopes))
    if needs.needs_d_sinks:
        found = found._replace(d_sinks=_among_all_heads(run, found.d_sinks))
    return found


def _mask_of_heads(run: Run, mask: Tensor | None) -> Tensor | None:
    """Of ``[B | 1, H | 1, n | 1, S | 1]``, this rank's heads and all rows."""
    if mask is None:
        return None
    has_heads, has_rows = run.mask_axes
    if has_heads and has_rows:
        return to_heads(run, [mask])[0]
    if has_rows:
        return in_order(list(exchange.all_gather([mask], run.place)[0]), 2, run.balance)
    return mask[:, own_heads(run)] if has_heads else mask


def _bias_home(run: Run, d_bias: Tensor) -> Tensor:
    """The gradient of the bias that was given, from that of :func:`_mask_of_heads`."""
    has_heads, has_rows = run.mask_axes
    if has_heads and has_rows:
        return to_rows(run, [d_bias])[0]
    if has_rows:  # every rank has a share, of its heads, in the gradients of all rows
        shares = out_of_order(d_bias.to(statistics_dtype(d_bias.dtype)), 2, run.place.world, run.balance)
        return exchange.sum_over_ranks(shares, run.place).to(d_bias.dtype)
    return _among_all_heads(run, d_bias) if has_heads else d_bias


def _among_all_heads(run: Run, gradient: Tensor) -> Tensor:
    """The gradient of this rank's heads, ``[B | 1, h, ...]``, among zeros for the others."""
    whole = gradient.new_zeros(gradient.shape[0], run.heads, *gradient.shape[2:])
    whole[:, own_heads(run)] = gradient
    return whole
