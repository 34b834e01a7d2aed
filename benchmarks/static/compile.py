"""Compile cases for targets in processes of their own: triton decides at import whether it interprets, and for whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.static.launches import Case

ROOT = Path(__file__).parents[2]

Job = tuple[str, list[Case]]  # a target, and what to compile for it
Row = dict[str, Any]  # what stand_in.resources says of a kernel, and its case


def compile_for(target: str, cases: list[Case]) -> list[Row]:
    """One row a kernel that the cases launch.

    Raises:
        RuntimeError: a case does not compile.
    """
    rows, failures = _compile((target, cases))
    if failures:
        raise RuntimeError("\n".join(failures))
    return rows


def compile_all(jobs: list[Job], processes: int, code: Path | None = None) -> tuple[list[Row], list[str]]:
    """The rows of all jobs, in their order, and what does not compile; ``processes`` jobs are worked on at a time.
    Machine code goes into the directory ``code``."""
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda job: _compile(job, code), jobs))
    return [row for rows, _ in found for row in rows], [failure for _, failures in found for failure in failures]


def _compile(job: Job, code: Path | None = None) -> tuple[list[Row], list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # first of all what is on the path already: which triton that is may be the question
    paths = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT), str(ROOT / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    target, cases = job
    arguments = ["-m", "benchmarks.static.stand_in", target, json.dumps(cases), *([str(code)] if code else [])]
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{target}: {done.stderr[-4000:]}")
    # what compilers print themselves stands before the last line
    said = json.loads(done.stdout.splitlines()[-1])
    return said["rows"], said["failures"]
