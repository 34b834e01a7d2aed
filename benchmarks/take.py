"""``python -m benchmarks take DIR``: what a call of ``make gpu`` left becomes a result of this project.

It is looked at first: a dry run, a run on a CPU or one that timed nothing is no result.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.reporting.document import read_run, timed_of, write_run
from benchmarks.reporting.report import report

RESULTS = Path(__file__).parent / "results"
_TAKEN_ALONG = ("answer.txt", "first_launches.json", "ncu.csv")


def take(source: Path, results: Path) -> list[Path]:
    """Copy what a call left, and write its report.

    Args:
        source: the folder that the call wrote.
        results: where the folder of the result is made, named by GPU, date and call.
    Returns:
        What was written.
    Raises:
        ValueError: it is no result, or is there already; the message says why.
    """
    facts = _facts(source)
    document = read_run(source / "run.json")
    environment = document["environment"]
    if facts["dry_run"] or not environment.get("gpu"):
        raise ValueError(f"{source}: expected a run on a GPU; this is {_what_else(facts)}")
    if environment["interpreted"]:
        raise ValueError(f"{source}: expected compiled kernels; TRITON_INTERPRET was set, which is no measure")
    if not timed_of(document["results"]):
        raise ValueError(f"{source}: expected timed cases; none of {len(document['results'])} rows has a time")
    into = results / _name(environment["gpu"], facts)
    if into.exists():
        raise ValueError(f"{into}: is there already; remove it to take {source} in its place")
    into.mkdir(parents=True)
    write_run(into / "run.json", document | {"call": facts})
    written = [into / "run.json"]
    for name in _TAKEN_ALONG:
        if (source / name).is_file():
            written.append(Path(shutil.copyfile(source / name, into / name)))
    return written + report(into / "run.json", into)


def _facts(source: Path) -> dict[str, Any]:
    path = source / "call.json"
    expected = f"{source}: expected the folder that a call of `make gpu` wrote, with call.json and run.json"
    if not (source / "run.json").is_file():
        raise ValueError(f"{expected}; it has no run.json")
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{expected}; {error}") from error
    if not isinstance(facts, dict) or not {"call", "dry_run", "versions"} <= set(facts):
        raise ValueError(f"{expected}; its call.json says nothing of a call")
    return facts


def _what_else(facts: dict[str, Any]) -> str:
    return "a dry run" if facts["dry_run"] else "one on a CPU"


def _name(gpu: str, facts: dict[str, Any]) -> str:
    """As in ``nvidia-h200-2026-11-29-call1``."""
    device = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{device}-{facts['versions']['date']}-call{facts['call']}"


def main(arguments: list[str]) -> int:
    """The command line: 2 where there is nothing to take."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks take", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="DIR", help="the folder that a call of `make gpu` wrote")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    try:
        written = take(options.source, options.into)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    document = json.loads(written[0].read_text())
    if document["state"] != "complete" or document["left_out"]:
        print(f"the run is {document['state']}, and {len(document['left_out'])} of its jobs were left out")
    print("\n".join(map(str, written)))
    print(f"to commit: git add {written[0].parent}")
    return 0
