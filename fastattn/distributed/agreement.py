"""Before a call's first exchange all ranks tell one another what they were called with, and compare.

Ranks that were called with something else would exchange messages of other sizes, or none at all: what they then get is
garbage, an error of the backend that names no argument, or a wait until the time-out. A header of some hundred bytes
costs one exchange.
"""

from __future__ import annotations

import collections
import json
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.distributed import exchange
from fastattn.distributed.layout import Place, ranks_of

_SIZE = 4096  # bytes of a header, the same on every rank, since none knows those of the others yet
_LONGEST_REFUSAL = 1000  # characters of an error of another rank that are passed on
_TAG = 2  # of the messages; those of the ring have others


class RanksDisagreeError(ValueError):
    """The ranks of a group were not called with the same arguments, or one of them refuses its own."""


def digest(tensor: Tensor | None) -> str | None:
    """A short text that tells a small tensor, which all ranks are to have alike, from others of its kind."""
    if tensor is None:
        return None
    numbers = tensor.detach().cpu().contiguous()
    value = zlib.crc32(numbers.view(-1).view(torch.uint8).numpy().tobytes()) if numbers.numel() else 0
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} of digest {value:08x}"


def agree(
    same: dict[str, Any],
    own: dict[str, Any],
    refusal: Exception | None,
    places: tuple[Place, ...],
    device: torch.device,
) -> list[dict[str, Any]]:
    """What each rank says for itself, in the order of ranks.

    Args:
        same: what has to be the same on every rank, by name, as JSON can write it.
        own: what need not be.
        refusal: the error that this rank would raise for its own arguments; None: it has nothing against them. It is
            raised here, behind the exchange, so that the others do not wait for a rank that has gone.
        places: of this process, one for each dimension of a mesh.
        device: where the tensors of the exchange lie.

    Raises:
        RanksDisagreeError: the message names the ranks and what they have.
        RankLostError: a rank did not come.
    """
    said: dict[str, Any] = {
        "rank": dist.get_rank(),
        "refusal": None if refusal is None else f"{refusal}"[:_LONGEST_REFUSAL],
        "same": same,
        "own": own,
    }
    headers = [said] if ranks_of(places) == 1 else _exchange(said, places, device)
    if refusal is not None:
        raise refusal
    refused = [f"rank {header['rank']}: {header['refusal']}" for header in headers if header["refusal"] is not None]
    if refused:
        raise RanksDisagreeError(f"another rank refuses its arguments, and nothing was exchanged: {'; '.join(refused)}")
    differences = _differences(headers)
    if differences:
        raise RanksDisagreeError(
            f"the ranks of the group were called with different arguments: {'; '.join(differences)}: expected the same "
            "on every rank"
        )
    return [header["own"] for header in headers]


def _differences(headers: list[dict[str, Any]]) -> list[str]:
    """For each argument that is not the same everywhere, who has what beside what most have."""
    found = []
    for name in headers[0]["same"]:
        values = [(header["rank"], json.dumps(header["same"][name])) for header in headers]
        usual = collections.Counter(value for _, value in values).most_common(1)[0][0]
        others = [f"rank {rank} has {value}" for rank, value in values if value != usual]
        if others:
            like = next(rank for rank, value in values if value == usual)
            found.append(f"{name}: {', '.join(others)}, rank {like} has {usual}")
    return found


def _exchange(said: dict[str, Any], places: tuple[Place, ...], device: torch.device) -> list[dict[str, Any]]:
    """The headers of all ranks: along the last dimension first, and then those of it along the one before."""
    text = json.dumps(said).encode()
    assert len(text) <= _SIZE, f"a header of {len(text)} bytes"
    messages = torch.frombuffer(bytearray(text.ljust(_SIZE)), dtype=torch.uint8)[None].to(device)
    for place in reversed(places):
        if device.type == "cpu":
            messages = torch.cat(_one_by_one(messages, place))
        else:
            messages = exchange.all_gather([messages], place, counts=False)[0].flatten(0, 1)
    return [json.loads(bytes(message.tolist())) for message in messages.cpu()]


def _one_by_one(message: Tensor, place: Place) -> list[Tensor]:
    """The headers of all ranks, each by a message of its own: a collective that fails does not say who was missing."""
    others = [rank for rank in range(place.world) if rank != place.rank]
    headers = [message if rank == place.rank else torch.empty_like(message) for rank in range(place.world)]
    what = "the exchange of headers, before anything else,"
    pending = [exchange.start([], [(headers[rank], rank)], place, what, tag=_TAG, counts=False) for rank in others]
    pending += [exchange.start([(message, rank)], [], place, what, tag=_TAG, counts=False) for rank in others]
    for each in pending:
        each.wait()
    return headers
