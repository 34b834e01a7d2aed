"""``python -m benchmarks ranks``: what attention over several processes waits for, beside what it computes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.ranks.run_cases import run_cases
from benchmarks.reporting.ranks import tables
from benchmarks.reporting.text import show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ranks",
        description="Share a sequence out among processes of this machine, over gloo, and time attention's forward and "
        "backward: by every method, by a ring that waits for each message at once, with messages that come late, and "
        "beside torch's.",
    )
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="processes (default: 2)")
    parser.add_argument(
        "--lengths", metavar="N,N,...", type=_lengths, default=(512, 1024, 2048),
        help="of whole sequences, multiples of twice the ranks (default: 512,1024,2048)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a case (default: 4)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows, and on what they are, to FILE")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def main(arguments: list[str]) -> int:
    """The command line. Its exit status is 2 where ranks and lengths do not go together."""
    options = _parser().parse_args(arguments)
    uneven = [length for length in options.lengths if length % (2 * options.ranks)]
    if uneven:
        print(f"--lengths {uneven[0]}: expected multiples of {2 * options.ranks} for --ranks {options.ranks}",
              file=sys.stderr)  # fmt: skip
        return 2
    rows = run_cases(options.ranks, options.lengths, options.seconds)
    for table in tables(rows):
        show(table)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return 0
