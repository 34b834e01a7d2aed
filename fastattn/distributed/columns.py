"""A mask or bias of which each rank has the columns of its own keys, as the rows of its own queries.

A rank computes its own queries, so that it needs their rows: of every other rank's columns the block of its rows, and
that of no other. One all-to-all brings them, as many bytes as the columns hold, and its backward takes the gradient of
each block home, where nothing has to be added. That serves every method, since what follows is a mask by rows.
"""

from __future__ import annotations

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
    if ranks_of(places) == 1:
        return mask
    if mask.shape[_KEYS] != keys:  # of one number for all keys every rank has all rows
        return mask if mask.shape[_ROWS] == 1 else shard_along(mask, _ROWS, places, balance)
    exchanged = _OneRow if mask.shape[_ROWS] == 1 else _Rows
    return exchanged.apply(mask, places[0], places[1] if len(places) == 2 else None, balance)


class _Rows(torch.autograd.Function):
    """Blocks from columns to rows, along the second dimension of a mesh and then along the first."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, first: Place, second: Place | None, balance: Balance) -> Tensor:
        ctx.first, ctx.second, ctx.balance = first, second, balance
        blocks = out_of_order(mask, _ROWS, first.world, balance)  # [W, B, H, rows, m]
        if second is not None:
            of_ranks = blocks.unflatten(3, (second.world, -1)).movedim(3, 0)
            blocks = torch.cat(list(exchange.all_to_all([of_ranks], second)[0]), dim=-1)
        return in_order(list(exchange.all_to_all([blocks], first)[0]), _KEYS, balance)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        (gradient,) = grads
        blocks = out_of_order(gradient, _KEYS, ctx.first.world, ctx.balance)
        blocks = exchange.all_to_all([blocks], ctx.first)[0]
        if ctx.second is not None:
            of_ranks = torch.stack(blocks.chunk(ctx.second.world, dim=-1))
            blocks = exchange.all_to_all([of_ranks], ctx.second)[0].movedim(0, 3).flatten(3, 4)
        return in_order(list(blocks), _ROWS, ctx.balance), None, None, None


class _OneRow(torch.autograd.Function):
    """All keys of a mask that has one row for all queries; backward what all ranks together want of these keys."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, first: Place, second: Place | None, balance: Balance) -> Tensor:
        ctx.first, ctx.second, ctx.balance = first, second, balance
        if second is not None:
            mask = torch.cat(list(exchange.all_gather([mask], second)[0]), dim=-1)
        return in_order(list(exchange.all_gather([mask], first)[0]), _KEYS, balance)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        (gradient,) = grads
        wide = gradient.to(statistics_dtype(gradient.dtype))
        total = exchange.sum_over_ranks(out_of_order(wide, _KEYS, ctx.first.world, ctx.balance), ctx.first)
        if ctx.second is not None:
            shares = torch.stack(total.chunk(ctx.second.world, dim=-1))
            total = exchange.sum_over_ranks(shares, ctx.second)
        return total.to(gradient.dtype), None, None, None
