"""``python -m benchmarks report``: runs as Markdown, CSV and pictures, the same bytes for the same run."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reporting import readme
from benchmarks.reporting.document import Document, Result, by_family, read_run
from benchmarks.reporting.findings import findings
from benchmarks.reporting.kernels import kernel_tables
from benchmarks.reporting.tables import (
    ceilings_table,
    environment_table,
    family_table,
    host_tables,
    memory_table,
    quality_tables,
    theory_tables,
    tiles_table,
)
from benchmarks.reporting.text import Table, as_markdown

if TYPE_CHECKING:
    from benchmarks.reporting.pictures import Picture

_HOW_TO_READ = """\
Bold is the fastest of a case. In brackets stand, behind a time, its 20th and 80th percentile, and behind a ratio the
95 % interval of its median; ratios are of two times of the same round, and below 1 a row is faster than what it is held
against. `of floor` is the time that the ceilings allow over the time taken; `error/budget` is against
float64. `results.csv` has every row with every figure.
"""
_UNFINISHED = {
    "interrupted": "**This run was interrupted**: what it did not reach is named under Left out.",
    "running": "**This run is not finished**: it is still going on, or its process was ended.",
}
_SPREADS = ("wall_ms", "process_ms", "ratio", "process_ratio", "best_ratio", "warm_ms", "graph_ms", "host_ms")
_PARTS = ("median", "p20", "p80", "low", "high")


def report(run: Path, out: Path) -> list[Path]:
    """Write ``report.md``, ``results.csv`` and the pictures of a run.

    Args:
        run: the JSON file of a run.
        out: a folder, made where it is missing; of each picture it gets an SVG and a PNG, where the run holds its data
            and matplotlib is there.
    Returns:
        What was written, the report first.
    Raises:
        ValueError: ``run`` is no run of this schema.
    """
    document = read_run(run)
    out.mkdir(parents=True, exist_ok=True)
    text, table = out / "report.md", out / "results.csv"
    drawn = _draw(document, out)
    text.write_text(_markdown(document, drawn))
    _write_csv(table, document["results"])
    return [text, table, *(path for picture in drawn or () for path in picture.files)]


def _draw(document: Document, out: Path) -> list[Picture] | None:
    """None without matplotlib, which is in the extra ``bench`` only."""
    try:
        from benchmarks.reporting.pictures import draw
    except ImportError:
        return None
    return draw(document, out)


def _markdown(document: Document, drawn: list[Picture] | None) -> str:
    pictures: dict[str, str] = {}
    for picture in drawn or ():
        link = f"![{picture.caption}]({picture.files[0].name})\n\n"
        pictures[picture.section] = pictures.get(picture.section, "") + link
    settings = ", ".join(f"{name} {value}" for name, value in document["settings"].items() if value not in (None, ""))
    intro = [_UNFINISHED.get(document["state"], ""), f"Settings: {settings}; it took {document['seconds']:.0f} s."]
    intro.append("No pictures: matplotlib is not installed." if drawn is None else "")
    sections = ["# Benchmarks\n\n" + "\n\n".join(filter(None, intro)) + "\n"]
    sections += [_section(table) for table in (environment_table(document), ceilings_table(document)) if table.lines]
    if sentences := findings(document):
        sections.append("## Findings\n\n" + "".join(f"- {sentence}\n" for sentence in sentences))
    if document["results"]:
        sections.append("## How to read the tables\n\n" + _HOW_TO_READ)
    sections += [_section(family_table(document, name), pictures.get(name, "")) for name in by_family(document)]
    rest = [memory_table(document), tiles_table(document), *theory_tables(document)]
    sections += [_section(table) for table in rest if table.lines]
    for index, table in enumerate(quality_tables(document)):
        sections.append(_section(table, pictures.get("quality", "") if index == 0 else ""))
    sections += [_section(table) for table in (*kernel_tables(document), *host_tables(document))]
    if document["left_out"]:
        sections.append("## Left out\n\n" + "".join(f"- {name}\n" for name in document["left_out"]))
    return "\n".join(sections)


def _section(table: Table, pictures: str = "") -> str:
    return f"## {table.title[0].upper()}{table.title[1:]}\n\n{pictures}{as_markdown(table)}"


def _write_csv(path: Path, results: list[Result]) -> None:
    flat = [_flat(row) for row in results]
    columns = dict.fromkeys(name for row in flat for name in row)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Result) -> dict[str, Any]:
    """``wall_ms`` becomes ``wall_ms_median, wall_ms_p20, ...``, also where it is empty."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _SPREADS:
            flat |= {f"{name}_{part}": (value or {}).get(part) for part in _PARTS}
        else:
            flat[name] = value
    return flat


# -------------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is 1 where a block is out of date, 2 where a file is no run or a mark wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description="Write runs as Markdown, CSV and pictures."
    )
    parser.add_argument(
        "runs", metavar="RUN.json", type=Path, nargs="*", help="what `python -m benchmarks --json` or --out wrote"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to (default: beside run.json, else RUN)")
    parser.add_argument("--committed", action="store_true", help="every benchmarks/results/*/run.json, and --readme")
    parser.add_argument("--readme", action="store_true", help="fill the measured blocks of README.md and docs")
    parser.add_argument("--check", action="store_true", help="write nothing; do the blocks say what their runs say?")
    options = parser.parse_args(arguments)
    if not (options.runs or options.committed or options.readme or options.check):
        parser.error("expected RUN.json, --committed, --readme or --check")
    try:
        if options.check:
            return _check()
        targets = _targets(options.runs, options.out)
        if options.committed:
            targets |= {run: run.parent for run in readme.committed_runs(readme.ROOT)}
        for run, out in targets.items():
            for path in report(run, out):
                print(path)
        if options.committed or options.readme:
            for path in readme.fill(readme.ROOT):
                print(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _targets(runs: list[Path], out: Path | None) -> dict[Path, Path]:
    """A folder for each run: its own, or under ``out`` where there are several."""
    if out is None:
        return {run: run.parent if run.name == "run.json" else run.with_suffix("") for run in runs}
    if len(runs) == 1:
        return {runs[0]: out}
    names = [run.parent.name if run.name == "run.json" else run.stem for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"--out {out}: several runs are called alike: {', '.join(names)}; report them one by one")
    return {run: out / name for run, name in zip(runs, names)}


def _check() -> int:
    stale = readme.outdated(readme.ROOT)
    for block in stale:
        print(f"{block}: out of date; `make report` writes it anew", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
