"""A run under way: jobs, one after another, into a document that is on disk after each.

So a budget, Ctrl-C and a kill cost the job in hand and nothing else, and ``--resume`` goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.progress import Progress
from benchmarks.reporting.document import SCHEMA, read_run, write_run
from benchmarks.run_case import DeviceLost

# What a process whose GPU gives no answer ends with: it is to be started again, with --resume.
HUNG = 75

# In a resumed run the first figures stand beside the last: these have to be alike.
_SAME = ("torch", "triton", "processor", "gpu", "threads", "backend", "kernels", "interpreted", "commit", "modified")

Tell = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of a run, small enough to lose.

    Attributes:
        key: unique in the run.
        kind: jobs of a kind are spread over the run, so that a budget cuts something off each.
        seconds: what it takes, by guess: for the time left and for the budget.
        work: is given the document so far, the parts that hung in an earlier try, and whom to tell which part is at
            work ("" for the whole) and what is done with it; returns what is added to the document: lists are made
            longer, dicts updated.
    """

    key: str
    kind: str
    seconds: float
    work: Callable[[dict[str, Any], list[str], Tell], dict[str, Any]]


def new_document(settings: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "state": "running",
        "settings": settings,
        "environment": environment,
        "seconds": 0.0,
        "done": [],
        "left_out": [],
        "hung": {},
        "failed": {},
        "ceilings": {},
        "results": [],
        "tiles": [],
        "host": [],
        "theory": {},
        "quality": [],
    }


def resumed(path: Path, settings: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The document of a run that was cut short, to go on with.

    Raises:
        ValueError: there is none, or it was made by other settings, code or machinery; the message says which.
    """
    document = read_run(path)
    pairs = [(f"--{name}", document["settings"].get(name), value) for name, value in settings.items()]
    pairs = [pair for pair in pairs if pair[0] != "--budget"]  # more time is a reason to go on
    pairs += [(name, document["environment"].get(name), environment.get(name)) for name in _SAME]
    for name, then, now in pairs:
        if then != now:
            raise ValueError(f"--resume: {path} was begun with {name} {then}, and now it is {now}: begin it anew")
    return document


def spread_out(jobs: Iterable[Job]) -> list[Job]:
    """Every kind's jobs in their order, at even distances over the whole."""
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    placed = [((i + 0.5) / len(of_kind), job) for of_kind in kinds.values() for i, job in enumerate(of_kind)]
    return [job for _, job in sorted(placed, key=lambda pair: pair[0])]


def carry_out(
    jobs: list[Job],
    document: dict[str, Any],
    path: Path | None,
    *,
    budget: float | None = None,
    watch: float | None = None,
) -> None:
    """Do what of the jobs the document does not have yet.

    Args:
        jobs: in the order of their worth: what the budget does not reach is left out, and named.
        document: grows; its state says in the end what became of the run.
        path: of its file, written after each job; None: nothing is written.
        budget: seconds from now on.
        watch: seconds without a sign of life after which the process is ended, with :data:`HUNG`; the file then says
            what hung. None: nobody watches.
    """
    begun, before = time.monotonic(), document["seconds"]

    def save() -> None:
        document["seconds"] = before + time.monotonic() - begun
        if path is not None:
            write_run(path, document)

    def bitten(job: str, part: str) -> None:
        document["hung"].setdefault(job, []).append(part)
        save()

    todo = [job for job in jobs if job.key not in document["done"]]
    document |= {"state": "running", "left_out": []}
    watchdog = None if watch is None else Watchdog(watch, bitten)
    expected = done = 0.0  # seconds of the jobs done, by guess and by the clock
    with Progress(total=sum(job.seconds for job in todo)) as progress:
        try:
            for job in todo:
                started, hung = time.monotonic(), document["hung"].get(job.key, [])
                pace = max(1.0, done / expected) if expected else 1.0
                late = budget is not None and started - begun + pace * job.seconds > budget
                if late or "" in hung:
                    document["left_out"].append(job.key)
                else:
                    tell = functools.partial(_tell, progress, watchdog, job.key)
                    tell("", "")
                    try:
                        document.update(_with(document, job, job.work(document, hung, tell)))
                    except DeviceLost as lost:
                        bitten(job.key, str(lost))
                        raise SystemExit(HUNG) from lost
                    except Exception as error:  # a job that breaks down takes no other along
                        document["failed"][job.key] = f"{type(error).__name__}: {error}"
                    expected, done = expected + job.seconds, done + time.monotonic() - started
                    save()
                progress.advance(job.seconds)
            document["state"] = "complete"
        except KeyboardInterrupt:
            document["state"] = "interrupted"
            document["left_out"] = [job.key for job in todo if job.key not in document["done"]]
        finally:
            if watchdog is not None:
                watchdog.stop()
    save()


def _tell(progress: Progress, watchdog: Watchdog | None, job: str, part: str, doing: str) -> None:
    progress.show(f"{job}: {doing} {part}".rstrip(": "))
    if watchdog is not None:
        watchdog.expect(job, part)


def _with(document: dict[str, Any], job: Job, more: dict[str, Any]) -> dict[str, Any]:
    """What changes in a document by a job that is done: all at once, or Ctrl-C could come between."""
    changed: dict[str, Any] = {"done": [*document["done"], job.key]}
    for name, value in more.items():
        changed[name] = [*document[name], *value] if isinstance(value, list) else document[name] | value
    failed = {key: reason for key, reason in document["failed"].items() if key != job.key}
    return changed | {"failed": failed}


class Watchdog:
    """Ends the process when nothing is heard: a kernel that never returns can be stopped in no other way."""

    def __init__(self, seconds: float, on_bite: Callable[[str, str], None]) -> None:
        self._seconds, self._on_bite = seconds, on_bite
        self._signs: queue.Queue[tuple[str, str] | None] = queue.Queue()
        threading.Thread(target=self._watch, daemon=True).start()

    def expect(self, job: str, part: str) -> None:
        """This part of this job is at work now; the next sign of life has to come in time."""
        self._signs.put((job, part))

    def stop(self) -> None:
        self._signs.put(None)

    def _watch(self) -> None:
        sign = self._signs.get()
        while sign is not None:
            try:
                sign = self._signs.get(timeout=self._seconds)
            except queue.Empty:
                try:
                    print(
                        f"\n{': '.join(filter(None, sign))}: no sign of life for {self._seconds:.0f} s", file=sys.stderr
                    )
                    self._on_bite(*sign)
                finally:
                    os._exit(HUNG)
