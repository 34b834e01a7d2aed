"""Processes that do tasks side by side, each under a watchdog: one that hangs or dies takes no other along.

Nothing here imports torch, so that a process is there as soon as its tasks' module is.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterable
from multiprocessing import connection
from typing import Any, Literal

from benchmarks.gpu import children

_START_SECONDS = 180.0  # to be there: sixteen that import torch from a cold disk at once take a while
_KILL_SECONDS = 5.0  # for killed processes to be gone, all together; one that a driver holds may stay
_MOST_HANGS = 2  # of one group: after these the rest of it is not tried


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process is to do.

    Attributes:
        key: unique among the tasks.
        group: of those that are likely to hang if the others do.
        function: at the top of a module, so that another process can import it.
        arguments: of the function; they are pickled, as its result is.
    """

    key: str
    group: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a task.

    Attributes:
        fate: "done"; "raised" an exception; "hung": its process was ended; its process "died"; "skipped", since others
            of its group hung.
        result: of the function, where it is done.
        reason: why there is none, else.
        seconds: that it took.
    """

    fate: Literal["done", "raised", "hung", "died", "skipped"]
    result: Any = None
    reason: str = ""
    seconds: float = 0.0


class Unusable(Exception):
    """Raised by a task after which its process is to do no other; the message says what became of the task."""


def _serve(pipe: connection.Connection, modules: list[str]) -> None:
    """What a process of the pool does: load what its tasks need, say that it is there, and then one after another."""
    children.die_with_parent()  # a kernel that hangs would outlive a pool that is killed
    for module in modules:
        importlib.import_module(module)
    pipe.send(None)
    while True:
        task: Task = pipe.recv()
        try:
            pipe.send(("done", task.function(*task.arguments)))
        except Exception as error:
            fate = "unusable" if isinstance(error, Unusable) else "raised"
            pipe.send((fate, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


class _Worker:
    """One process, and what it is at."""

    def __init__(self, modules: list[str]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, modules), daemon=True)
        self._process.start()
        theirs.close()
        self.task: Task | None = None
        self.is_there = False
        self._expect(_START_SECONDS)

    def _expect(self, seconds: float) -> None:
        self.since = time.monotonic()
        self.deadline = self.since + seconds

    @property
    def is_idle(self) -> bool:
        return self.is_there and self.task is None

    def begin(self, task: Task, limit: float) -> None:
        self.pipe.send(task)
        self.task = task
        self._expect(limit)

    def end(self) -> int | None:
        """End the process, whatever it is at; its exit status, where it had one of its own."""
        self._process.join(0.1)
        status = self._process.exitcode
        self.kill()
        self.join(_KILL_SECONDS)
        return status

    def kill(self) -> None:
        self._process.kill()

    def join(self, seconds: float) -> None:
        """Wait until the process is gone, but no longer than this."""
        self._process.join(seconds)
        self.pipe.close()


def run(
    tasks: Iterable[Task],
    *,
    workers: int,
    limit: float,
    budget: float,
    tell: Callable[[Task, Report], None],
) -> list[Task]:
    """Do the tasks in their order, as many at a time as there are workers.

    Args:
        tasks: to do.
        workers: processes.
        limit: seconds without an answer after which a task's process is ended, and another one started.
        budget: seconds for all of them.
        tell: is told of each task as soon as something has become of it.
    Returns:
        The tasks that there was no time for. One that is cut off after half its limit has hung, for all that is known.
    """
    return _Pool(tasks, limit, tell).run(workers, time.monotonic() + budget)


class _Pool:
    def __init__(self, tasks: Iterable[Task], limit: float, tell: Callable[[Task, Report], None]) -> None:
        self._waiting = collections.deque(tasks)
        self._modules = sorted({task.function.__module__ for task in self._waiting})
        self._limit, self._tell = limit, tell
        self._hangs: collections.Counter[str] = collections.Counter()
        self._workers: list[_Worker] = []

    def run(self, workers: int, end: float) -> list[Task]:
        self._workers = [_Worker(self._modules) for _ in range(min(workers, len(self._waiting)))]
        try:
            while self._workers and time.monotonic() < end:
                self._hand_out()
                if not self._waiting and not any(worker.task for worker in self._workers):
                    break
                self._listen(min(end, *(w.deadline for w in self._workers if not w.is_idle)))
            return self._cut_off()
        finally:
            end = time.monotonic() + _KILL_SECONDS
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join(max(0.0, end - time.monotonic()))

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            while worker.is_idle and self._waiting:
                task = self._waiting.popleft()
                if self._hangs[task.group] < _MOST_HANGS:
                    try:
                        worker.begin(task, self._limit)
                    except OSError:  # it died while it had nothing to do
                        self._waiting.appendleft(task)
                        self._replace(worker)
                        break
                else:
                    self._tell(task, Report("skipped", reason=f"not launched: {_MOST_HANGS} of its kind hung before"))

    def _listen(self, until: float) -> None:
        """Hear what the workers say until then, and end those that should have said something."""
        wait = max(0.0, until - time.monotonic())
        heard = connection.wait([worker.pipe for worker in self._workers], wait)
        for worker in list(self._workers):
            if worker.pipe in heard:
                self._hear(worker)
            elif not worker.is_idle and time.monotonic() >= worker.deadline:
                self._hung(worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            self._died(worker)
            return
        if said is None:
            worker.is_there = True
            return
        fate, value = said
        self._settle(worker, Report("done", value) if fate == "done" else Report("raised", reason=value))
        if fate == "unusable":
            self._replace(worker)

    def _hung(self, worker: _Worker) -> None:
        if worker.task is not None:
            self._hangs[worker.task.group] += 1
            reason = f"gave no sign of life for {self._limit:.0f} s: its process was ended"
            self._settle(worker, Report("hung", reason=reason))
        self._replace(worker)

    def _died(self, worker: _Worker) -> None:
        status = worker.end()
        if worker.task is not None:
            self._settle(worker, Report("died", reason=f"its process died, with exit status {status}"))
        self._replace(worker)

    def _settle(self, worker: _Worker, report: Report) -> None:
        assert worker.task is not None
        self._tell(worker.task, dataclasses.replace(report, seconds=time.monotonic() - worker.since))
        worker.task = None

    def _replace(self, worker: _Worker) -> None:
        """By another process; one that never came to be there has no successor, which would fare no better."""
        worker.end()
        self._workers.remove(worker)
        if worker.is_there and self._waiting:
            self._workers.append(_Worker(self._modules))

    def _cut_off(self) -> list[Task]:
        left_out = []
        for worker in self._workers:
            if worker.task is None:
                continue
            seconds = time.monotonic() - worker.since
            if seconds < self._limit / 2:
                left_out.append(worker.task)
                continue
            self._settle(worker, Report("hung", reason=f"no answer after {seconds:.0f} s, when the time was up"))
        return [*left_out, *self._waiting]
