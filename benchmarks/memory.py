"""Peak memory of a step.

On CUDA what the allocator handed out at most. On a CPU the growth of the resident set of a process of its own, from
just before the first step to its highest mark: it counts what a profiler of tensors would miss (scratch of the matrix
products), and pages that were reserved but never touched do not count.

    python -m benchmarks.memory module-b1-h8-l2048-d64-eval-weights-float32 fastattn
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.registry import all_cases, families


def peak_on_cuda(step: Callable[[], object]) -> float:
    """MiB that ``step`` needs beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peaks_on_cpu(pairs: Sequence[tuple[Case, str]]) -> list[float | None]:
    """MiB for each (case, variant), a process each, all at once; None where there is no answer."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.memory"]
    processes = [
        subprocess.Popen(
            [*command, case.name, variant],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for case, variant in pairs
    ]
    answers: list[float | None] = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        answers.append(float(output) if process.returncode == 0 else None)
    return answers


def _resident(field: str) -> float:
    """MiB of a field of ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def _measure(case: Case, variant: str) -> float:
    torch.set_num_threads(1)
    family = families()[case.family]
    build = family.variant(variant).build
    # What is loaded and allocated once (libraries, threads, operators) is not the step's: a tiny one pays for it.
    build(case.tiny(), case.dtype)()
    step = build(case, case.dtype)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high mark
    before = _resident("VmRSS")
    kept = step()
    peak = _resident("VmHWM") - before
    del kept
    return peak


if __name__ == "__main__":
    _case = next(case for case in all_cases() if case.name == sys.argv[1])
    print(_measure(_case, sys.argv[2]))
