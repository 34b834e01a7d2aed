"""Which weights dropout keeps on the torch backend: drawn once where they are few, else drawn again at each use.

A kept weight is one byte, so that those of a long sequence would take more memory than everything else in a call whose
memory is linear in the length. Above :data:`MOST_DRAWN_WHOLE` weights a call therefore stores a seed, and forward,
backward and derivatives draw the tiles of weights that they are about to use, each tile from a generator of its own.
"""

from __future__ import annotations

import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.tracing import is_functorch_active, is_recorded, is_traced

# Weights that are drawn whole, as nn.MultiheadAttention draws them, so that one seed gives the same dropout in both.
MOST_DRAWN_WHOLE = 1 << 22
# Rows and keys of a tile that is drawn at once.
_TILE = 256


def draw(query: Tensor, keys: int, dropout_p: float) -> Tensor:
    """The dropout state of a call over ``query`` ``[B, H, L, D]``: its kept weights, boolean ``[B, H, L, S]``, or an
    int64 seed ``[1]`` for :func:`kept` to draw them from. ``torch.manual_seed`` rules both."""
    shape = (*query.shape[:3], keys)
    if is_recorded():  # an operator that exporters know
        return F.dropout(query.new_ones(shape), dropout_p) != 0
    whole = not (is_traced() or is_functorch_active())  # in place nothing is drawn for each sample of a vmap
    if whole and shape[0] * shape[1] * shape[2] * shape[3] <= MOST_DRAWN_WHOLE:
        return torch.empty(shape, dtype=torch.bool, device=query.device).bernoulli_(1.0 - dropout_p)
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=query.device)


def is_seed(state: Tensor) -> bool:
    """Is a dropout state a seed, and not the kept weights themselves?"""
    return state.dtype == torch.int64


def kept(seed: Tensor, dropout_p: float, heads: int, batch: slice, rows: slice, keys: slice) -> Tensor:
    """Boolean ``[b, H, n, s]``: which weights of these batch entries, rows and keys are kept. A weight's draw depends
    on the seed and on its place alone, however the call is cut into blocks."""
    first = int(seed)
    shape = (batch.stop - batch.start, heads, rows.stop - rows.start, keys.stop - keys.start)
    found = torch.empty(shape, dtype=torch.bool, device=seed.device)
    generator = torch.Generator(seed.device)
    for entry in range(batch.start, batch.stop):
        for row in range(rows.start // _TILE, -(-rows.stop // _TILE)):
            for key in range(keys.start // _TILE, -(-keys.stop // _TILE)):
                # torch's generator on the CPU takes 32 bits of its seed, into which all of these have to be mixed
                generator.manual_seed(zlib.crc32(struct.pack("<4q", first, entry, row, key)))
                tile = torch.empty(heads, _TILE, _TILE, dtype=torch.bool, device=seed.device)
                tile.bernoulli_(1.0 - dropout_p, generator=generator)
                of_rows, in_rows = _overlap(rows, row)
                of_keys, in_keys = _overlap(keys, key)
                found[entry - batch.start, :, of_rows, of_keys] = tile[:, in_rows, in_keys]
    return found


def _overlap(wanted: slice, tile: int) -> tuple[slice, slice]:
    """Where tile number ``tile`` of an axis lies among the ``wanted`` places, and these within the tile."""
    start, stop = max(wanted.start, tile * _TILE), min(wanted.stop, (tile + 1) * _TILE)
    return slice(start - wanted.start, stop - wanted.start), slice(start - tile * _TILE, stop - tile * _TILE)
