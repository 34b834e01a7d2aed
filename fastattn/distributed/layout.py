"""Which tokens of a sequence each rank has: contiguous shards, and two ways to share causal work out evenly.

Under causality the last rows see many keys and the first ones few. ``zigzag`` gives rank ``r`` of ``W`` the chunks
``r`` and ``2 W - 1 - r`` of ``2 W`` (arXiv:2407.21783, section 3.3.2), ``stripe`` the tokens ``r``, ``r + W``,
``r + 2 W``, ... (arXiv:2311.09431).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Balance = Literal["none", "zigzag", "stripe"]


class Place(NamedTuple):
    """A process group, and where in it this process stands."""

    group: dist.ProcessGroup | None  # None: of all processes
    rank: int  # in the group
    world: int  # ranks of the group

    def name(self, rank: int) -> str:
        """A rank of the group, for a message: by the number that it has among all processes."""
        return f"rank {rank if self.group is None else dist.get_global_rank(self.group, rank)}"


class Piece(NamedTuple):
    """Tokens of a shard whose positions in the sequence are equally far apart."""

    local: slice  # where they lie in the shard
    first: Any  # the position of the first of them, an int; of the pieces of many ranks a tensor
    step: int  # from one to the next

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.local.stop - self.local.start

    @property
    def positions(self) -> slice:
        """Where they stand in the sequence."""
        return slice(self.first, self.first + (self.tokens - 1) * self.step + 1, self.step)


def pieces(rank: Any, world: int, length: int, balance: Balance) -> tuple[Piece, ...]:
    """The pieces of a rank's shard of ``length`` tokens, in the order in which they lie in it; ``rank`` is an int, or a
    tensor of ranks, whose pieces then are alike but for their first positions."""
    if balance == "stripe":
        return (Piece(slice(0, length), rank, world),)
    if balance == "none" or world == 1:
        return (Piece(slice(0, length), rank * length, 1),)
    half = length // 2
    last = 2 * world - 1 - rank
    return Piece(slice(0, half), rank * half, 1), Piece(slice(half, length), last * half, 1)


def check_balance(balance: Any) -> Balance:
    """Return ``balance``, or raise."""
    if balance not in get_args(Balance):
        raise ValueError(f"balance={balance!r}: expected one of {', '.join(map(repr, get_args(Balance)))}")
    return balance


def places_in(group_or_mesh: Any) -> tuple[Place, ...]:
    """Where this process stands in a process group, or in each dimension of a device mesh of one or two, or raise.

    Along the first dimension tokens are shared out by a balance, along the second one what a rank of the first has, in
    contiguous pieces.
    """
    if isinstance(group_or_mesh, dist.DeviceMesh):
        if group_or_mesh.ndim > 2:
            raise ValueError(
                f"group_or_mesh has the dimensions {tuple(group_or_mesh.shape)}: expected a mesh of one dimension, "
                "such as mesh['context'], or of two, for method='2d'"
            )
        return tuple(place_in(group_or_mesh.get_group(dim)) for dim in range(group_or_mesh.ndim))
    if not isinstance(group_or_mesh, dist.ProcessGroup):
        raise TypeError(
            "group_or_mesh: expected a torch.distributed.ProcessGroup or DeviceMesh, got "
            f"{type(group_or_mesh).__name__}"
        )
    return (place_in(group_or_mesh),)


def numbers_in(group_or_mesh: Any) -> tuple[tuple[int, int], ...]:
    """For each dimension this process's rank and how many there are, as :func:`places_in` has them."""
    return tuple((place.rank, place.world) for place in places_in(group_or_mesh))


# As torch.compiler.assume_constant_result does: the tracer runs the function, and takes the numbers for constants.
numbers_in._dynamo_marked_constant = True  # type: ignore[attr-defined]


def place_in(group: dist.ProcessGroup) -> Place:
    """Where this process stands in a group."""
    return Place(group, dist.get_rank(group), dist.get_world_size(group))


def ranks_of(places: tuple[Place, ...]) -> int:
    """How many ranks there are in all dimensions."""
    return math.prod([place.world for place in places])


def in_order(shards: list[Tensor], dim: int, balance: Balance) -> Tensor:
    """One sequence of the shards of all ranks."""
    world, length = len(shards), shards[0].shape[dim]
    if world == 1:
        return shards[0]
    if balance == "stripe":
        return torch.stack(shards, dim=dim + 1).flatten(dim, dim + 1)
    found = sorted(
        (piece.first, rank, piece.local) for rank in range(world) for piece in pieces(rank, world, length, balance)
    )
    return torch.cat([shards[rank].narrow(dim, part.start, part.stop - part.start) for _, rank, part in found], dim=dim)


def out_of_order(whole: Tensor, dim: int, world: int, balance: Balance) -> Tensor:
    """The shards of all ranks of a sequence, ``[W, ...]``; the inverse of :func:`in_order`."""
    length = whole.shape[dim] // world
    index = [slice(None)] * dim
    shards = [
        torch.cat([whole[(*index, piece.positions)] for piece in pieces(rank, world, length, balance)], dim=dim)
        for rank in range(world)
    ]
    return torch.stack(shards)
