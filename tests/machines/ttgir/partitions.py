"""The partitions of a warp-specialised program, as threads of which one runs at a time, and who goes next."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tests.machines.findings import Finding


class _Cancelled(BaseException):
    """Ends a partition because another one has failed."""


class Partition:
    """A thread that runs only while it has the turn."""

    def __init__(self, name: str, body: Callable[[], Any], owner: Partitions) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for: Callable[[], str] = lambda: ""
        self.patient, self.done, self.cancelled = False, False, False
        self.result: Any = None

        def run() -> None:
            self.turn.acquire()
            try:
                if not self.cancelled:
                    self.result = body()
            except _Cancelled:
                pass
            except BaseException as error:
                owner.error = owner.error or error
            self.done = True
            owner.scheduler.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


class Partitions:
    """Takes turns among partitions, and lets copies land in between.

    A copy lands between two turns with a probability that each launch draws, or when nobody can go on without it. A
    partition that is patient goes on only when no other can.
    """

    def __init__(self, rng: random.Random, copies: list[Any]) -> None:
        self.rng, self.copies = rng, copies
        self.scheduler = threading.Semaphore(0)
        self.members: list[Partition] = []
        self.current: Partition | None = None
        self.error: BaseException | None = None
        self.promptness = rng.choice((0.0, 0.05, 0.3))

    def start(self, name: str, body: Callable[[], Any]) -> Partition:
        self.members.append(Partition(name, body, self))
        return self.members[-1]

    def wait(self, ready: Callable[[], bool], waits_for: Callable[[], str], *, patient: bool = False) -> None:
        """Give the turn away, and go on when ``ready``; ``waits_for`` says what for, should nobody be able to go on."""
        partition = self.current
        assert partition is not None
        partition.ready, partition.waits_for, partition.patient = ready, waits_for, patient
        self.scheduler.release()
        partition.turn.acquire()
        if partition.cancelled:
            raise _Cancelled

    def run(self) -> None:
        """Until every partition is done."""
        try:
            while waiting := [member for member in self.members if not member.done]:
                ready = [member for member in waiting if member.ready()]
                eager = [member for member in ready if not member.patient]
                if self.copies and (not ready or self.rng.random() < (self.promptness if eager else 0.5)):
                    self.copies.pop(self.rng.randrange(len(self.copies))).land()
                elif ready:
                    self._resume(self.rng.choice(eager or ready))
                else:
                    raise Finding(
                        "deadlock", "; ".join(f"{each.name} waits for {each.waits_for()}" for each in waiting)
                    )
                if self.error is not None:
                    raise self.error
        finally:
            for member in self.members:
                member.cancelled = True
                if not member.done:
                    member.turn.release()
                member.thread.join()

    def _resume(self, partition: Partition) -> None:
        self.current = partition
        partition.turn.release()
        self.scheduler.acquire()
