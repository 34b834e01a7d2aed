"""Other ways for messages to travel than the ring's: waited for at once, or late."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Generator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.distributed import exchange

_TAGS, _SLOTS = 2, 64  # of the ring's messages; of each tag no more than so many are under way between two ranks


def sending_times(world: int) -> Tensor:
    """Room for when each message was sent, which all ranks share: ``[from, to, tag, number]``, in seconds."""
    return torch.zeros(world, world, _TAGS, _SLOTS, dtype=torch.float64).share_memory_()


class Line:
    """Between the ranks of this machine: a message is there no sooner than some time after it was sent.

    Waiting for it takes no processor, as with a network card.

    Args:
        times: of :func:`sending_times`, the same on all ranks.
        rank: of this process.
    """

    def __init__(self, times: Tensor, rank: int) -> None:
        self._times, self._rank = times, rank
        self._numbers: collections.Counter[tuple[int, int, int]] = collections.Counter()

    def _next(self, source: int, target: int, tag: int) -> tuple[int, int, int, int]:
        stream = source, target, tag
        number = self._numbers[stream] % _SLOTS
        self._numbers[stream] += 1
        return *stream, number

    def begin(self, operations: list[dist.P2POp], begin: Any, seconds: float) -> list[Any]:
        """Begin torch's sends and receives, whose messages come late."""
        late: list[tuple[int, int, int, int] | None] = []
        for operation in operations:
            if operation.op is dist.irecv:
                late.append(self._next(operation.peer, self._rank, operation.tag))
            else:
                self._times[self._next(self._rank, operation.peer, operation.tag)] = time.monotonic()
                late.append(None)
        works = begin(operations)
        return [work if at is None else _Late(work, self._times, at, seconds) for work, at in zip(works, late)]


class _Late:
    """A handle of a receive that ends no sooner than some time after the sending."""

    def __init__(self, work: dist.Work, times: Tensor, at: tuple[int, int, int, int], seconds: float) -> None:
        self._work, self._times, self._at, self._seconds = work, times, at, seconds

    def wait(self) -> None:
        """Return when the message has arrived, and the time is over."""
        self._work.wait()
        time.sleep(max(0.0, self._times[self._at].item() + self._seconds - time.monotonic()))


@contextlib.contextmanager
def transport(line: Line, *, is_at_once: bool, delay_ms: float | None) -> Generator[None]:
    """Inside of it the messages of rings travel so; the header before a call travels as ever."""
    usual, usual_begin = exchange.start, dist.batch_isend_irecv

    def late(operations: list[dist.P2POp]) -> list[Any]:
        return line.begin(operations, usual_begin, 1e-3 * (delay_ms or 0.0))

    def start(*arguments: Any, counts: bool = True, **words: Any) -> exchange.Pending:
        if not counts:
            return usual(*arguments, counts=False, **words)
        with contextlib.nullcontext() if delay_ms is None else mock.patch.object(dist, "batch_isend_irecv", late):
            pending = usual(*arguments, **words)
        if is_at_once:
            pending.wait()
        return pending

    with mock.patch.object(exchange, "start", start):
        yield
