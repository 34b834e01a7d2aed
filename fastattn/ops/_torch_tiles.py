"""Evaluation on a CPU under masks: ``F.scaled_dot_product_attention`` over the keys that a tile of rows may see.

torch's kernel computes every score that a mask then hides. Here each tile of rows has the keys that some row of it may
see, gathered where they do not lie together, and a mask only where some row may not see one of them. A training step
stays with the operators: their backward would add up the keys' gradients once a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.ops._call import AttentionCall
from fastattn.ops._contract import Inputs, Options, empty_in_order_of
from fastattn.ops._torch_blocks import Block, keys_of_band
from fastattn.ops._tracing import is_traced
from fastattn.reference import visibility

# Rows of a tile: fewer would leave more keys out, at a price of some 30 microseconds a tile.
ROWS = 128
# A slice, which is no copy, serves where at most this much of it is hidden from everybody.
_WASTE = 1.1
# Under masks that leave this share of the keys, whole calls are as fast.
_WORTH_IT = 0.9


def can_run(call: AttentionCall) -> bool:
    """Is this a call that torch's kernel could run, but for what hides keys, without gradients, and of some length?"""
    beyond = (call.bias, call.alibi_slopes, call.sinks, call.softcap)
    hides = (call.mask, call.key_padding_mask, call.query_documents, call.lower, call.prefix)
    return (
        call.weights == "none"
        and not call.return_lse
        and call.dropout_p == 0.0
        and all(argument is None for argument in beyond)
        and any(argument is not None for argument in hides)
        and (call.mask is None or call.mask.shape[1] == 1)
        and not is_traced()  # before its sizes are looked at, which a graph may leave open
        and call.query.shape[2] >= 2 * ROWS
        and call.query.shape[0] > 0
        and call.key.shape[2] > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value)))
    )


def run(
    call: AttentionCall, inputs: Inputs, options: Options, attend: Callable[[AttentionCall], Tensor]
) -> Tensor | None:
    """The output; None where whole calls are as fast.

    Args:
        call: one that :func:`can_run`.
        inputs: the call in the operators' form, and
        options: the rest of it.
        attend: runs a call that only a boolean mask rules.
    """
    length, keys = call.query.shape[2], call.key.shape[2]
    entries = _entries(inputs)
    if call.lower is None and call.query_documents is None:  # how much masks hide, a look at a few tiles tells
        middle, end = (start // ROWS * ROWS for start in (length // 2, length - 1))
        probes = [(entries[0], 0), (entries[0], end), *((batch, middle) for batch in entries)]
        visited = [0 if tile is None else tile.key.shape[2] for tile in (_tile(inputs, options, *p) for p in probes)]
        if sum(visited) > _WORTH_IT * keys * len(probes):
            return None
    output = empty_in_order_of(call.query, (*call.query.shape[:3], call.value.shape[3]))
    for batch in entries:
        for start in range(0, length, ROWS):
            tile, rows = _tile(inputs, options, batch, start), slice(start, start + ROWS)
            output[batch, :, rows] = 0.0 if tile is None else attend(_as_call(call, tile))
    return output


def _entries(inputs: Inputs) -> list[slice]:
    """The batch entries that see alike, together: all of them, or each by itself."""
    batch = inputs.query.shape[0]
    rules = (inputs.mask, inputs.key_padding_mask, inputs.query_documents, inputs.key_documents, inputs.prefix)
    if all(tensor is None or tensor.shape[0] == 1 for tensor in rules):
        return [slice(0, batch)]
    return [slice(b, b + 1) for b in range(batch)]


def _tile(inputs: Inputs, options: Options, batch: slice, start: int) -> Inputs | None:
    """Some rows with the keys that they may see, and the mask of those, None where all are seen; None: no key is."""
    rows = slice(start, min(start + ROWS, inputs.query.shape[2]))
    block = Block(batch, rows, slice(0, inputs.key.shape[2]))
    block = block._replace(keys=keys_of_band(inputs, options, block, looks=True))
    if block.keys.start >= block.keys.stop:
        return None
    own, rules = block.cut(inputs, options)
    visible = visibility(
        own.query.shape[2],
        own.key.shape[2],
        lower=rules.lower,
        upper=rules.upper,
        prefix=own.prefix,
        mask=own.mask,
        key_padding_mask=own.key_padding_mask,
        query_documents=own.query_documents,
        key_documents=own.key_documents,
    )
    as_bytes = visible.view(torch.uint8)  # which torch reduces ten times faster
    seen = as_bytes.amax((0, 1, 2)).nonzero().squeeze(1)
    if not len(seen):
        return None
    first, last = int(seen[0]), int(seen[-1])
    if last + 1 - first <= _WASTE * len(seen):
        keys = slice(first, last + 1)
        key, value, visible = own.key[:, :, keys], own.value[:, :, keys], visible[..., keys]
        whole = as_bytes[..., keys].amin()
    else:
        key, value = own.key.index_select(2, seen), own.value.index_select(2, seen)
        whole = as_bytes.amin((0, 1, 2)).index_select(0, seen).amin()
        visible = visible if whole else visible.index_select(3, seen)
    return own._replace(key=key, value=value, mask=None if whole else visible)


def _as_call(call: AttentionCall, tile: Inputs) -> AttentionCall:
    """A tile as a call that its mask alone rules."""
    return call._replace(
        query=tile.query,
        key=tile.key,
        value=tile.value,
        mask=tile.mask,
        key_padding_mask=None,
        query_documents=None,
        key_documents=None,
        prefix=None,
        lower=None,
        upper=None,
    )
