"""``python -m benchmarks.gpu.one KEY ...``: single steps, for ncu and compute-sanitizer to look at.

A key is a variant and a case of the matrix or of the first launches: ``fastattn-gluon: kernels-b2-h2-l512-d128-...``.
Each step runs once before, so that it is compiled, and once in the range that cudaProfilerStart opens.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import Case
from benchmarks.families import families
from benchmarks.gpu import first_launches
from benchmarks.selection import Settings, entries
from benchmarks.variants import Refused


def known(device: str = "cuda") -> dict[str, tuple[str, Case]]:
    """Every key, with its variant and case."""
    chosen = entries(Settings(quick=False, device=device))
    small = [task.arguments for task in first_launches.tasks_of(chosen)]
    return {
        f"{name}: {case.name}": (name, case) for name, case in [(n, c) for c, names in chosen for n in names] + small
    }


def step(name: str, case: Case) -> None:
    """Run a variant's step twice, the second time in the profiler's range."""
    run = families()[case.family].variant(name).build(case, case.dtype)
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(keys: list[str]) -> int:
    """The command line: 2 where a key is unknown."""
    found = known()
    if unknown := [key for key in keys if key not in found]:
        print(f"unknown: {', '.join(unknown)}; expected keys such as {next(iter(found))}", file=sys.stderr)
        return 2
    for key in keys:
        print(key, flush=True)
        try:
            step(*found[key])
        except Refused as refusal:
            print(f"refused: {refusal}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
