"""Evaluation on a CPU under masks: ``F.scaled_dot_product_attention`` over the keys that a tile of rows may see.

torch's kernel computes every score, also those that a mask then hides. Here each tile of rows is a call over the keys
that some row of it may see, gathered where they are not adjacent, with a mask only if some row may not see one of them.
A mask that is given by a rule (a window, documents) is therefore never made for the whole call. A training step is left
to the operators: in this form its backward would add up the keys' gradients once for each tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention import cutting, flash, sdpa
from fastattn.ops.attention.contract import AttentionCall, Inputs, Options
from fastattn.ops.attention.cutting import cut, keys_of_band, visible_pairs
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.attention.functions.as_words import adds, bias_of
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.common.blocks import Block, empty_in_order_of

# Rows of a tile: with fewer rows more keys are left out, but every tile costs some 30 microseconds.
ROWS = 128
# Rows of a tile where hardly a key is left out: torch's kernel takes three quarters of the time for each of 768.
_ROWS_OF_DENSE, _DENSE = 1024, 0.95
# A slice of the keys, which is no copy, is taken instead of gathering them if it is at most this many times as long.
_WASTE = 1.1
# If more than this share of the keys remains visible, one call over everything is as fast.
_WORTH_IT = 0.7


def takes(call: AttentionCall) -> bool:
    """Is this a long eager call without gradients, which torch's kernel could run but for what hides keys?

    A bias or mask that differs between heads leaves too few keys out for tiles to be faster: such a call is taken only
    if the mask that torch's kernel would need is too large.
    """
    differentiable: tuple[Tensor | None, ...] = (call.query, call.key, call.value, call.bias)
    beyond = (call.alibi_slopes, call.sinks, call.softcap)
    hides = (call.mask, call.key_padding_mask, call.query_documents, call.lower, call.prefix)
    if call.score_mod is not None:
        if not adds(Program.of(call.score_mod.text)):
            return False
        differentiable += call.score_mod.captured
    return (
        call.weights == "none"
        and not call.return_lse
        and call.dropout_p == 0.0
        and all(argument is None for argument in beyond)
        and (any(argument is not None for argument in hides) or call.upper not in (None, 0) or call.is_modified)
        and call.query.shape[2] >= sdpa.FEWEST_ROWS_OF_TILES
        and call.query.numel() > 0
        and call.key.numel() > 0
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable))
        and (call.bias is None or not sdpa.needs_care(call.bias, call.query))
        and (not _by_head(call) or call.is_modified or sdpa.merged_elements(call) > sdpa.MOST_MERGED)
    )


def _by_head(call: AttentionCall) -> bool:
    """Does a mask or a bias differ between heads?"""
    return call.bias is not None or (call.mask is not None and call.mask.shape[1] != 1)


def run(call: AttentionCall, inputs: Inputs, options: Options, may_decline: bool) -> Tensor | None:
    """The output; None where one call over everything is as fast, or query, key and value are not tame.

    Args:
        call: one that :func:`takes` accepts.
        inputs: the call's tensors in the operators' form.
        options: the rest of the call in the operators' form.
        may_decline: whether None may be returned.
    """
    length, keys = call.query.shape[2], call.key.shape[2]
    entries = _entries(inputs, options)
    step = _rows_of_tile(inputs, options)
    # Masks and prefixes hide an amount that depends on their values: a few tiles are read to estimate it.
    if (may_decline or not call.is_modified) and call.lower is None and call.query_documents is None:
        middle, end = (start // ROWS * ROWS for start in (length // 2, length - 1))
        probes = [(entries[0], 0), (entries[0], end), *((batch, middle) for batch in entries)]
        share = sum(_visited(inputs, options, *probe) for probe in probes) / (keys * len(probes))
        if may_decline and share > _WORTH_IT:
            return None
        if share > _DENSE and not _by_head(call):
            step = max(step, min(_ROWS_OF_DENSE, 2 * cutting.BLOCK_ELEMENTS // keys))
    if not sdpa.is_tame(call):
        return None
    output = empty_in_order_of(call.query, (*call.query.shape[:3], call.value.shape[3]))
    for batch in entries:
        for start in range(0, length, step):
            tile, rows = _tile(inputs, options, batch, start, step), slice(start, start + step)
            output[batch, :, rows] = 0.0 if tile is None else attend_tile(_as_call(call, tile))
    return output


def _entries(inputs: Inputs, options: Options) -> list[slice]:
    """The batch entries that share their masks, together: all of them, or each by itself."""
    batch = inputs.query.shape[0]
    rules = (
        inputs.bias,
        inputs.mask,
        inputs.key_padding_mask,
        inputs.query_documents,
        inputs.key_documents,
        inputs.prefix,
    )
    programs = [Program.of(text) for text in (options.score_mod, options.mask_mod) if text]
    by_entry = any(program.depends_on("batch") for program in programs)
    if all(tensor is None or tensor.shape[0] == 1 for tensor in rules) and not by_entry:
        return [slice(0, batch)]
    return [slice(b, b + 1) for b in range(batch)]


def _rows_of_tile(inputs: Inputs, options: Options) -> int:
    """Fewer rows where a function makes a bias of every head, which is not to be larger than a block of scores."""
    if not (options.score_mod and Program.of(options.score_mod).depends_on("head")):
        return ROWS
    of_row = inputs.query.shape[1] * inputs.key.shape[2]
    return max(8, min(ROWS, cutting.BLOCK_ELEMENTS // of_row))


def _visited(inputs: Inputs, options: Options, batch: slice, start: int) -> int:
    """How many keys a tile has."""
    found = _pairs(inputs, options, batch, start, ROWS)
    return 0 if found is None else int(torch.count_nonzero(found[1].view(torch.uint8).amax((0, 1, 2))))


def _pairs(inputs: Inputs, options: Options, batch: slice, start: int, step: int) -> tuple[Inputs, Tensor] | None:
    """Some rows and the keys that band and prefix let them see as a call, and who sees whom, ``[b | 1, H | 1, n, s]``.
    None if no row sees any key."""
    rows = slice(start, min(start + step, inputs.query.shape[2]))
    block = Block(batch, rows, slice(0, inputs.key.shape[2]))
    block = block._replace(keys=keys_of_band(inputs, options, block, looks=True))
    if block.keys.start >= block.keys.stop:
        return None
    own, rules = cut(block, inputs, options)
    if rules.score_mod:
        program, read = Program.of(rules.score_mod), functions.read_by_score_mod(inputs, options)
        places = functions.places_of(block, inputs.query.shape[1], options, inputs.query.device)
        added = bias_of(program, places, read, inputs.query.dtype)
        own = own._replace(bias=added if own.bias is None else own.bias + added)
    return own, visible_pairs(own, rules)


def _tile(inputs: Inputs, options: Options, batch: slice, start: int, step: int) -> Inputs | None:
    """A tile as a call: some rows, the keys that they may see, and a mask unless each row sees all of these keys. None
    if no row sees any key."""
    found = _pairs(inputs, options, batch, start, step)
    if found is None:
        return None
    own, visible = found
    as_bytes = visible.view(torch.uint8)  # which torch reduces ten times faster
    seen = as_bytes.amax((0, 1, 2)).nonzero().squeeze(1)
    if not len(seen):
        return None
    first, last, bias = int(seen[0]), int(seen[-1]), own.bias
    spans_keys = bias is not None and bias.shape[3] != 1
    if last + 1 - first <= _WASTE * len(seen):
        keys = slice(first, last + 1)
        key, value, visible = own.key[:, :, keys], own.value[:, :, keys], visible[..., keys]
        whole = as_bytes[..., keys].amin()
        bias = bias[..., keys] if bias is not None and spans_keys else bias
    else:
        key, value = own.key.index_select(2, seen), own.value.index_select(2, seen)
        whole = as_bytes.amin((0, 1, 2)).index_select(0, seen).amin()
        visible = visible if whole else visible.index_select(3, seen)
        bias = bias.index_select(3, seen) if bias is not None and spans_keys else bias
    return own._replace(key=key, value=value, bias=bias, mask=None if whole else visible)


def attend_tile(tile: AttentionCall) -> Tensor:
    """The output of a tile that is a call of its own."""
    if flash.widens(tile.query.dtype, False, math.inf):  # the call has many scores, if not this tile
        query, key, value = (t.float() for t in (tile.query, tile.key, tile.value))
        tile = tile._replace(query=query, key=key, value=value)
    return sdpa.attend(tile, sdpa.merged_mask(tile))


def _as_call(call: AttentionCall, tile: Inputs) -> AttentionCall:
    """A tile as a call whose only masks are its mask and its bias."""
    return call._replace(
        query=tile.query,
        key=tile.key,
        value=tile.value,
        bias=tile.bias,
        mask=tile.mask,
        key_padding_mask=None,
        query_documents=None,
        key_documents=None,
        prefix=None,
        score_mod=None,
        mask_mod=None,
        lower=None,
        upper=None,
    )
