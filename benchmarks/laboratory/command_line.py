"""``python -m benchmarks laboratory``: what the kernels take, compiled for GPUs that need not be here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.laboratory import pairs, schedule, table
from benchmarks.laboratory.cases import TARGETS, table_jobs
from benchmarks.laboratory.compile import Row, compile_all
from benchmarks.reporting.text import show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks laboratory",
        description="Compile every kernel for its targets, without a GPU, and print what it takes.",
    )
    parser.add_argument("--target", choices=TARGETS, help="one of them; without it all, which takes minutes")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose kernel or case holds TEXT")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write {table.PATH.name} anew, with --with {pairs.PATH.name}, too, which takes all rows; with --only "
        "and the name of a case, or a part of it, the other cases' rows stay",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows, with all opcodes and loops, to FILE")
    parser.add_argument("--sass", metavar="DIR", type=Path, help="write machine code to DIR")
    parser.add_argument(
        "--with", dest="others", metavar="PYTHON", nargs="+", default=[],
        help="compile with the triton of these Pythons, too, and print registers and spills side by side",
    )  # fmt: skip
    parser.add_argument(
        "--schedules",
        action="store_true",
        help="compile nothing: simulate how evenly the Hopper forward shares work",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (default: %(default)s)")
    return parser


def main(arguments: list[str]) -> int:
    """The command line. Its exit status is 1 where a case does not compile; the page then stays as it is."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.write and (options.target or (options.only and options.others)):
        parser.error("--write writes all targets, and with --with all cases: it goes without --target and --only")
    if options.schedules:
        show(schedule.table())
        return 0
    jobs = [(target, cases) for target, cases in table_jobs() if options.target in (None, target)]
    # a text that no case has is a kernel's name, and which cases launch that is known once they are compiled
    names_cases = any(options.only in case["name"] for _, cases in jobs for case in cases)
    if options.write and not names_cases:
        parser.error(f"--write with --only takes what is in the name of a case: {options.only!r} is not")
    if names_cases:
        chosen = [(target, [case for case in cases if options.only in case["name"]]) for target, cases in jobs]
        jobs = [(target, cases) for target, cases in chosen if cases]
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found, failures = compile_all(jobs, options.processes, options.sass)
    rows = _asked_for(found, options.only)
    compared = [rows]
    for python in options.others:
        found, failed = compile_all(jobs, options.processes, None, python)
        compared.append(_asked_for(found, options.only))
        failures += [f"{python}: {failure}" for failure in failed]
    beside = pairs.Pairs(compared) if options.others and all(compared) else None
    failures += beside.differences if beside is not None else []
    for failure in failures:
        print(failure, file=sys.stderr)
    if not rows:
        print(f"no kernel or case holds {options.only!r}", file=sys.stderr)
        return 2
    for one in table.tables(rows).values():
        show(one)
    if beside is not None:
        for one in (*beside.tables().values(), beside.differing()):
            show(one)
    print(f"\nkernels: {len(rows)}, seconds: {time.perf_counter() - began:.0f}, triton {rows[0]['triton']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.write and not failures:
        kept = table.rows_without(options.only, rows[0]["triton"]) if options.only else {}
        table.PATH.write_text(table.document(rows, kept))
        print(f"written: {table.PATH}")
        if beside is not None:
            pairs.PATH.write_text(beside.document())
            print(f"written: {pairs.PATH}")
    return 1 if failures else 0


def _asked_for(rows: list[Row], text: str) -> list[Row]:
    """The rows whose kernel or case holds the text."""
    return [row for key, row in table.keyed(rows) if text in key.case or text in key.kernel]
