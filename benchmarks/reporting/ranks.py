"""The tables of attention over several processes: for the terminal and for docs/distributed.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reporting.host import measured_on
from benchmarks.reporting.text import Table, as_markdown, number, ratio, table_of

Row = dict[str, Any]


def _time(row: Row) -> str:
    wall = row["wall_ms"]
    return f"{number(wall['median'])} [{number(wall['p20'])} {number(wall['p80'])}]"


def _of_case(rows: list[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case and row["refused"] is None]


def methods_table(rows: list[Row]) -> Table:
    """Every method and peer, by length."""
    header = ("tokens, method", "ms [p20 p80]", "of one process", "waited ms", "MB sent", "of them overlapped")
    lines: list[tuple[str, ...]] = []
    shown = _of_case(rows, "methods")
    for length in dict.fromkeys(row["length"] for row in shown):
        lines.append((f"{length}", *[""] * (len(header) - 1)))
        for row in shown:
            if row["length"] == length:
                counted = "bytes_received" in row
                share = row["bytes_overlapped"] / max(1, row["bytes_received"]) if counted else 0.0
                lines.append((
                    f"  {row['variant']}", _time(row), ratio(row.get("of_one_process")),
                    number(row["waited_ms"]["median"]) if counted else "",
                    number(row["bytes_sent"] / 1e6) if counted else "", f"{100 * share:.0f} %" if counted else "",
                ))  # fmt: skip
    return table_of(f"methods on {_ranks(rows)} ranks, forward and backward", header, lines, _notes(shown))


def balances_table(rows: list[Row]) -> Table:
    """Pairs that each rank sees, its processor's time and its waiting, under causality."""
    header = ("balance", "ms [p20 p80]", "pairs of each rank", "processor ms of each", "waited ms of each")
    lines = []
    shown = _of_case(rows, "balances")
    for row in shown:
        if "by_rank" in row:
            mean = sum(of_rank["pairs"] for of_rank in row["by_rank"]) / len(row["by_rank"])
            pairs = " / ".join(f"{of_rank['pairs'] / mean:.3f}" for of_rank in row["by_rank"])
            lines.append((
                row["balance"], _time(row), pairs,
                *(" / ".join(number(of_rank[what]["median"]) for of_rank in row["by_rank"])
                  for what in ("thread_ms", "waited_ms")),
            ))  # fmt: skip
    return table_of(f"a causal ring of {_ranks(rows)} ranks: pairs beside their mean", header, lines, _notes(shown))


def delays_table(rows: list[Row]) -> Table:
    """The ring with late messages, beside one that waits at once."""
    header = ("ms late", "ring, ms [p20 p80]", "waited", "waiting at once, ms [p20 p80]", "waited", "of it hidden")
    shown = _of_case(rows, "delays")
    usual, at_once = ({row["delay_ms"]: row for row in shown if row["is_at_once"] == is_at_once}
                      for is_at_once in (False, True))  # fmt: skip
    lines = []
    for delay, row in usual.items():
        waited = [of["waited_ms"]["median"] for of in (row, at_once[delay])]
        hidden = f"{100 * (1 - waited[0] / waited[1]):.0f} %" if delay else ""
        lines.append((f"{delay:g}", _time(row), number(waited[0]), _time(at_once[delay]), number(waited[1]), hidden))
    return table_of(f"a ring of {_ranks(rows)} ranks whose messages come late", header, lines, _notes(shown))


def refusals_table(rows: list[Row]) -> Table:
    """Who does not take a call, and in which words."""
    lines = [(row["variant"], str(row["refused"])) for row in rows if row["refused"] is not None]
    return table_of("refused", ("variant", "error"), list(dict.fromkeys(lines)))


def _notes(rows: list[Row]) -> list[str]:
    """What other programs did meanwhile."""
    return [f"other programs kept up to {max(row['others'] for row in rows):.2f} cores busy"] if rows else []


def _ranks(rows: list[Row]) -> int:
    return rows[0]["ranks"]


def tables(rows: list[Row]) -> list[Table]:
    """All of them."""
    return [make(rows) for make in (methods_table, balances_table, delays_table, refusals_table)]


def block(make: Callable[[list[Row]], Table]) -> Callable[[Path], str]:
    """One of the tables, and on what its rows were measured, as Markdown."""

    def made(path: Path) -> str:
        try:
            found = json.loads(path.read_text())
            facts, table = measured_on(found["environment"]), make(found["rows"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: expected what `python -m benchmarks ranks --json` writes; {error}") from error
        return f"{facts}.\n\n{as_markdown(table)}"

    return made
