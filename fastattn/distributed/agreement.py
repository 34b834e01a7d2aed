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
from torch import Tensor

from fastattn.distributed import exchange
from fastattn.distributed.layout import Place

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
    same: dict[str, Any], own: dict[str, Any], refusal: Exception | None, place: Place, device: torch.device
) -> list[dict[str, Any]]:
    """What each rank says for itself, in the order of ranks.

    Args:
        same: what has to be the same on every rank, by name, as JSON can write it.
        own: what need not be.
        refusal: the error that this rank would raise for its own arguments; None: it has nothing against them. It is
            raised here, behind the exchange, so that the others do not wait for a rank that has gone.
        place: of this process.
        device: where the tensors of the exchange lie.

    Raises:
        RanksDisagreeError: the message names the ranks and what they have.
        RankLostError: a rank did not come.
    """
    said: dict[str, Any] = {
        "refusal": None if refusal is None else f"{refusal}"[:_LONGEST_REFUSAL],
        "same": same,
        "own": own,
    }
    headers = [said] if place.world == 1 else _exchange(said, place, device)
    if refusal is not None:
        raise refusal
    refused = [(rank, header["refusal"]) for rank, header in enumerate(headers) if header["refusal"] is not None]
    if refused:
        words = "; ".join(f"{place.name(rank)}: {text}" for rank, text in refused)
        raise RanksDisagreeError(f"another rank refuses its arguments, and nothing was exchanged: {words}")
    differences = _differences([header["same"] for header in headers], place)
    if differences:
        raise RanksDisagreeError(
            f"the ranks of the group were called with different arguments: {'; '.join(differences)}: expected the same "
            "on every rank"
        )
    return [header["own"] for header in headers]


def _differences(said: list[dict[str, Any]], place: Place) -> list[str]:
    """For each argument that is not the same everywhere, who has what beside what most have."""
    found = []
    for name in said[0]:
        values = [json.dumps(of_rank[name]) for of_rank in said]
        usual = collections.Counter(values).most_common(1)[0][0]
        others = [f"{place.name(rank)} has {value}" for rank, value in enumerate(values) if value != usual]
        if others:
            like = next(place.name(rank) for rank, value in enumerate(values) if value == usual)
            found.append(f"{name}: {', '.join(others)}, {like} has {usual}")
    return found


def _exchange(said: dict[str, Any], place: Place, device: torch.device) -> list[dict[str, Any]]:
    text = json.dumps(said).encode()
    assert len(text) <= _SIZE, f"a header of {len(text)} bytes"
    message = torch.frombuffer(bytearray(text.ljust(_SIZE)), dtype=torch.uint8).to(device)
    if device.type == "cpu":
        messages = _one_by_one(message, place)
    else:
        messages = list(exchange.all_gather([message], place, counts=False)[0].cpu())
    return [json.loads(bytes(other.tolist())) for other in messages]


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
