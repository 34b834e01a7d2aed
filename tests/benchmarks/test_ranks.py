"""``python -m benchmarks ranks``: every case once, on two processes, and the tables of it."""

from __future__ import annotations

import json

import pytest

from benchmarks.ranks.command_line import main
from benchmarks.ranks.run_cases import run_cases
from benchmarks.reporting.ranks import balances_table, block, delays_table, methods_table, refusals_table


def found(rows, case, **words):
    return [row for row in rows if row["case"] == case and all(row[name] == value for name, value in words.items())]


def test_rows_say_what_is_so(tmp_path):
    """All in one test, since starting the processes takes longer than what they do. They hold each variant to one
    process themselves."""
    rows = run_cases(2, (16,), 0.01, fewest=1)
    check_overlap(found(rows, "methods"))
    # each of the four messages of a ring that waits at once is sent when that of the other rank has come; and the last
    # message of any ring is one that nothing is computed beside
    for row in found(rows, "delays"):
        assert row["wall_ms"]["low"] >= row["delay_ms"] * (4 if row["is_at_once"] else 1)
    pairs = {row["balance"]: [of["pairs"] for of in row["by_rank"]] for row in found(rows, "balances", method="ring")}
    assert pairs == {"none": [36, 100], "zigzag": [68, 68], "stripe": [64, 72]}
    assert all(row["refused"] for row in found(rows, "public")), "torch's takes it: time it beside the others"
    check_tables(rows, tmp_path / "2.json")


def check_overlap(rows):
    """On two ranks three of a ring's four messages: keys forward and backward, and the first gradients."""
    for row in rows:
        if "bytes_received" in row:
            share = row["bytes_overlapped"] / row["bytes_received"]
            assert share == (0.75 if row["method"] == "ring" and not row["is_at_once"] else 0.0)
            assert row["waited_ms"]["median"] <= row["under_way_ms"]["median"]
    assert [row["method"] for row in rows] == ["one process", "ring", "ring", "allgather", "ulysses", "torch ring"]


def check_tables(rows, path):
    """Every row has its line."""
    assert len(methods_table(rows).lines) == 1 + len(found(rows, "methods"))
    assert [line[0] for line in balances_table(rows).lines] == ["none", "zigzag", "stripe"]
    assert [line[0] for line in delays_table(rows).lines] == ["0", "5", "20", "80"]
    assert len(refusals_table(rows).lines) == 2
    path.write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match=r"2\.json: expected what `python -m benchmarks ranks --json` writes"):
        block(methods_table)(path)


def test_uneven_lengths_are_refused(capsys):
    assert main(["--ranks", "4", "--lengths", "64,12"]) == 2
    assert "--lengths 12: expected multiples of 8 for --ranks 4" in capsys.readouterr().err
