"""Sharing a sequence out among ranks, and putting it together again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.distributed import exchange
from fastattn.distributed.agreement import agree
from fastattn.distributed.layout import (
    Balance,
    Place,
    check_balance,
    in_order,
    out_of_order,
    pieces,
    places_in,
    ranks_of,
)
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import shape_of


def _check_length(name: str, length: int, places: tuple[Place, ...], balance: Balance) -> None:
    """Raise unless a sequence of this length can be shared out."""
    ranks = ranks_of(places)
    divisor = ranks * (2 if balance == "zigzag" and ranks > 1 else 1)
    if length % divisor:
        raise ValueError(
            f"{name}={length}: expected a multiple of {divisor}, for {ranks} ranks and balance={balance!r}"
        )


def _along(places: tuple[Place, ...], balance: Balance) -> list[tuple[Place, Balance]]:
    """Each dimension with its balance: along the second, pieces are contiguous."""
    return [(place, balance if number == 0 else "none") for number, place in enumerate(places)]


def shard(
    tensor: Tensor, dim: int, group_or_mesh: dist.ProcessGroup | dist.DeviceMesh, *, balance: Balance = "none"
) -> Tensor:
    """This rank's tokens of a sequence that every rank has.

    Args:
        tensor: of any shape and dtype, the same on every rank. Differentiable.
        dim: the dimension of the tokens.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.

    Returns:
        The tensor with a ``W``-th of its tokens, a view where they are equally far apart.

    Raises:
        ValueError: the tokens cannot be shared out evenly, or ``balance`` is not known.
    """
    places, dim = places_in(group_or_mesh), dim % tensor.dim()
    _check_length(f"tensor.shape[{dim}]", tensor.shape[dim], places, check_balance(balance))
    return shard_along(tensor, dim, places, balance)


def shard_along(tensor: Tensor, dim: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """:func:`shard` of a tensor whose tokens can be shared out evenly."""
    for place, own_balance in _along(places, balance):
        own = pieces(place.rank, place.world, tensor.shape[dim] // place.world, own_balance)
        found = [tensor[(*(slice(None),) * dim, piece.positions)] for piece in own]
        tensor = found[0] if len(found) == 1 else torch.cat(found, dim=dim)
    return tensor


class _Unshard(torch.autograd.Function):
    """The whole sequence; backward the sum of what all ranks want of a shard."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, place: Place, balance: Balance) -> Tensor:
        ctx.dim, ctx.place, ctx.balance = dim, place, balance
        whole = in_order(list(exchange.all_gather([tensor], place)[0]), dim, balance)
        return whole.clone() if place.world == 1 else whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        (gradient,) = grads
        wide = gradient.to(statistics_dtype(gradient.dtype))
        shares = out_of_order(wide, ctx.dim, ctx.place.world, ctx.balance)
        return exchange.sum_over_ranks(shares, ctx.place).to(gradient.dtype), None, None, None


def unshard(
    tensor: Tensor, dim: int, group_or_mesh: dist.ProcessGroup | dist.DeviceMesh, *, balance: Balance = "none"
) -> Tensor:
    """The whole sequence on every rank, of a shard on each; the inverse of :func:`shard`.

    Args:
        tensor: this rank's shard, of one shape and dtype on all ranks. Differentiable: the gradient of a shard is the
            sum of those that all ranks have for it.
        dim: the dimension of the tokens.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.

    Raises:
        RanksDisagreeError: shapes, dtypes or arguments differ.
        RankLostError: a rank did not come within the group's time-out, or is gone.
        ValueError: ``balance`` is not known.
    """
    places, dim = places_in(group_or_mesh), dim % tensor.dim()
    said = {"tensor": [str(tensor.dtype), *shape_of(tensor)], "dim": dim, "balance": check_balance(balance)}
    agree(said, {}, None, places, tensor.device)
    if balance == "zigzag" and ranks_of(places) > 1 and tensor.shape[dim] % 2:
        raise ValueError(f"tensor.shape[{dim}]={tensor.shape[dim]}: expected an even number for balance='zigzag'")
    for place, own_balance in reversed(_along(places, balance)):
        tensor = _Unshard.apply(tensor, dim, place, own_balance)
    return tensor


def position_ids(
    length: int,
    group_or_mesh: dist.ProcessGroup | dist.DeviceMesh,
    *,
    balance: Balance = "none",
    device: torch.device | str | None = None,
) -> Tensor:
    """Where this rank's tokens stand in the sequence, int64 ``[length / W]``, in the order of its shard.

    Args:
        length: of the whole sequence.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.
        device: of the result.

    Raises:
        ValueError: the tokens cannot be shared out evenly, or ``balance`` is not known.
    """
    _check_length("length", length, places_in(group_or_mesh), check_balance(balance))
    return shard(torch.arange(length, device=device), 0, group_or_mesh, balance=balance).contiguous()
