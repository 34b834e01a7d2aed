"""One call's host time beside its peer's, its launches, and what its first call takes."""

from __future__ import annotations

import cProfile
import dataclasses
import pstats
import time
from typing import Any

import torch

import fastattn
from benchmarks.host.cases import HostCase, Place, Scale, Step
from benchmarks.host.driver import Counter
from benchmarks.measure.spread import Spread
from benchmarks.measure.timing import without_collection

_BATCH_SECONDS = 2e-3  # of steps between two looks at the clock: less than what a scheduler gives a process
_LEAST_ROUNDS = 7
WARM_UP = 5  # calls behind the first, in which caches of every kind may fill

Row = dict[str, Any]


class Stopwatch:
    """The host's time: on a CPU that of this thread alone, so that other processes take little part in it; on a GPU by
    the wall clock, from an idle device until everything is queued."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._clock = time.perf_counter if self._on_gpu else time.thread_time

    def seconds(self, step: Step, count: int) -> float:
        """Of a step, on the average of so many."""
        if self._on_gpu:
            torch.cuda.synchronize()
        begun = self._clock()
        for _ in range(count):
            step()
        return (self._clock() - begun) / count

    def microseconds(self, steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
        """Samples of each step, which have their turns round after round, for so many seconds."""
        # a GPU's queue of launches is 1024 long, and who fills it waits for kernels
        counts, most = {}, 50 if self._on_gpu else 1000
        for name, step in steps.items():
            step()
            counts[name] = min(max(round(_BATCH_SECONDS / max(self.seconds(step, 3), 1e-6)), 1), most)
        samples: dict[str, list[float]] = {name: [] for name in steps}
        end = time.monotonic() + seconds
        with without_collection():
            while len(next(iter(samples.values()))) < _LEAST_ROUNDS or time.monotonic() < end:
                for name, step in steps.items():
                    samples[name].append(1e6 * self.seconds(step, counts[name]))
        return samples


def place_of(device: str, scale: Scale) -> Place:
    """Of ours everywhere, and of a peer on a GPU: bfloat16 of full size."""
    return Place(device, torch.bfloat16 if scale == "full" else torch.float32, scale)


def measure(case: HostCase, device: str, seconds: float, counter: Counter | None) -> Row:
    """A row of one case: what its first call takes, what every later one does, and the peer's beside it."""
    with fastattn.use_kernels(case.kernels):
        ours = case.ours(place_of(device, "full"))
        begun = time.perf_counter()
        ours()
        first = time.perf_counter() - begun
        row: Row = {"case": case.name, "against": case.against, "first_s": first, "error": None}
        for _ in range(WARM_UP):
            ours()
        if counter is not None:
            counter.reset()
            ours()
            row |= {"launches": counter.launches, "kernels": counter.kernels}
        row["python_calls"] = _python_calls(ours)
        steps = {"ours": ours, "peer": case.peer(place_of(device, "small" if device == "cpu" else "full"))}
        if device == "cpu":
            steps["least"] = case.peer(place_of(device, "least"))
        samples = Stopwatch(device).microseconds(steps, seconds)
    for name, values in samples.items():
        row[f"{name}_us"] = dataclasses.asdict(Spread.of(values)) | {"minimum": min(values)}
    row["ratio"] = dataclasses.asdict(Spread.of([a / b for a, b in zip(samples["ours"], samples["peer"])]))
    return row


def _python_calls(step: Step, count: int = 5) -> int:
    """Calls of Python's functions, and out of Python into C, that a step makes: a number that no clock blurs."""
    profile = cProfile.Profile()
    profile.runcall(lambda: [step() for _ in range(count)])
    return round(pstats.Stats(profile).total_calls / count)  # type: ignore[attr-defined]
