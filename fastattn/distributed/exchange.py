"""What ranks send to one another, by torch.distributed's collectives and its sends, with errors that name ranks.

Everything travels as bytes: several tensors of several dtypes make one message, and no backend has to know a dtype.
Nothing is added up on the way. Whoever receives adds, in the order of ranks, so that sums are bitwise the same in every
run, whatever algorithm a backend chooses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.distributed.layout import Place

_ALIGNMENT = 16  # bytes: a tensor in a message begins at a multiple, so that it can be viewed in its dtype
# torch 2.13 has renamed it.
_all_gather: Any = getattr(
    dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)


class RankLostError(RuntimeError):
    """Another rank did not come to an exchange within the group's time-out, or is gone."""


# ------------------------------------------------------------------------------------------------------------- counting


@dataclasses.dataclass
class Traffic:
    """What this process has sent, received and computed, and how long it waited; see :func:`record_traffic`.

    The header of a call is not counted. With NCCL the seconds say little, since the GPU waits for messages and the host
    does not; ``bytes_overlapped`` goes by the order in which messages and parts are begun, which is the same there.

    Attributes:
        bytes_sent: to other ranks.
        messages: of how many messages, one to each rank that one goes to.
        parts: pairs of a rank's queries and another's keys that were computed.
        parts_skipped: such pairs that nobody sees, and that were not.
        bytes_received: from other ranks.
        bytes_overlapped: those of them that came while something was computed: at least one part, between the start of
            the exchange and the wait for it.
        seconds_waited: in which this process stood still for messages: until the backend had taken them over, and until
            they had come.
        seconds_under_way: from the start of each exchange to the end of the wait for it, added up. The messages took as
            long at most.
    """

    bytes_sent: int = 0
    messages: int = 0
    parts: int = 0
    parts_skipped: int = 0
    bytes_received: int = 0
    bytes_overlapped: int = 0
    seconds_waited: float = 0.0
    seconds_under_way: float = 0.0


_since_start = Traffic()  # all of this process: by its parts a message knows whether one was computed meanwhile
_recorded = [_since_start]


@contextlib.contextmanager
def record_traffic() -> Generator[Traffic]:
    """Count what context-parallel calls of this process send and compute inside a ``with`` block.

    Returns:
        A :class:`Traffic` that grows while the block lasts.
    """
    traffic = Traffic()
    _recorded.append(traffic)
    try:
        yield traffic
    finally:
        _recorded[:] = [other for other in _recorded if other is not traffic]


def _count_sent(size: int, messages: int) -> None:
    for traffic in _recorded:
        traffic.bytes_sent += size
        traffic.messages += messages


def _count_received(size: int, *, overlapped: bool, waited: float, under_way: float) -> None:
    for traffic in _recorded:
        traffic.bytes_received += size
        traffic.bytes_overlapped += size * overlapped
        traffic.seconds_waited += waited
        traffic.seconds_under_way += under_way


def count_part(is_seen: bool) -> None:
    """Count a pair of some queries and some keys, and whether it was computed."""
    for traffic in _recorded:
        traffic.parts += is_seen
        traffic.parts_skipped += not is_seen


# ------------------------------------------------------------------------------------------------------------- messages


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one first dimension as bytes, ``[first dimension, bytes]``."""
    fields = []
    for tensor in tensors:
        field = tensor.flatten(1).contiguous().view(torch.uint8)
        fields += [field, field.new_zeros(field.shape[0], -field.shape[1] % _ALIGNMENT)]
    return torch.cat(fields, dim=1)


def unpacked(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that :func:`packed` has put into a message, with the shapes and dtypes of ``like`` behind the first
    dimension."""
    found, start = [], 0
    for tensor in like:
        size = math.prod(tensor.shape[1:]) * tensor.element_size()
        field = message[:, start : start + size].view(tensor.dtype)
        found.append(field.reshape(message.shape[0], *tensor.shape[1:]))
        start += size + -size % _ALIGNMENT
    return found


# ---------------------------------------------------------------------------------------------------------- collectives


def all_gather(tensors: Sequence[Tensor], place: Place, *, counts: bool = True) -> list[Tensor]:
    """Each of the tensors of all ranks, ``[W, ...]``, in one exchange."""
    message = packed([t[None] for t in tensors])
    everything = message
    if place.world > 1:
        everything, size = message.new_empty(place.world, message.shape[1]), message.numel() * (place.world - 1)
        if counts:
            _count_sent(size, place.world - 1)
        with _of_everybody(place, "the all-gather", size if counts else None):
            _all_gather(everything, message, group=place.group)
    return unpacked(everything, [t[None] for t in tensors])


def all_to_all(tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
    """Send part ``i`` of each tensor ``[W, ...]`` to rank ``i``, in one exchange; return what came from each rank."""
    if place.world == 1:
        return list(tensors)
    message = packed(tensors)
    received, size = torch.empty_like(message), message[0].numel() * (place.world - 1)
    _count_sent(size, place.world - 1)
    with _of_everybody(place, "the all-to-all", size):
        dist.all_to_all_single(received, message, group=place.group)
    return unpacked(received, tensors)


def from_first(tensor: Tensor, place: Place, what: str) -> Tensor:
    """The tensor of the group's first rank, on all of them; ``what``: the exchange, in words."""
    if place.world == 1:
        return tensor
    message = packed([tensor[None]])
    if place.rank == 0:
        _count_sent(message.numel() * (place.world - 1), place.world - 1)
    with _of_everybody(place, what, message.numel() if place.rank else 0):
        dist.broadcast(message, group_src=0, group=place.group)
    return unpacked(message, [tensor[None]])[0][0]


def sum_over_ranks(shares: Tensor, place: Place) -> Tensor:
    """What all ranks together have for this one: of ``[W, ...]`` part ``i`` is this rank's share of rank ``i``'s sum.

    A reduce-scatter in which the receiver adds, in the order of ranks; it sends as many bytes.
    """
    (received,) = all_to_all([shares], place)
    total = received[0].clone()
    for share in received[1:]:
        total += share
    return total


@contextlib.contextmanager
def _of_everybody(place: Place, what: str, received: int | None) -> Generator[None]:
    """Name the ranks of an exchange that fails; count what it brings, unless that is None, and the wait for it."""
    began = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        others = ", ".join(place.name(rank) for rank in range(place.world) if rank != place.rank)
        raise RankLostError(
            f"{place.name(place.rank)}: {what} failed: one of {others} did not come within the group's time-out, or is "
            f"gone: {error}"
        ) from error
    if received is not None:
        waited = time.perf_counter() - began
        _count_received(received, overlapped=False, waited=waited, under_way=waited)


# ---------------------------------------------------------------------------------------------------- from rank to rank


class Pending:
    """Messages under way.

    Args:
        works: torch's handles, one for each message or one for all.
        peers: the other rank of each message.
        place: of this process.
        what: the exchange, in words.
        kept: what is sent and received, which has to live as long as the messages travel.
        size: bytes that are received; None: they are not counted.
        began: when the backend was asked to begin with them, by ``time.perf_counter``.
    """

    def __init__(
        self, works: list[dist.Work], peers: list[int], place: Place, what: str, kept: list[Tensor], size: int | None,
        began: float,
    ) -> None:  # fmt: skip
        self._works, self._peers, self._place, self._what, self._kept = works, peers, place, what, kept
        self._size, self._began, self._parts = size, began, _since_start.parts
        self._taken_over = time.perf_counter() - began

    def wait(self) -> None:
        """Return when all of them have arrived."""
        if not self._works:
            return
        stopped = time.perf_counter()
        known = len(self._works) == len(self._peers)
        for number, work in enumerate(self._works):
            try:
                work.wait()
            except RuntimeError as error:
                peers = self._peers[number : number + 1] if known else self._peers
                raise _lost(self._place, self._what, peers, error) from error
        self._works, self._kept = [], []
        if self._size is not None:
            now, overlapped = time.perf_counter(), _since_start.parts > self._parts
            waited = self._taken_over + now - stopped
            _count_received(self._size, overlapped=overlapped, waited=waited, under_way=now - self._began)


def _lost(place: Place, what: str, peers: list[int], error: RuntimeError) -> RankLostError:
    names = " or ".join(dict.fromkeys(place.name(peer) for peer in peers))
    return RankLostError(
        f"{place.name(place.rank)}: {what} failed: {names} did not come within the group's time-out, or is gone: "
        f"{error}"
    )


def start(
    sent: list[tuple[Tensor, int]], received: list[tuple[Tensor, int]], place: Place, what: str, *, tag: int,
    counts: bool = True,
) -> Pending:  # fmt: skip
    """Begin to send tensors to ranks of the group, and to receive others from ranks into these tensors.

    Both ranks of a pair have to begin their messages of one tag in the same order.
    """
    operations = [
        *(dist.P2POp(dist.irecv, tensor, group=place.group, tag=tag, group_peer=peer) for tensor, peer in received),
        *(dist.P2POp(dist.isend, tensor, group=place.group, tag=tag, group_peer=peer) for tensor, peer in sent),
    ]
    peers = [peer for _, peer in (*received, *sent)]
    sizes = [sum(tensor.nbytes for tensor, _ in some) for some in (sent, received)]
    if counts:
        _count_sent(sizes[0], len(sent))
    began = time.perf_counter()
    try:
        works = dist.batch_isend_irecv(operations) if operations else []
    except RuntimeError as error:
        raise _lost(place, what, peers, error) from error
    kept = [tensor for tensor, _ in (*sent, *received)]
    return Pending(works, peers, place, what, kept, sizes[1] if counts else None, began)
