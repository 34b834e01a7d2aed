"""A mask or bias of which each rank has the columns of its own keys, as the rows of its own queries.

A rank computes its own queries, so that it needs their rows: of every other rank's columns the block of its rows, and
that of no other. One all-to-all brings them, as many bytes as the columns hold, and its backward takes the gradient of
each block home, where nothing has to be added. That serves every method, since what follows is a mask by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.distributed import exchange
from fastattn.distributed.layout import Balance, Place, in_order, out_of_order, ranks_of
from fastattn.distributed.sharing import shard_along
from fastattn.ops.common.blocks import statistics_dtype

_ROWS, _KEYS = 2, 3  # dimensions of a mask


def by_rows(mask: Tensor, keys: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """This rank's rows and the keys of the whole sequence, ``[B | 1, H | 1, n | 1, S | 1]``; differentiable.

    Args:
        mask: ``[B | 1, H | 1, L | 1, m | 1]``: all rows in the order of the sequence, and this rank's keys.
        keys: ``m``, the keys on each rank.
        places: of this process, one for each dimension of a mesh.
        balance: which tokens a rank has along the first of them.
    """
    return _ByRows.apply(mask, keys, places, balance)


def shape_of_rows(shape: Sequence[int], keys: int, places: tuple[Place, ...]) -> list[int]:
    """The shape of :func:`by_rows`, of that of the mask."""
    ranks, (batch, heads, rows, columns) = ranks_of(places), shape
    return [batch, heads, rows // ranks if rows > 1 else 1, columns * ranks if columns == keys else columns]


def home(gradient: Tensor, shape: Sequence[int], keys: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """The gradient of the mask that was given, of this shape, from that of :func:`by_rows`."""
    if ranks_of(places) == 1 or (shape[_KEYS] != keys and shape[_ROWS] == 1):
        return gradient
    if shape[_KEYS] != keys:  # this rank's share: its rows, among zeros
        positions = torch.arange(shape[_ROWS], device=gradient.device)
        whole = gradient.new_zeros(tuple(shape))
        return whole.index_copy_(_ROWS, shard_along(positions, 0, places, balance), gradient)
    return _one_row_home(gradient, places, balance) if shape[_ROWS] == 1 else _rows_home(gradient, places, balance)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, keys: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
        ctx.shape, ctx.further = mask.shape, (keys, places, balance)
        if mask.shape[_KEYS] != keys:  # of one number for all keys every rank has all rows
            found = mask if mask.shape[_ROWS] == 1 else shard_along(mask, _ROWS, places, balance)
        elif ranks_of(places) == 1:
            found = mask
        else:
            found = (_one_row if mask.shape[_ROWS] == 1 else _rows)(mask, places, balance)
        return found.clone() if found is mask else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        return home(grads[0], ctx.shape, *ctx.further), None, None, None


# ------------------------------------------------------------------------------------------------------------ all rows


def _rows(mask: Tensor, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """Blocks from columns to rows, along the second dimension of a mesh and then along the first."""
    first, *second = places
    blocks = out_of_order(mask, _ROWS, first.world, balance)  # [W, B, H, rows, m]
    for place in second:
        of_ranks = blocks.unflatten(3, (place.world, -1)).movedim(3, 0)
        blocks = torch.cat(list(exchange.all_to_all([of_ranks], place)[0]), dim=-1)
    return in_order(list(exchange.all_to_all([blocks], first)[0]), _KEYS, balance)


def _rows_home(gradient: Tensor, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """The inverse of :func:`_rows`."""
    first, *second = places
    blocks = exchange.all_to_all([out_of_order(gradient, _KEYS, first.world, balance)], first)[0]
    for place in second:
        of_ranks = torch.stack(blocks.chunk(place.world, dim=-1))
        blocks = exchange.all_to_all([of_ranks], place)[0].movedim(0, 3).flatten(3, 4)
    return in_order(list(blocks), _ROWS, balance)


# ------------------------------------------------------------------------------------------------------------- one row


def _one_row(mask: Tensor, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """All keys of a mask that has one row for all queries."""
    first, *second = places
    for place in second:
        mask = torch.cat(list(exchange.all_gather([mask], place)[0]), dim=-1)
    return in_order(list(exchange.all_gather([mask], first)[0]), _KEYS, balance)


def _one_row_home(gradient: Tensor, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """What all ranks together want of this rank's keys."""
    first, *second = places
    wide = gradient.to(statistics_dtype(gradient.dtype))
    total = exchange.sum_over_ranks(out_of_order(wide, _KEYS, first.world, balance), first)
    for place in second:
        total = exchange.sum_over_ranks(torch.stack(total.chunk(place.world, dim=-1)), place)
    return total.to(gradient.dtype)
