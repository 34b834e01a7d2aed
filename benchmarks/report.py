"""Rows as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Row
from benchmarks.timing import Spread

SCHEMA = 2


def row_as_json(row: Row) -> dict[str, Any]:
    """A row as plain values; the keys are the schema, those of the case the family's."""
    case, timing = row.case, row.timing

    def spread(value: Spread | None) -> dict[str, float] | None:
        return None if value is None else {"median": value.median, "p20": value.p20, "p80": value.p80}

    return {
        "case": case.name,
        **{field.name: _plain(getattr(case, field.name)) for field in dataclasses.fields(case)},
        "variant": row.variant,
        "status": row.status,
        "reason": row.reason,
        "error": None if row.accuracy is None else row.accuracy.error,
        "error_budget": None if row.accuracy is None else row.accuracy.budget,
        "wall_ms": spread(timing.wall_ms if timing else None),
        "process_ms": spread(timing.process_ms if timing else None),
        "ratio": spread(timing.ratio if timing else None),
        "process_ratio": spread(timing.process_ratio if timing else None),
        "rounds": None if timing is None else timing.rounds,
        "tflops": row.tflops,
        "moved_bytes": case.moved_bytes,
        "tb_per_s": row.tb_per_s,
        "of_floor": row.of_floor,
        "peak_mib": row.peak_mib,
    }


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def write_json(path: Path, rows: Iterable[Row], environment: dict[str, Any], **more: Any) -> None:
    """Write ``{"schema", "environment", "results", ...}``, whole or not at all."""
    document = {"schema": SCHEMA, "environment": environment, "results": [row_as_json(r) for r in rows], **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=1, allow_nan=True) + "\n")
    partial.replace(path)


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _ratio(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:.2f} [{value.p20:.2f} {value.p80:.2f}]"


HEADER = (
    "case",
    "variant",
    "ms",
    "p20",
    "p80",
    "cpu ms",
    "ratio to peer",
    "cpu ratio",
    "error",
    "budget",
    "TF/s",
    "TB/s",
    "of floor",
    "MiB",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table; a row that was not timed says why."""
    errors = ("", "") if row.accuracy is None else (f"{row.accuracy.error:.1e}", f"{row.accuracy.budget:.1e}")
    timing = row.timing
    if timing is None:
        return row.case.name, row.variant, f"{row.status}: {row.reason}".rstrip(": "), *("",) * 5, *errors, *("",) * 4
    wall, process = timing.wall_ms, timing.process_ms
    return (
        row.case.name,
        row.variant,
        _number(wall.median),
        _number(wall.p20),
        _number(wall.p80),
        _number(process.median if process else None),
        _ratio(timing.ratio),
        _ratio(timing.process_ratio),
        *errors,
        _number(row.tflops),
        _number(row.tb_per_s),
        _number(row.of_floor, ".2f"),
        _number(row.peak_mib),
    )


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """On a terminal with rich a drawn table, else aligned columns."""
    shown = [i for i in range(len(header)) if i < 2 or any(line[i] for line in lines)]
    header, lines = [header[i] for i in shown], [[line[i] for i in shown] for line in lines]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*header, title=title)
            for line in lines:
                table.add_row(*line)
            Console().print(table)
            return
    # A reason is longer than any number: it runs over the empty columns behind it
    widths = [
        max([len(header[i]), *(len(line[i]) for line in lines if i < 2 or not _is_reason(line[i]))])
        for i in range(len(header))
    ]
    print(f"\n{title}")
    for line in [header, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _is_reason(cell: str) -> bool:
    return cell.startswith(("refused", "wrong", "out of memory", "error"))
