"""Starts the processes, and makes rows of what they have written."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from torch import multiprocessing

from benchmarks.measure.spread import Spread
from benchmarks.ranks.cases import ALONE, Case, Variant, cases
from benchmarks.ranks.process import work
from benchmarks.ranks.transports import sending_times

Row = dict[str, Any]


def run_cases(world: int, lengths: tuple[int, ...], seconds: float, fewest: int = 5) -> list[Row]:
    """A row for each variant of each case.

    Args:
        world: how many processes share a sequence.
        lengths: of whole sequences.
        seconds: of timing a case.
        fewest: rounds of a case, however long they take.
    """
    todo = cases(world, lengths)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, todo, seconds, fewest, sending_times(world), folder)
        multiprocessing.spawn(work, arguments, nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    rows = []
    for number, case in enumerate(todo):
        of_case = [of_rank[number] for of_rank in ranks]
        rows += [_row(case, variant, of_case) for variant in case.variants]
    return rows


def _row(case: Case, variant: Variant, ranks: list[Any]) -> Row:
    """What a variant took: of a round the rank that took longest counts, of bytes and messages all together."""
    row: Row = {
        "ranks": len(ranks), "case": case.kind, "length": case.length, "causal": case.is_causal,
        "variant": variant.name, **dataclasses.asdict(variant), "refused": ranks[0]["refused"].get(variant.name),
    }  # fmt: skip
    if row["refused"] is not None:
        return row
    of_ranks = [of_rank["samples"][variant.name] for of_rank in ranks]
    walls = _walls(of_ranks)
    row["rounds"] = len(walls)
    first, *rest = (of_rank["cores"] for of_rank in ranks)
    row["others"] = max(0.0, first["others"] - sum(cores["own"] for cores in rest))
    row["wall_ms"] = _milliseconds(walls)
    if variant.method != ALONE and all(ALONE in of_rank["samples"] for of_rank in ranks):
        alone = _walls([of_rank["samples"][ALONE] for of_rank in ranks])
        row["of_one_process"] = dataclasses.asdict(Spread.of([a / b for a, b in zip(walls, alone)]))
    if variant.is_at_once:
        usual = dataclasses.replace(variant, is_at_once=False).name
        beside = _walls([of_rank["samples"][usual] for of_rank in ranks])
        row["of_not_at_once"] = dataclasses.asdict(Spread.of([a / b for a, b in zip(walls, beside)]))
    if variant.is_peer or variant.method == ALONE:
        return row
    for name in ("bytes_sent", "bytes_received", "bytes_overlapped", "messages"):
        row[name] = sum(samples[0][name] for samples in of_ranks)
    for name in ("seconds_waited", "seconds_under_way"):
        each_round = [statistics.mean(values) for values in zip(*([s[name] for s in of] for of in of_ranks))]
        row[name.replace("seconds_", "") + "_ms"] = _milliseconds(each_round)
    row["by_rank"] = [
        {
            "pairs": of_rank["pairs"][variant.balance],
            "thread_ms": _milliseconds([s["thread"] for s in samples]),
            "waited_ms": _milliseconds([s["seconds_waited"] for s in samples]),
        }
        for of_rank, samples in zip(ranks, of_ranks)
    ]
    return row


def _walls(of_ranks: list[list[dict[str, Any]]]) -> list[float]:
    return [max(walls) for walls in zip(*([sample["wall"] for sample in samples] for samples in of_ranks))]


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return dataclasses.asdict(Spread.of([1e3 * value for value in seconds]))
