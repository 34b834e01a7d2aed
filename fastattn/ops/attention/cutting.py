"""A call of attention cut into blocks of rows, each with the keys that some of its rows may see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import dropout
from fastattn.ops.attention.contract import Inputs, Options
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.common.blocks import OF_KEYS, OF_ROWS, SCORES, Axes, Block
from fastattn.reference import visibility
from fastattn.reference.attention import NEGATIVE_INFINITY

# Elements of one block of scores. 2^20 float32 (4 MiB) stay in the outer caches between the products.
BLOCK_ELEMENTS = 1 << 20
# Elements of the scores that are at work at once on each core of a CPU: 1 MiB of float32, half of its own cache.
AT_WORK = 1 << 18
# A product of 16 rows takes a third longer for each than one of 32, which takes a tenth longer than one of 128.
_ROWS_IN_TURNS = 32
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


def at_work() -> int:
    """How many elements of the scores are at work at once."""
    return AT_WORK * torch.get_num_threads()


def axes_of(names: Iterable[str]) -> tuple[Axes, ...]:
    """How inputs of these names follow the blocks; what functions read is whole in every block."""
    return tuple(_AXES_BY_NAME.get(name, ()) for name in names)


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


def blocks(
    inputs: Inputs, options: Options, batch: slice, *, looks: bool, skips: bool = True, in_turns: bool = False
) -> Iterator[Block]:
    """The blocks of some batch entries.

    The band of lower and upper decides which keys are left out; if ``looks``, so do the values of masks, documents and
    prefixes. A block whose rows see nothing is left out if ``skips``, and otherwise has one key, hidden from its rows.
    Heads that have their turn one after another (``in_turns``) leave room for more rows where there are many keys.
    """
    heads, length = inputs.query.shape[1:3]
    most_rows, keys = _span(inputs, options)
    fitting = BLOCK_ELEMENTS // (heads * keys)
    if in_turns:
        fitting = min(max(fitting, min(_ROWS_IN_TURNS, BLOCK_ELEMENTS // keys)), max(_ROWS_IN_TURNS, at_work() // keys))
    rows = max(1, min(length, most_rows, fitting))
    for row in range(0, length, rows):
        block = Block(batch, slice(row, min(row + rows, length)), slice(0, inputs.key.shape[2]))
        block = block._replace(keys=keys_of_band(inputs, options, block, looks))
        if looks and block.keys.start < block.keys.stop:
            block = block._replace(keys=keys_of_masks(inputs, options, block))
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


def keys_of_masks(inputs: Inputs, options: Options, block: Block) -> slice:
    """From the first to the last of the block's keys that every mask lets some row of it see."""
    start, stop = block.keys.start, block.keys.stop
    if inputs.mask is inputs.key_padding_mask is inputs.query_documents is None and not options.mask_mod:
        return block.keys
    for visible in masks_of(cut(block, inputs._replace(dropout_state=None), options)[0]):
        if visible.shape[3] != 1:
            seen = visible.view(torch.uint8).amax((0, 1, 2)).nonzero()
            if not len(seen):
                return slice(0, 0)
            start, stop = max(start, block.keys.start + int(seen[0])), min(stop, block.keys.start + int(seen[-1]) + 1)
    return slice(start, stop)


def masks_of(inputs: Inputs) -> Iterator[Tensor]:
    """Boolean tensors that broadcast to the scores; a key is visible where all of them are True."""
    if inputs.mask is not None:
        yield inputs.mask
    if inputs.key_padding_mask is not None:
        yield ~inputs.key_padding_mask[:, None, None, :]
    if inputs.query_documents is not None and inputs.key_documents is not None:
        yield inputs.query_documents[:, None, :, None] == inputs.key_documents[:, None, None, :]


def visible_pairs(own: Inputs, options: Options) -> Tensor:
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
