"""What the machine can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.cases import Case
from benchmarks.timing import time_on_cpu, time_on_cuda

# On CUDA a copy then moves as many bytes as the norms of benchmarks.gpu; on a CPU more than its caches hold.
_MIB = {"cuda": 512, "cpu": 128}


def copy_rate(device: str, *, mib: int | None = None, seconds: float = 0.5) -> float:
    """TB/s of copying a tensor, the bytes read and those written counted; by the stopwatch of the cases.

    The 20th percentile of the times: a ceiling is what the machine can do, not what others left of it meanwhile.
    """
    kind = torch.device(device).type
    source = torch.ones((mib or _MIB[kind]) << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    time_steps = time_on_cuda if kind == "cuda" else time_on_cpu
    timing = time_steps({"copy": lambda: target.copy_(source)}, "copy", seconds=seconds)["copy"]
    return 2 * source.nbytes / timing.wall_ms.p20 / 1e9


def ceilings(cases: Iterable[Case]) -> dict[str, float]:
    """Those that the cases are held against, by name: nothing where memory bounds none of them."""
    device = next((case.device for case in cases if case.moved_bytes is not None), None)
    return {} if device is None else {"copy_tb_per_s": copy_rate(device)}


def describe(limits: dict[str, float]) -> str:
    """One line for people."""
    return f"copy {limits['copy_tb_per_s']:.3g} TB/s, read and written: floor = bytes that have to move / that"
