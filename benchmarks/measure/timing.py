"""Stopwatches: every variant has its turn in every round; by clocks on a CPU, by events with a cold L2 on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks.measure.spread import Spread

Step = Callable[[], object]
S = TypeVar("S")


def _nobody(name: str) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one variant took for a step.

    Attributes:
        wall_ms: by the wall clock (CPU) or by events with a cold L2 (CUDA).
        process_ms: processor time of all threads; None on CUDA.
        ratio: over the peer's, pair by pair: the two of a round; None for the peer.
        process_ratio: the same in processor time, which contention disturbs least; None on CUDA.
        best: the fastest of the other variants, where all compute the same; other forms of this one are none.
        best_ratio: over that one's, pair by pair.
        rounds: how many samples these are.
        waited: the share of the wall time in which the process had no core; only of one thread on a CPU.
        others: cores that other processes kept busy meanwhile; None on CUDA and where the system does not say.
        contended: others disturbed the measurement, see :func:`is_contended`; never said of CUDA.
        warm_ms: CUDA: right after another such step, what fits into the L2 being there.
        graph_ms: CUDA: as ``wall_ms``, replayed as a CUDA graph; of small steps that can be captured.
        host_ms: CUDA: the host's time to launch it on an idle GPU.
    """

    wall_ms: Spread
    process_ms: Spread | None
    ratio: Spread | None
    process_ratio: Spread | None
    best: str | None
    best_ratio: Spread | None
    rounds: int
    waited: float | None = None
    others: float | None = None
    contended: bool = False
    warm_ms: Spread | None = None
    graph_ms: Spread | None = None
    host_ms: Spread | None = None


@dataclasses.dataclass(frozen=True)
class TooSlow:
    """A variant that was not timed, since that would take longer than it may."""

    reason: str


# --------------------------------------------------------------------------------------------------------- what is fair


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the rest of the process.

    Else a step of large tensors gives its memory back and faults it in again, or does not, as the heap happens to lie:
    one and the same step then takes up to seven times as long in one process as in another.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)  # the largest that it takes


@contextlib.contextmanager
def without_collection() -> Generator[None]:
    """No garbage collection inside: it would fall on whichever step allocates the next object."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rounds(names: list[str], *, seconds: float, minimum: int, maximum: float = math.inf) -> Iterator[list[str]]:
    """The names once a round, every other round from the end, so that none always follows the same one."""
    end, rounds = time.perf_counter() + seconds, 0
    while names and (rounds < minimum or (rounds < maximum and time.perf_counter() < end)):
        yield names if rounds % 2 else names[::-1]
        rounds += 1


def _too_slow(once: float, samples: int, limit: float) -> TooSlow | None:
    if once * samples <= limit:
        return None
    return TooSlow(f"a step takes {once:.3g} s: the {samples} that are needed would take longer than {limit:g} s")


Samples = Mapping[str, Sequence[float]]  # milliseconds by variant; those of one round have the same index


def _ratio(samples: Samples, name: str, other: str | None) -> Spread | None:
    """A variant's time over another's, pair by pair; None where there is no other."""
    if other is None or other == name or other not in samples:
        return None
    return Spread.of([a / max(b, 1e-9) for a, b in zip(samples[name], samples[other])])


def _best_other(samples: Samples, name: str) -> str | None:
    """The fastest of those that are not another form of the same, as ``a-b`` is of ``a``."""
    others = [o for o in samples if o != name and not o.startswith(f"{name}-") and not name.startswith(f"{o}-")]
    return min(others, key=lambda other: statistics.median(samples[other]), default=None)


def _take_turns(
    names: Iterator[list[str]], sample: Callable[[str], S], turn: Callable[[str], None]
) -> tuple[dict[str, list[S]], dict[str, Exception]]:
    """Samples of each variant, round by round. One that fails has no more turns, and takes nobody along."""
    samples: dict[str, list[S]] = {}
    failures: dict[str, Exception] = {}
    for of_round in names:
        for name in of_round:
            if name in failures:
                continue
            turn(name)
            try:
                samples.setdefault(name, []).append(sample(name))
            except Exception as error:
                failures[name] = error
                samples.pop(name, None)
    return samples, failures


# ----------------------------------------------------------------------------------------------------------- contention

_STAT = Path("/proc/stat")
_STAT_SECONDS = 0.2  # it counts ticks of 10 ms: of a shorter time they say little
_WAITED, _CROWDED = 0.1, 0.25


class Neighbours:
    """What else runs on the machine's cores, from the making of this object on."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """How many were busy with anything but this process, on average; None where that is not known."""
        wall, own, busy = (now - start for now, start in zip(self._now(), self._start))
        # A system that hides its counters counts nothing, and then not this process either
        if wall < _STAT_SECONDS or not busy > 0.0:
            return None
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), _busy_seconds()


def _busy_seconds() -> float:
    """Of all cores together since the machine started; what a hypervisor took away counts. Not a number: not known."""
    try:
        label, *ticks = _STAT.read_text().split("\n", 1)[0].split()
    except (OSError, ValueError):
        return math.nan
    if label != "cpu" or len(ticks) < 8:
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(tick) for tick in ticks[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def is_contended(waited: float | None, others: float | None) -> bool:
    """Did others disturb the measurement: did it wait for a core, or want more cores than others left?"""
    crowded = others is not None and others + torch.get_num_threads() > (os.cpu_count() or 1) + _CROWDED
    return crowded or (waited is not None and waited > _WAITED)


# ------------------------------------------------------------------------------------------------------------------ CPU

_SAMPLE_SECONDS = 2e-3  # a sample is at least this long, so that the clock's own cost does not count


class _CpuSample(NamedTuple):
    """Milliseconds of one step."""

    wall: float
    process: float


def _sample(step: Step, repeats: int) -> _CpuSample:
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    wall, process = time.perf_counter() - wall, time.process_time() - process
    return _CpuSample(1e3 * wall / repeats, 1e3 * process / repeats)


def time_on_cpu(
    steps: Mapping[str, Step],
    peer: str,
    *,
    seconds: float,
    same: bool = True,
    limit: float = math.inf,
    minimum_rounds: int = 6,
    turn: Callable[[str], None] = _nobody,
) -> dict[str, Timing | TooSlow | Exception]:
    """Time the steps in turn, round after round, so that what disturbs one disturbs all.

    Args:
        steps: by name; each has run before.
        peer: the one that ratios are taken to; without it there are none.
        seconds: for all of them together.
        same: they compute the same, so that one of them is the best.
        limit: seconds that the fewest rounds of a step may take; one that takes longer is left out.
        minimum_rounds: even where that takes longer than ``seconds``; six are the fewest that bound a median.
        turn: is told whose turn it is.
    Returns:
        For each variant its times, or why there are none: it is too slow, or it failed.
    """
    repeats: dict[str, int] = {}
    slow: dict[str, TooSlow] = {}
    for name, step in steps.items():
        turn(name)
        once = _sample(step, 1).wall / 1e3
        if (refusal := _too_slow(once, minimum_rounds, limit)) is not None:
            slow[name] = refusal
            continue
        once = min(once, _sample(step, 1).wall / 1e3)
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-7)))
    with without_collection():
        neighbours = Neighbours()
        rounds = _rounds(list(repeats), seconds=seconds, minimum=minimum_rounds)
        samples, failures = _take_turns(rounds, lambda name: _sample(steps[name], repeats[name]), turn)
        others = neighbours.cores()

    wall = {name: [sample.wall for sample in of_step] for name, of_step in samples.items()}
    process = {name: [sample.process for sample in of_step] for name, of_step in samples.items()}

    def timing(name: str) -> Timing:
        best = _best_other(wall, name) if same else None
        waited = None
        if torch.get_num_threads() == 1:
            waited = max(0.0, 1.0 - sum(process[name]) / sum(wall[name]))
        return Timing(
            wall_ms=Spread.of(wall[name]),
            process_ms=Spread.of(process[name]),
            ratio=_ratio(wall, name, peer),
            process_ratio=_ratio(process, name, peer),
            best=best,
            best_ratio=_ratio(wall, name, best),
            rounds=len(wall[name]),
            waited=waited,
            others=others,
            contended=is_contended(waited, others),
        )

    return {name: slow.get(name) or failures.get(name) or timing(name) for name in steps}


# ----------------------------------------------------------------------------------------------------------------- CUDA

_FLUSH_BYTES = 256 << 20  # more than any L2
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, about
_HEAD_START_SECONDS = 1e-3, 0.1  # at least and at most
_GRAPH_MS = 0.2  # a longer step hides its launches, and a graph gains it nothing
_MOST_ROUNDS = 100


class _CudaSample(NamedTuple):
    """Milliseconds of one step: of the host, and of the GPU with its L2 cold and warm."""

    host: float
    cold: float
    warm: float


def time_on_cuda(
    steps: Mapping[str, Step],
    peer: str,
    *,
    seconds: float,
    same: bool = True,
    limit: float = math.inf,
    minimum_rounds: int = 6,
    turn: Callable[[str], None] = _nobody,
    replays: bool = True,
) -> dict[str, Timing | TooSlow | Exception]:
    """As :func:`time_on_cpu`, by CUDA events, each step with its inputs out of the L2 cache.

    The GPU waits before each step, so that what is measured is its work and not the host's launching; of a step that
    takes the host more than 50 ms to launch, that shows all the same. ``replays``: small steps may be captured.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    head_starts: dict[str, float] = {}
    slow: dict[str, TooSlow] = {}
    for name, step in steps.items():
        turn(name)
        host, once = _by_host(step)
        if (refusal := _too_slow(once, len(_CudaSample._fields) * minimum_rounds, limit)) is not None:
            slow[name] = refusal
            continue
        least, most = _HEAD_START_SECONDS
        head_starts[name] = min(max(least, 2.0 * host), most)
    rounds = _rounds(list(head_starts), seconds=seconds, minimum=minimum_rounds, maximum=_MOST_ROUNDS)

    def sample(name: str) -> _CudaSample:
        step, head_start = steps[name], head_starts[name]
        host = 1e3 * _by_host(step)[0]
        return _CudaSample(host, _by_events(step, head_start, flush), _by_events(step, head_start))

    with without_collection():
        samples, failures = _take_turns(rounds, sample, turn)

    cold = {name: [sample.cold for sample in of_step] for name, of_step in samples.items()}

    def timing(name: str) -> Timing:
        best = _best_other(cold, name) if same else None
        replayed = None
        if replays and statistics.median(cold[name]) < _GRAPH_MS:
            turn(name)
            replayed = _by_replays(steps[name], len(cold[name]), flush)
        return Timing(
            wall_ms=Spread.of(cold[name]),
            process_ms=None,
            ratio=_ratio(cold, name, peer),
            process_ratio=None,
            best=best,
            best_ratio=_ratio(cold, name, best),
            rounds=len(cold[name]),
            warm_ms=Spread.of([sample.warm for sample in samples[name]]),
            graph_ms=None if replayed is None else Spread.of(replayed),
            host_ms=Spread.of([sample.host for sample in samples[name]]),
        )

    return {name: slow.get(name) or failures.get(name) or timing(name) for name in steps}


def _by_host(step: Step) -> tuple[float, float]:
    """Seconds until the host has launched the step on an idle GPU, and until the GPU has done it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return launched - start, time.perf_counter() - start


def _by_events(step: Step, head_start: float, flush: torch.Tensor | None = None) -> float:
    """Milliseconds that the GPU takes, after it has waited for so many seconds while the host launches."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    torch.cuda._sleep(round(head_start * _CYCLES_PER_SECOND))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _by_replays(step: Step, rounds: int, flush: torch.Tensor) -> list[float] | None:
    """Milliseconds of as many replays of the step as a CUDA graph; None where it cannot be captured."""
    graph = _captured(step)
    if graph is None:
        return None
    try:
        return [_by_events(graph.replay, _HEAD_START_SECONDS[0], flush) for _ in range(rounds)]
    except Exception:
        return None


def _captured(step: Step) -> torch.cuda.CUDAGraph | None:
    """The step as a graph, or None: one that waits for the GPU, or goes back through an older graph, has none."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        # The outer context leaves the stream whatever happens: the inner one stays on it where its end fails
        with torch.cuda.stream(side):
            for _ in range(3):  # what a first call does on a stream, a capture may not
                step()
            with torch.cuda.graph(graph, stream=side):
                step()
    except Exception:
        torch.cuda.synchronize()
        # torch 2.11 leaves the generators believing that they are captured, and then each later dropout raises
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        return None
    torch.cuda.current_stream().wait_stream(side)
    return graph
