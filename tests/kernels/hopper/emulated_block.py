"""A thread block of the emulator: partitions as tasks that take turns, copies under way, and who goes next."""

from __future__ import annotations

import collections
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Deadlock(Exception):
    """Nobody can go on."""


class Unfinished(Exception):
    """A thread block ended before what it had started."""


class _Cancelled(BaseException):
    """Ends a task because another one failed."""


class Task:
    """A partition: a thread that runs only while it has the turn."""

    def __init__(self, block: Block, body: Callable[[], None], name: str, warps: int) -> None:
        self.name, self.warps = name, warps
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for, self.patient, self.done, self.cancelled = "", False, False, False
        self.products: collections.deque[Any] = collections.deque()
        self.stores: collections.deque[Callable[[], None]] = collections.deque()

        def run() -> None:
            self.turn.acquire()
            try:
                if not self.cancelled:
                    body()
            except _Cancelled:
                pass
            except BaseException as error:
                block.error = block.error or error
            self.done = True
            block.scheduler.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


class Copy(NamedTuple):
    """A copy under way; a late one lands when nobody can go on without it."""

    land: Callable[[], None]
    late: bool


class Block:
    """A thread block: its tasks, and the copies under way."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], rng: random.Random) -> None:
        self.program, self.grid, self.rng = program, grid, rng
        self.tasks: list[Task] = []
        self.copies: list[Copy] = []
        self.names = itertools.count()  # of barriers, in the order in which they are allocated
        self.scheduler = threading.Semaphore(0)
        self.current: Task | None = None
        self.error: BaseException | None = None

    def start(self, body: Callable[[], None], name: str, warps: int) -> Task:
        task = Task(self, body, name, warps)
        self.tasks.append(task)
        return task

    def wait(self, what: str, ready: Callable[[], bool] = lambda: True, *, patient: bool = False) -> None:
        """The current task goes on when ``ready``; a patient one only when nobody else can."""
        task = self.current
        assert task is not None
        if ready() and not patient:
            return
        task.ready, task.waits_for, task.patient = ready, what, patient
        self.scheduler.release()
        task.turn.acquire()
        if task.cancelled:
            raise _Cancelled

    def _resume(self, task: Task) -> None:
        self.current = task
        task.turn.release()
        self.scheduler.acquire()

    def run(self) -> None:
        try:
            while waiting := [task for task in self.tasks if not task.done]:
                ready = [task for task in waiting if task.ready()]
                eager = [task for task in ready if not task.patient]
                prompt = [copy for copy in self.copies if not copy.late]
                choices: list[Any] = eager or [*ready, *prompt] or self.copies
                if not choices:
                    raise Deadlock("; ".join(f"{task.name} waits for {task.waits_for}" for task in waiting))
                chosen = self.rng.choice(choices)
                if isinstance(chosen, Task):
                    self._resume(chosen)
                else:
                    self.copies.remove(chosen)
                    chosen.land()
                if self.error is not None:
                    raise self.error
            for task in self.tasks:
                if task.products or task.stores:
                    raise Unfinished(f"{task.name} ended with products or stores that nobody waited for")
            if self.copies:
                raise Unfinished("the thread block ended with copies under way")
        finally:
            for task in self.tasks:
                task.cancelled = True
                if not task.done:
                    task.turn.release()
                task.thread.join()


running: list[Block] = []  # the one that runs is the last: one at a time, in any thread


def this_block() -> Block:
    """The one whose task is asking."""
    return running[-1]


def this_task() -> Task:
    task = this_block().current
    assert task is not None
    return task
