"""``python -m benchmarks lecture``: run the experiments, say what came out, write it down and draw it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lecture import experiments
from benchmarks.lecture.experiment import Experiment
from benchmarks.reporting.text import Table, number, show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks lecture",
        description="The lecture's systems, S1 to S8 and S10: what the lecture says of each, learned or computed. S9, "
        "whose claims are times and memory, is `python -m benchmarks --only sequence --out DIR`.",
    )
    parser.add_argument("--quick", action="store_true", help="the short form: fewer steps, smaller tasks")
    parser.add_argument("--only", metavar="NAME", choices=[*experiments()], help=f"one of {', '.join(experiments())}")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write NAME.json, NAME.svg and NAME.png there")
    return parser


def main(arguments: list[str]) -> int:
    """The command line. Its exit status is 1 where a claim does not hold."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # on more, sums need not repeat
    chosen = [experiment for name, experiment in experiments().items() if options.only in (None, name)]
    failed = []
    for experiment in chosen:
        print(f"\n{experiment.name} ({', '.join(experiment.systems)}): {experiment.claim}")
        began = time.perf_counter()
        result: dict[str, Any] = experiment.run(options.quick, options.seed, lambda line: print(line, flush=True))
        for table in tables(experiment, result):
            show(table)
        seconds = round(time.perf_counter() - began, 1)
        print(f"{seconds:.0f} s")
        if options.out:
            about = {"name": experiment.name, "systems": experiment.systems, "claim": experiment.claim}
            about |= {"quick": options.quick, "seed": options.seed, "seconds": seconds}
            files = write(experiment, about | result, options.out)
            print(f"written to {options.out}: {', '.join(file.name for file in files)}")
        failed += [(experiment.name, claim["text"]) for claim in result["claims"] if not claim["holds"]]
    for name, text in failed:
        print(f"{name}: does not hold: {text}", file=sys.stderr)
    return 1 if failed else 0


def tables(experiment: Experiment, result: dict[str, Any]) -> tuple[Table, Table]:
    """What was measured, and the claims."""
    return (
        _table(f"{experiment.name}: measured", result["rows"]),
        _table(f"{experiment.name}: claims", result["claims"]),
    )


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    header = tuple(dict.fromkeys(name for row in rows for name in row))  # not every row has every column
    return Table(title, header, tuple(tuple(_cell(row.get(name)) for name in header) for row in rows))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def write(experiment: Experiment, document: dict[str, Any], out: Path) -> list[Path]:
    """The result and its picture, the same bytes for the same result."""
    import matplotlib

    from benchmarks.reporting.looks import STYLE

    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{experiment.name}.json"]
    files[0].write_text(json.dumps(document, indent=1) + "\n")
    with matplotlib.rc_context(STYLE):
        figure = experiment.draw(document)
        for suffix, metadata in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
            files.append(out / f"{experiment.name}{suffix}")
            figure.savefig(files[-1], metadata=metadata)
    return files
