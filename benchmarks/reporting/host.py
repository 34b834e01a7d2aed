"""The table of the host's times: for the terminal, for a run's report and for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.reporting.text import Table, as_markdown, number, ratio, table_of

_NOTES = (
    "host, peer: median and [least] of many batches, microseconds of one thread",
    "one row: the peer on tensors of one row, where nothing is left to compute",
    "kernels: the compiled ones among the launches, all of which the first call compiles if no cache has them",
    "Python: calls of functions in a call, those out of Python into C among them",
)


def host_table(rows: Iterable[dict[str, Any]]) -> Table:
    """A line a call; what failed has none."""
    lines = [
        (
            row["case"],
            _microseconds(row["ours_us"]),
            f"{_microseconds(row['peer_us'])} {row['against']}",
            number(row["least_us"]["minimum"]) if "least_us" in row else "",
            ratio(row["ratio"]),
            str(len(row["launches"])) if "launches" in row else "",
            str(row["kernels"]) if "kernels" in row else "",
            number(row["first_s"]) + " s" if row["first_s"] is not None else "",
            str(row["python_calls"]),
        )
        for row in rows
        if not row["error"]
    ]
    header = ("call", "host us", "peer us", "one row", "ratio [95 %]", "launches", "kernels", "first call", "Python")
    return table_of("host: what a call costs before its kernel runs", header, lines, _NOTES)


def _microseconds(spread: dict[str, float]) -> str:
    return f"{number(spread['median'])} [{number(spread['minimum'])}]"


def host_block(path: Path) -> str:
    """On what the rows of a file were measured, and their table, as Markdown.

    Raises:
        ValueError: the file holds no such rows; the message names it.
    """
    try:
        found = json.loads(path.read_text())
        facts, table = measured_on(found["environment"]), host_table(found["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `python -m benchmarks host --json` writes; {error}") from error
    return f"{facts}.\n\n{as_markdown(table)}"


def measured_on(facts: dict[str, Any]) -> str:
    """The machine, the versions and the commit of a measurement, in one line."""
    commit = f"{(facts['commit'] or 'unknown')[:10]}{' and changes' if facts['modified'] else ''}"
    where = f"{facts['processor']} of {facts['cores']} cores, load {facts['load']:.1f}"
    return f"{where}, python {facts['python']}, torch {facts['torch']}, triton {facts['triton']}, commit {commit}"
