"""Where the host's time of one call goes: for whoever wants it to be less."""

from __future__ import annotations

import cProfile
import pstats
from typing import Any

import torch

import fastattn
from benchmarks.host.cases import HostCase, Step
from benchmarks.host.driver import Counter
from benchmarks.host.measure import WARM_UP, place_of

_PROFILED_STEPS = 200


def profile(case: HostCase, device: str, counter: Counter | None, most: int = 45) -> str:
    """Where the time of a call goes: by Python's functions, torch's operators, and its launches."""
    with fastattn.use_kernels(case.kernels):
        step = case.ours(place_of(device, "full"))
        for _ in range(WARM_UP):
            step()
        lines = [case.name]
        if counter is not None:
            counter.reset()
            step()
            lines.append(f"launches: {', '.join(counter.launches)}")
        lines += ["", *_by_function(step, most), "", *_by_operator(step)]
    return "\n".join(lines)


def _by_function(step: Step, most: int) -> list[str]:
    """Functions by the time spent in themselves. The profiler makes a Python function several times as slow, and what
    runs in C hardly: shares tell where to look, and no time is to be quoted."""
    found = cProfile.Profile()
    found.runcall(lambda: [step() for _ in range(_PROFILED_STEPS)])
    stats: Any = pstats.Stats(found)
    scale = 1e6 / _PROFILED_STEPS
    lines = ["a call, as profiled", f"{'own us':>8} {'all us':>8} {'calls':>7}  function"]
    by_own_time = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    for (file, line, name), (_, calls, own, cumulative, _) in by_own_time[:most]:
        place = name if file == "~" else f"{'/'.join(file.split('/')[-3:])}:{line} {name}"
        lines.append(f"{own * scale:8.1f} {cumulative * scale:8.1f} {calls / _PROFILED_STEPS:7.1f}  {place}")
    return lines


def _by_operator(step: Step) -> list[str]:
    """Torch's operators, which on a GPU would launch kernels of their own or allocate."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    rows = sorted(found.key_averages(), key=lambda row: -row.count)
    return ["torch's operators in a call", *(f"{row.count:8d}  {row.key}" for row in rows)]
