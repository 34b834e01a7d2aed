"""A run as tables: Markdown, and one flat row a result as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import HEADER

OURS = "fastattn"
Result = dict[str, Any]


def timed_of(results: Iterable[Result]) -> list[Result]:
    return [row for row in results if row["wall_ms"] is not None]


def peer_of(results: list[Result]) -> str | None:
    """The variant that this family's ratios were taken to: it has none itself."""
    with_ratios = {row["case"] for row in results if row["ratio"] is not None}
    return next((r["variant"] for r in timed_of(results) if r["ratio"] is None and r["case"] in with_ratios), None)


def write_csv(path: Path, results: list[Result]) -> None:
    flat = [_flat(row) for row in results]
    columns = dict.fromkeys(name for row in flat for name in row)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


_SPREADS = ("wall_ms", "process_ms", "ratio", "process_ratio")


def _flat(row: Result) -> dict[str, Any]:
    """``wall_ms`` becomes ``wall_ms_median, wall_ms_p20, wall_ms_p80``, also where it is empty."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _SPREADS:
            flat |= {f"{name}_{part}": (value or {}).get(part) for part in ("median", "p20", "p80")}
        else:
            flat[name] = value
    return flat


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without the columns that are empty throughout."""
    shown = [i for i in range(len(header)) if any(line[i] for line in lines)]
    written = [[header[i] for i in shown], ["---"] * len(shown), *([line[i] for i in shown] for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in written) + "\n"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _spread(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.2f} [{value['p20']:.2f} {value['p80']:.2f}]"


def _line(row: Result, fastest: bool) -> tuple[str, ...]:
    """Under :data:`benchmarks.report.HEADER`; the fastest of a case is bold."""
    errors = _number(row["error"], ".1e"), _number(row["error_budget"], ".1e")
    wall, process = row["wall_ms"], row["process_ms"]
    if wall is None:
        return row["case"], row["variant"], f"{row['status']}: {row['reason']}", *("",) * 5, *errors, *("",) * 4
    median = f"{wall['median']:.3g}"
    return (
        row["case"],
        row["variant"],
        f"**{median}**" if fastest else median,
        _number(wall["p20"]),
        _number(wall["p80"]),
        _number(process and process["median"]),
        _spread(row["ratio"]),
        _spread(row["process_ratio"]),
        *errors,
        _number(row["tflops"]),
        _number(row["tb_per_s"]),
        _number(row["of_floor"], ".2f"),
        _number(row["peak_mib"]),
    )


def _family_table(results: list[Result]) -> str:
    best: dict[str, float] = {}
    for row in timed_of(results):
        best[row["case"]] = min(row["wall_ms"]["median"], best.get(row["case"], float("inf")))
    shown = [row for row in results if row["status"] != "refused" and not only_memory(row)]
    lines = [_line(row, bool(row["wall_ms"]) and row["wall_ms"]["median"] == best[row["case"]]) for row in shown]
    return _table(HEADER, lines) if lines else "Every variant refused.\n"


def only_memory(row: Result) -> bool:
    """A peak on a CPU comes from a process of its own, and so in a row of its own."""
    return row["status"] == "ok" and row["wall_ms"] is None


def _memory_table(results: list[Result]) -> str:
    rows = [row for row in results if only_memory(row)]
    ours = {row["case"]: row["peak_mib"] for row in rows if row["variant"] == OURS}
    lines = []
    for row in rows:
        share = ours[row["case"]] / row["peak_mib"] if row["case"] in ours else None
        lines.append((row["case"], row["variant"], f"{row['peak_mib']:.0f}", _number(share, ".2f")))
    return _table(("case", "variant", "MiB", f"{OURS} / this"), lines)


def _learned_table(rows: list[Result]) -> str:
    """Accuracy on sequences not trained on, at as many parameters and steps; the steps in brackets."""
    trained = [row for row in rows if "accuracy" in row]
    models = list(dict.fromkeys(row["model"] for row in trained))
    found = {(row["task"], row["model"]): f"{row['accuracy']:.3f} ({row['steps']})" for row in trained}
    tasks = dict.fromkeys(row["task"] for row in trained)
    return _table(("task", *models), [(task, *(found.get((task, m), "") for m in models)) for task in tasks])


def markdown(document: dict[str, Any], drawn: dict[str, list[tuple[str, str]]]) -> str:
    results = document["results"]
    sections = ["# Benchmarks\n"]
    facts = [(str(name), str(value)) for name, value in document.get("environment", {}).items()]
    sections.append("## Environment\n\n" + _table(("what", "value"), facts))
    limits = [(name, f"{value:.4g}") for name, value in (document.get("ceilings") or {}).items()]
    if limits:
        sections.append("## Ceilings, measured in the same run\n\n" + _table(("what", "value"), limits))
    for family in dict.fromkeys(row["family"] for row in results):
        of_family = [row for row in results if row["family"] == family]
        peer = peer_of(of_family)
        text = f"## {family}{f', ratio to {peer}' if peer else ''}\n\n"
        text += "".join(f"![{caption}]({name}.svg)\n\n" for name, caption in drawn.get(family, []))
        text += "Bold: the fastest of a case. In brackets: p20 and p80.\n\n" + _family_table(of_family)
        refused = sum(row["status"] == "refused" for row in of_family)
        text += f"\n{refused} rows refused; `results.csv` says why.\n" if refused else ""
        sections.append(text)
    if any(only_memory(row) for row in results):
        sections.append("## Peak memory, each in a process of its own\n\n" + _memory_table(results))
    if tiles := document.get("tiles"):
        header = ("mask", "tiles", "visited whole", "visited in part", "of all")
        lines = []
        for row in tiles:
            of_all = (row["whole"] + row["in_part"]) / row["tiles"]
            lines.append((row["mask"], *(str(row[name]) for name in ("tiles", "whole", "in_part")), f"{of_all:.2f}"))
        sections.append("## Tiles of scores that the kernels visit\n\n" + _table(header, lines))
    for case, variants in (document.get("theory") or {}).items():
        keys = ("variant", "parameters", "flops_per_token", "sequential_steps", "longest_path", "reach")
        symbols = ("complexity_per_layer", "sequential_per_layer", "path_in_symbols")
        lines = [(*(f"{v[k]}" for k in keys), *(f"O({v[k]})" for k in symbols)) for v in variants]
        header = (*keys, "operations of a layer", "its steps", "path")
        sections.append(f"## {case}, without a stopwatch (arXiv:1706.03762, table 1)\n\n" + _table(header, lines))
    if learned := document.get("quality"):
        sections.append("## What the ways of processing sequences learn\n\n" + _learned_table(learned))
    if left_out := document.get("left_out") or document.get("skipped"):
        sections.append("## Left out, for want of time\n\n" + "".join(f"- {name}\n" for name in left_out))
    return "\n".join(sections)
