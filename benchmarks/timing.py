"""Stopwatches: paired and interleaved on a CPU, events with a cold L2 on CUDA."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

_SAMPLE_SECONDS = 2e-3  # a sample is at least this long, so that the clock's own cost does not count
_FLUSH_BYTES = 256 << 20  # more than any L2
_HEAD_START_CYCLES = 2_000_000  # about a millisecond of waiting on the GPU, while the host launches the step


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median, and the 20th and 80th percentiles around it."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one variant took for a step.

    Attributes:
        wall_ms: by the wall clock (CPU) or by events (CUDA).
        process_ms: processor time of all threads; where it is far from the wall clock, others wanted the cores.
        ratio: over the peer's, each pair measured back to back; None for the peer.
        process_ratio: the same in processor time, which contention disturbs least; None on CUDA.
        rounds: how many samples these are.
    """

    wall_ms: Spread
    process_ms: Spread | None
    ratio: Spread | None
    process_ratio: Spread | None
    rounds: int


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the rest of the process.

    Else a step of large tensors gives its memory back and faults it in again, or does not, as the heap happens to lie:
    one and the same step then takes up to seven times as long in one process as in another.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)  # the largest that it takes


Sample = tuple[float, float]  # wall and processor seconds of one step


def _sample(step: Callable[[], object], repeats: int) -> Sample:
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - process) / repeats


def time_on_cpu(
    steps: Mapping[str, Callable[[], object]], peer: str, *, seconds: float, minimum_rounds: int = 5
) -> dict[str, Timing]:
    """Time the steps in turn, round after round, so that what disturbs one disturbs all.

    Args:
        steps: by name; each has run before.
        peer: the one that ratios are taken to; without it there are none.
        seconds: for all of them together.
        minimum_rounds: even where that takes longer.
    """
    repeats = {}
    for name, step in steps.items():
        once = min(_sample(step, 1)[0] for _ in range(2))
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    enabled = gc.isenabled()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < minimum_rounds or time.perf_counter() < end:
            for name in steps if rounds % 2 else reversed(list(steps)):
                samples[name].append(_sample(steps[name], repeats[name]))
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(samples[name], None if name == peer else samples.get(peer)) for name in steps}


def _timing(own: list[Sample], peers: list[Sample] | None) -> Timing:
    wall, process = (Spread.of([1e3 * s[clock] for s in own]) for clock in (0, 1))
    ratios: list[Spread | None] = [None, None]
    if peers is not None:
        ratios = [Spread.of([a[clock] / max(b[clock], 1e-9) for a, b in zip(own, peers)]) for clock in (0, 1)]
    return Timing(wall, process, ratios[0], ratios[1], len(own))


def time_on_cuda(
    steps: Mapping[str, Callable[[], object]], peer: str, *, seconds: float, minimum_rounds: int = 5
) -> dict[str, Timing]:
    """As :func:`time_on_cpu`, by CUDA events, each step with its inputs out of the L2 cache.

    The GPU waits before each step, so that what is measured is its work and not the host's launching.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < minimum_rounds or (time.perf_counter() < end and rounds < 100):
        for name, step in steps.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start.record()
            step()
            stop.record()
            pairs[name].append((start, stop))
        torch.cuda.synchronize()
        rounds += 1
    milliseconds = {name: [a.elapsed_time(b) for a, b in events] for name, events in pairs.items()}

    def timing(name: str) -> Timing:
        ratio = None
        if name != peer and peer in steps:
            ratio = Spread.of([a / b for a, b in zip(milliseconds[name], milliseconds[peer])])
        return Timing(Spread.of(milliseconds[name]), None, ratio, None, rounds)

    return {name: timing(name) for name in steps}
