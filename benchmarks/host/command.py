"""``python -m benchmarks host``: what a call costs before its kernel runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.host.cases import all_cases
from benchmarks.reporting.host import host_table
from benchmarks.reporting.text import show

ROOT = Path(__file__).parents[2]
QUICK_SECONDS = 0.3

Row = dict[str, Any]


def run_cases(
    names: list[str], *, seconds: float = 1.0, device: str = "cpu", cold: bool = False, profile: bool = False
) -> list[Row]:
    """A row for each case, as :func:`benchmarks.host.measure.measure` makes it.

    Args:
        names: of the cases.
        seconds: of timing each.
        device: ``cpu``: on a launch that only counts; ``cuda``: on a GPU.
        cold: each case in a process of its own, with an empty cache of compiled kernels: its first call compiles all.
        profile: print where the time goes, instead; there are no rows then.
    Raises:
        RuntimeError: the process breaks down; the message holds what it says.
    """
    if cold:
        rows = []
        for name in names:
            with tempfile.TemporaryDirectory() as cache:
                rows += _in_process([name], seconds, device, False, {"TRITON_CACHE_DIR": cache})
        return rows
    # what is already compiled on this machine is taken from triton's cache, and so no time of a first call is told
    return [row | {"first_s": None} for row in _in_process(names, seconds, device, profile, {})]


def _in_process(names: list[str], seconds: float, device: str, profile: bool, variables: dict[str, str]) -> list[Row]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    asked = json.dumps({"cases": names, "seconds": seconds, "device": device, "profile": profile})
    command = [sys.executable, "-m", "benchmarks.host.process", asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.host.process ended with {done.returncode}: {done.stderr[-4000:]}")
    *printed, rows = done.stdout.splitlines()
    if profile:
        print("\n".join(printed))
    return json.loads(rows)


def quick_names() -> list[str]:
    """The cases that ``make bench`` runs."""
    return [case.name for case in all_cases() if case.quick]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host",
        description="Measure what a call costs the host before its kernel runs, beside torch's. Needs no GPU: there "
        "kernels are compiled for sm_90, and their launches are counted and not executed.",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name holds TEXT")
    parser.add_argument("--quick", action="store_true", help="the few cases that `make bench` runs, briefly")
    parser.add_argument("--seconds", type=float, help="of timing a case (default: 1, quick 0.3)")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="each case in a process of its own, with an empty cache of kernels: tells how long the first call takes",
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of each case goes, instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the launches are real")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows, and on what they are, to FILE")
    return parser


def main(arguments: list[str]) -> int:
    """The command line. Its exit status is 1 where a case fails, 2 where there is no such case."""
    options = _parser().parse_args(arguments)
    names = [case.name for case in all_cases() if options.only in case.name and (case.quick or not options.quick)]
    if not names:
        print(f"no case contains {options.only!r}: there are {', '.join(c.name for c in all_cases())}", file=sys.stderr)
        return 2
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 1.0)
    rows = run_cases(names, seconds=seconds, device=options.device, cold=options.cold, profile=options.profile)
    if not options.profile:
        show(host_table(rows))
        if options.json:
            from benchmarks.environment import environment

            facts = environment()
            options.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"{row['case']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0
