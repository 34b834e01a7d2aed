"""Sharing a sequence out among ranks, and putting it together again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.distributed import exchange
from fastattn.distributed.agreement import agree
from fastattn.distributed.in_graphs import Exchange, on_ranks, places_of, register
from fastattn.distributed.layout import (
    Balance,
    Place,
    check_balance,
    in_order,
    numbers_in,
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
    places, dim = _numbered(group_or_mesh), dim % tensor.dim()
    _check_length(f"tensor.shape[{dim}]", tensor.shape[dim], places, check_balance(balance))
    return shard_along(tensor, dim, places, balance)


def _numbered(group_or_mesh: dist.ProcessGroup | dist.DeviceMesh) -> tuple[Place, ...]:
    """Where this process stands, for what takes no messages: torch.compile sees numbers and no groups."""
    return tuple(Place(None, rank, world) for rank, world in numbers_in(group_or_mesh))


def shard_along(tensor: Tensor, dim: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """:func:`shard` of a tensor whose tokens can be shared out evenly."""
    for place, own_balance in _along(places, balance):
        own = pieces(place.rank, place.world, tensor.shape[dim] // place.world, own_balance)
        found = [tensor[(*(slice(None),) * dim, piece.positions)] for piece in own]
        tensor = found[0] if len(found) == 1 else torch.cat(found, dim=dim)
    return tensor


def _whole(tensor: Tensor, dim: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """The whole sequence."""
    for place, own_balance in reversed(_along(places, balance)):
        tensor = in_order(list(exchange.all_gather([tensor], place)[0]), dim, own_balance)
    return tensor


def _share(gradient: Tensor, dim: int, places: tuple[Place, ...], balance: Balance) -> Tensor:
    """The sum of what all ranks want of this rank's shard, of what they want of the whole sequence."""
    total = gradient.to(statistics_dtype(gradient.dtype))
    for place, own_balance in _along(places, balance):
        total = exchange.sum_over_ranks(out_of_order(total, dim, place.world, own_balance), place)
    return total.to(gradient.dtype)


class _Unshard(torch.autograd.Function):
    """The whole sequence; backward the sum of what all ranks want of a shard."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *further: Any) -> Tensor:
        ctx.further = further
        whole = _whole(tensor, *further)
        return whole.clone() if whole is tensor else whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        return _share(grads[0], *ctx.further), None, None, None


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
    dim %= tensor.dim()
    if torch.compiler.is_compiling():
        return on_ranks("unshard", group_or_mesh, (("dim", dim), ("balance", balance)), tensor)[0]
    places = places_in(group_or_mesh)
    _agree(tensor, dim, places, check_balance(balance))
    return _Unshard.apply(tensor, dim, places, balance)


def _agree(tensor: Tensor, dim: int, places: tuple[Place, ...], balance: Balance) -> None:
    """Raise unless all ranks have such a shard."""
    said = {"tensor": [str(tensor.dtype), *shape_of(tensor)], "dim": dim, "balance": balance}
    agree(said, {}, None, places, tensor.device)
    if balance == "zigzag" and ranks_of(places) > 1 and tensor.shape[dim] % 2:
        raise ValueError(f"tensor.shape[{dim}]={tensor.shape[dim]}: expected an even number for balance='zigzag'")


def _in_graph(spec: dict[str, Any], given: Any) -> list[Tensor]:
    """:func:`unshard` in a graph."""
    (tensor,), places = given, places_of(spec)
    _agree(tensor, spec["dim"], places, check_balance(spec["balance"]))
    return [_whole(tensor, spec["dim"], places, spec["balance"]).clone(memory_format=torch.contiguous_format)]


def _like_in_graph(spec: dict[str, Any], given: Any) -> list[Tensor]:
    shape = list(given[0].shape)
    shape[spec["dim"]] *= ranks_of(places_of(spec))
    return [given[0].new_empty(shape)]


register(
    "unshard",
    Exchange(
        forward=_in_graph,
        like_forward=_like_in_graph,
        backward=lambda spec, grads, found, given: [
            _share(grads[0], spec["dim"], places_of(spec), spec["balance"]).contiguous()
        ],
        like_backward=lambda spec, grads, found, given: [given[0].new_empty(given[0].shape)],
        results=1,
    ),
)


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
    _check_length("length", length, _numbered(group_or_mesh), check_balance(balance))
    return shard(torch.arange(length, device=device), 0, group_or_mesh, balance=balance).contiguous()
