"""The cases of the host's times, measured in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.host.cases import all_cases

ROOT = Path(__file__).parents[2]
QUICK_SECONDS = 0.3

Row = dict[str, Any]


def run_cases(
    cases: list[str], *, seconds: float = 1.0, device: str = "cpu", cold: bool = False, profile: bool = False
) -> list[Row]:
    """A row for each case, as :func:`benchmarks.host.measure.measure` makes it.

    Args:
        cases: their names.
        seconds: of timing each.
        device: ``cpu``: on a launch that only counts; ``cuda``: on a GPU.
        cold: each case in a process of its own, with an empty cache of compiled kernels: its first call compiles all.
        profile: print where the time goes, instead; there are no rows then.
    Raises:
        RuntimeError: the process breaks down; the message holds what it says.
    """
    if cold:
        rows = []
        for name in cases:
            with tempfile.TemporaryDirectory() as cache:
                rows += _in_process([name], seconds, device, False, {"TRITON_CACHE_DIR": cache})
        return rows
    # what is already compiled on this machine is taken from triton's cache, and so no time of a first call is told
    return [row | {"first_s": None} for row in _in_process(cases, seconds, device, profile, {})]


def _in_process(cases: list[str], seconds: float, device: str, profile: bool, variables: dict[str, str]) -> list[Row]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    asked = json.dumps({"cases": cases, "seconds": seconds, "device": device, "profile": profile})
    command = [sys.executable, "-m", "benchmarks.host.process", asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.host.process ended with {done.returncode}: {done.stderr[-4000:]}")
    *printed, rows = done.stdout.splitlines()
    if profile:
        print("\n".join(printed))
    return json.loads(rows)


def missing() -> str | None:
    """What this machine lacks for a launch that only counts; None where it lacks nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compiler = os.environ.get("CC", "cc")
    return None if shutil.which(compiler) else f"there is no C compiler {compiler}, which triton needs"


def names(text: str = "", *, quick: bool = False) -> list[str]:
    """The cases whose name holds a text, or the few of them that ``make bench`` runs."""
    return [case.name for case in all_cases() if text in case.name and (case.quick or not quick)]
