"""The stopwatches against simulated clocks: a CPU with neighbours, and a GPU with an L2, streams and graphs.

No real time decides here; what a step takes is what the simulation says it takes.
"""

import contextlib
import gc
import itertools
import math
import operator
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import timing
from benchmarks.measure.timing import Timing, TooSlow, time_on_cpu, time_on_cuda

# ------------------------------------------------------------------------------------------------------ a simulated CPU


class Cpu:
    """Two cores: others keep ``neighbours`` of them busy, and let a step run for ``share`` of its time."""

    def __init__(self, monkeypatch, *, neighbours=0.0, share=1.0, threads=1):
        self.wall, self.own, self.others = 100.0, 10.0, 1000.0
        self.neighbours, self.share, self.pace = neighbours, share, lambda: 1.0
        clocks = types.SimpleNamespace(perf_counter=lambda: self.wall, process_time=lambda: self.own)
        monkeypatch.setattr(timing, "time", clocks)
        monkeypatch.setattr(timing, "_STAT", self)
        monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def step(self, seconds):
        def run():
            taken = seconds * self.pace()
            self.wall += taken / self.share
            self.own += taken
            self.others += self.neighbours * taken / self.share

        return run

    def read_text(self):
        """User, nice, system, idle, iowait, irq, softirq and steal; the idle ones grow as well."""
        tick = timing.os.sysconf("SC_CLK_TCK")
        user, steal, idle = (int(seconds * tick) for seconds in (self.own, self.others, 7 * self.wall))
        return f"cpu  {user} 0 0 {idle} {idle} 0 0 {steal} 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"


@pytest.fixture
def cpu(monkeypatch):
    return Cpu(monkeypatch)


def _timed(timings: Mapping[str, Timing | TooSlow | Exception]) -> Any:
    """They are timings, all of them."""
    assert all(isinstance(found, Timing) for found in timings.values()), timings
    return timings


def test_cpu_times_ratios_and_best_are_those_of_the_steps(cpu):
    steps = {name: cpu.step(1e-3 * cost) for name, cost in (("a", 6), ("b", 4), ("c", 5))}
    found = _timed(time_on_cpu(steps, "c", seconds=0.3))
    assert list(found) == ["a", "b", "c"]
    assert [found[name].wall_ms.median for name in "abc"] == pytest.approx([6, 4, 5])
    assert found["a"].process_ms.median == pytest.approx(6)
    assert found["a"].ratio.median == pytest.approx(1.2)
    assert found["a"].process_ratio.median == pytest.approx(1.2)
    assert found["c"].ratio is None
    assert [found[name].best for name in "abc"] == ["b", "c", "b"]
    assert [found[name].best_ratio.median for name in "abc"] == pytest.approx([1.5, 0.8, 1.25])
    assert {found[name].rounds for name in "abc"} == {20}
    assert found["a"].graph_ms is found["a"].warm_ms is found["a"].host_ms is None


def test_cpu_variants_of_different_functions_have_no_best(cpu):
    found = _timed(time_on_cpu({"a": cpu.step(1.0), "b": cpu.step(2.0)}, "b", seconds=0.0, same=False))
    assert found["a"].best is found["a"].best_ratio is None
    assert found["a"].ratio.median == pytest.approx(0.5)


def test_cpu_single_variant_has_nothing_beside_it(cpu):
    (found,) = _timed(time_on_cpu({"a": cpu.step(1.0)}, "peer", seconds=0.0)).values()
    assert found.ratio is found.best is found.best_ratio is None
    assert found.rounds == 6


def test_cpu_rounds_are_interleaved_and_alternate(cpu):
    order = []

    def step(name):
        run = cpu.step(1.0)
        return lambda: (order.append(name), run())

    time_on_cpu({"a": step("a"), "b": step("b")}, "a", seconds=0.0, minimum_rounds=4)
    assert "".join(order[4:]) == "baabbaab"  # the first four are looks at how long each takes


def test_cpu_short_steps_are_repeated_within_a_sample(cpu):
    calls = []
    run = cpu.step(1e-5)
    time_on_cpu({"a": lambda: (calls.append(1), run())}, "a", seconds=0.0, minimum_rounds=3)
    assert len(calls) == 2 + 3 * 200


def test_cpu_ratio_withstands_a_machine_that_slows_down(cpu):
    """Each sample takes 5 % longer than the one before: the second of a pair would, were it always the same."""
    paces = itertools.accumulate(itertools.repeat(1.05), operator.mul)
    cpu.pace = lambda: next(paces)
    found = _timed(time_on_cpu({"a": cpu.step(0.8), "b": cpu.step(1.0)}, "b", seconds=0.0, minimum_rounds=20))["a"]
    assert found.ratio.median == pytest.approx(0.8, rel=0.002)
    assert found.ratio.high / found.ratio.low < 1.11
    assert found.wall_ms.high / found.wall_ms.low > 2.0


def test_cpu_collects_no_garbage_while_it_times(cpu):
    run, seen = cpu.step(1.0), []
    time_on_cpu({"a": lambda: (seen.append(gc.isenabled()), run())}, "a", seconds=0.0)
    assert not any(seen[2:])
    assert gc.isenabled()


def test_cpu_leaves_out_what_would_take_too_long(cpu):
    """Five seconds, six times, within twenty: it runs once, and the others are timed without it."""
    calls = []
    run = cpu.step(5.0)
    steps = {"slow": lambda: (calls.append(1), run()), "a": cpu.step(3.0), "b": cpu.step(1.0)}
    found = time_on_cpu(steps, "slow", seconds=0.0, limit=20.0)
    assert len(calls) == 1
    assert list(found) == ["slow", "a", "b"]
    assert isinstance(found["slow"], TooSlow)
    assert found["slow"].reason == "a step takes 5 s: the 6 that are needed would take longer than 20 s"
    assert isinstance(found["a"], Timing)
    assert found["a"].ratio is None
    assert found["a"].best == "b"


@pytest.mark.parametrize("time_steps", [time_on_cpu, time_on_cuda], ids=["cpu", "cuda"])
def test_nothing_is_waited_for_where_every_step_takes_too_long(monkeypatch, time_steps):
    """The clock, a second later each time it is asked, is not asked until the time is over."""
    Gpu(monkeypatch)
    seconds = (float(second) for second in range(20))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))
    found = time_steps({"a": lambda: None}, "a", seconds=1e9, limit=1.0)
    assert isinstance(found["a"], TooSlow)


# ----------------------------------------------------------------------------------------------------------- contention


def test_contention_is_not_seen_on_an_idle_machine(cpu):
    found = _timed(time_on_cpu({"a": cpu.step(0.1)}, "a", seconds=1.0))["a"]
    assert found.waited == 0.0
    assert found.others == pytest.approx(0.0, abs=0.02)
    assert not found.contended


@pytest.mark.parametrize(
    ("neighbours", "share", "threads", "contended"),
    [(0.9, 1.0, 1, False), (1.0, 0.85, 1, True), (2.0, 0.5, 1, True), (1.5, 1.0, 1, True), (0.5, 1.0, 2, True)],
    ids=["the-other-core", "waits-a-little", "waits", "more-than-the-other-core", "two-threads"],
)
def test_contention_is_said(monkeypatch, neighbours, share, threads, contended):
    cpu = Cpu(monkeypatch, neighbours=neighbours, share=share, threads=threads)
    found = _timed(time_on_cpu({"a": cpu.step(0.1), "b": cpu.step(0.2)}, "a", seconds=1.0))["b"]
    assert found.others == pytest.approx(neighbours, abs=0.02)
    assert found.waited == (pytest.approx(1.0 - share) if threads == 1 else None)
    assert found.contended is contended


def test_contention_of_a_short_time_is_not_known(cpu):
    """Ticks are 10 ms: of 0.1 s they say little. That the process waited is known all the same."""
    cpu.share, cpu.neighbours = 0.5, 2.0
    found = _timed(time_on_cpu({"a": cpu.step(0.01)}, "a", seconds=0.0))["a"]
    assert found.others is None
    assert found.waited == pytest.approx(0.5)
    assert found.contended


@pytest.mark.parametrize("text", [None, "", "cpu 0 0 0 0 0 0 0 0 0 0\n", "intr 1 2 3 4 5 6 7 8\n", "cpu 1 2 3\n"])
def test_contention_is_not_known_where_the_system_does_not_say(cpu, monkeypatch, tmp_path, text):
    path: Path = tmp_path / "stat"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(timing, "_STAT", path)
    found = _timed(time_on_cpu({"a": cpu.step(0.1)}, "a", seconds=1.0))["a"]
    assert found.others is None
    assert not found.contended


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="there is no /proc/stat")
def test_contention_reads_what_this_system_writes():
    first = timing._busy_seconds()
    assert first > 0.0 or math.isnan(first)
    assert not timing._busy_seconds() < first


# ------------------------------------------------------------------------------------------------------ a simulated GPU


class Gpu:
    """One queue of work beside the host, an L2 that a flush empties, streams, and graphs that lose the gaps.

    Attributes:
        host: seconds on the host's clock.
        free: when the queue will be empty.
        capturing: the graph that takes the work instead.
        fails: captures do, as where a step waits for the GPU.
    """

    def __init__(self, monkeypatch, *, fails=False):
        self.host, self.free, self.is_cold = 50.0, 0.0, False
        self.capturing: Graph | None = None
        self.captures, self.fails = 0, fails
        self.generator = Generator()
        self.stream = self.default = types.SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(
            timing, "time", types.SimpleNamespace(perf_counter=lambda: self.host, process_time=lambda: 0.0)
        )
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: types.SimpleNamespace(zero_=self._flush))
        surface = {
            "Event": lambda enable_timing: Event(self),
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "CUDAGraph": lambda: Graph(self),
            "graph": self._capture,
            "stream": self._on_stream,
            "current_stream": lambda: self.stream,
            "default_generators": (self.generator,),
            "synchronize": self._synchronize,
            "_sleep": lambda cycles: self._queue(cycles / 2e9),
        }
        for name, value in surface.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def step(self, cold, *, warm=None, host=1e-5, gap=0.0):
        """So many seconds of the GPU where its inputs are not in the L2 or are, ``gap`` of them between its kernels."""

        def run():
            self.host += host
            if self.capturing is not None:
                self.capturing.work.append((cold - gap, (cold if warm is None else warm) - gap))
            else:
                self._work(cold, cold if warm is None else warm)

        return run

    def _work(self, cold, warm):
        self._queue(cold if self.is_cold else warm)
        self.is_cold = False

    def _queue(self, seconds):
        self.free = max(self.host, self.free) + seconds

    def _flush(self):
        self._queue(1e-4)
        self.is_cold = True

    def _synchronize(self):
        if self.capturing is not None:
            self.fails = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.free)

    @contextlib.contextmanager
    def _on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def _capture(self, graph, stream):
        """As torch's: where the end fails, it stays on its stream, and the generator is not told."""
        assert stream is not self.default
        before, self.stream = self.stream, stream
        self.capturing, self.generator.is_captured = graph, True
        self.captures += 1
        try:
            yield
        finally:
            self.capturing = None
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream, self.generator.is_captured = before, False


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, math.nan

    def record(self):
        self.at = max(self.gpu.host, self.gpu.free)

    def elapsed_time(self, stop):
        assert self.gpu.host >= stop.at, "not waited for"
        return 1e3 * (stop.at - self.at)


class Graph:
    def __init__(self, gpu):
        self.gpu, self.work = gpu, []

    def replay(self):
        self.gpu.host += 5e-6
        for cold, warm in self.work:
            self.gpu._work(cold, warm)


class Generator:
    is_captured = False

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, state):
        self.is_captured = state.is_captured


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_cuda_times_of_cold_and_warm_l2_of_graph_and_host(gpu):
    steps = {
        "a": gpu.step(1.2e-4, warm=0.9e-4, host=4e-5, gap=0.3e-4),
        "b": gpu.step(1.0e-4, warm=0.8e-4, host=2e-5, gap=0.1e-4),
    }
    found = _timed(time_on_cuda(steps, "b", seconds=0.0))
    assert [found[name].wall_ms.median for name in "ab"] == pytest.approx([0.12, 0.10])
    assert [found[name].warm_ms.median for name in "ab"] == pytest.approx([0.09, 0.08])
    assert [found[name].graph_ms.median for name in "ab"] == pytest.approx([0.09, 0.09])
    assert [found[name].host_ms.median for name in "ab"] == pytest.approx([0.04, 0.02])
    assert found["a"].ratio.median == found["a"].best_ratio.median == pytest.approx(1.2)
    assert (found["a"].best, found["b"].best, found["b"].ratio) == ("b", "a", None)
    assert found["a"].rounds == 6
    assert found["a"].process_ms is found["a"].process_ratio is found["a"].waited is found["a"].others is None
    assert not found["a"].contended


def test_cuda_variants_of_different_functions_have_no_best(gpu):
    found = _timed(time_on_cuda({"a": gpu.step(1.0), "b": gpu.step(2.0)}, "b", seconds=0.0, same=False))
    assert found["a"].best is found["a"].best_ratio is None
    assert found["a"].ratio.median == pytest.approx(0.5)


def test_cuda_does_not_time_the_launching(gpu):
    """Many small kernels, 5 ms of launching: the GPU waits until they are queued. It does not wait for ever."""
    (found,) = _timed(time_on_cuda({"a": gpu.step(5e-5, host=5e-3)}, "a", seconds=0.0)).values()
    assert found.wall_ms.high == pytest.approx(0.05)
    assert found.host_ms.low == pytest.approx(5.0)
    gpu.step(1.0, host=3.0)()
    before = gpu.host
    time_on_cuda({"a": gpu.step(1e-3, host=0.5)}, "a", seconds=0.0)
    assert gpu.host - before < 6 * 3 * 0.7 + 1.0


def test_cuda_large_steps_are_not_captured(gpu):
    found = _timed(time_on_cuda({"a": gpu.step(3e-4, warm=1e-4), "b": gpu.step(1e-4)}, "b", seconds=0.0))
    assert found["a"].graph_ms is None
    assert found["b"].graph_ms is not None
    assert gpu.captures == 1


@pytest.mark.parametrize("reason", ["end", "wait", "side-stream"])
def test_cuda_goes_on_where_a_capture_fails(monkeypatch, reason):
    """At its end, amid the step, or before it began: no graph, and everything else as if it had not been tried."""
    gpu = Gpu(monkeypatch, fails=reason == "end")
    run = gpu.step(1e-4, warm=0.5e-4)

    def step():
        run()
        if reason == "wait":
            torch.cuda.synchronize()
        if reason == "side-stream" and torch.cuda.current_stream() is not gpu.default:
            raise RuntimeError("this step knows the default stream only")

    found = _timed(time_on_cuda({"a": step, "b": gpu.step(3e-4)}, "b", seconds=0.0))
    assert found["a"].graph_ms is None
    assert found["a"].warm_ms.median == pytest.approx(0.05)
    assert gpu.captures == (0 if reason == "side-stream" else 1)
    assert torch.cuda.current_stream() is gpu.default
    assert gpu.capturing is None
    assert not gpu.generator.is_captured


def test_cuda_rounds_end_with_the_time_or_at_a_hundred(gpu):
    step = {"a": gpu.step(1e-3)}
    (short,) = _timed(time_on_cuda(step, "a", seconds=0.1)).values()
    (long,) = _timed(time_on_cuda(step, "a", seconds=60.0)).values()
    assert 6 < short.rounds < long.rounds == 100


def test_cuda_leaves_out_what_would_take_too_long(gpu):
    """Each round takes three samples: half a second makes nine in six rounds, a tenth does not."""
    found = time_on_cuda({"a": gpu.step(0.5), "b": gpu.step(0.1)}, "a", seconds=0.0, limit=5.0)
    assert found["a"] == TooSlow("a step takes 0.5 s: the 18 that are needed would take longer than 5 s")
    assert isinstance(found["b"], Timing)
