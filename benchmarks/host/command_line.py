"""``python -m benchmarks host``: what a call costs before its kernel runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.host.run_cases import QUICK_SECONDS, missing, names, run_cases
from benchmarks.reporting.host import host_table
from benchmarks.reporting.text import show


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
    """The command line. Its exit status is 1 where a case fails, 2 where there is no such case, or no such device."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    if options.device == "cpu" and (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    chosen = names(options.only, quick=options.quick)
    if not chosen:
        print(f"no case contains {options.only!r}: there are {', '.join(names())}", file=sys.stderr)
        return 2
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 1.0)
    rows = run_cases(chosen, seconds=seconds, device=options.device, cold=options.cold, profile=options.profile)
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
