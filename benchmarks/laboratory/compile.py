"""Compile cases for targets in processes of their own: triton decides at import whether it interprets, and for whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.laboratory.launch_case import Case

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


def compile_all(
    jobs: list[Job], processes: int, code: Path | None = None, python: str = sys.executable
) -> tuple[list[Row], list[str]]:
    """The rows of all jobs, in their order, and what does not compile; ``processes`` jobs are worked on at a time.
    Machine code goes into the directory ``code``. The triton is that of ``python``'s environment."""
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda job: _compile(job, code, python), jobs))
    return [row for rows, _ in found for row in rows], [failure for _, failures in found for failure in failures]


def _compile(job: Job, code: Path | None = None, python: str = sys.executable) -> tuple[list[Row], list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # first of all what is on the path already: which triton that is may be the question
    paths = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT), str(ROOT / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    target, cases = job
    arguments = ["-m", "benchmarks.laboratory.stand_in", target, json.dumps(cases), *([str(code)] if code else [])]
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode < 0:  # a signal: the compiler has crashed, over one of the cases
        if len(cases) == 1:
            said = f"the compiler ended with {done.returncode}: {done.stderr[-1000:]}"
            return [], [f"{cases[0].get('name', cases[0])} for {target} does not compile: {said}"]
        alone = [_compile((target, [case]), code, python) for case in cases]
        return [row for rows, _ in alone for row in rows], [failure for _, failures in alone for failure in failures]
    if done.returncode != 0:
        raise RuntimeError(f"{target}: {done.stderr[-4000:]}")
    # what compilers print themselves stands before the last line
    said = json.loads(done.stdout.splitlines()[-1])
    return said["rows"], said["failures"]
