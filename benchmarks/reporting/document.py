"""The document of a run: plain values in a JSON file, and the questions that all its readers ask.

Nothing here imports torch: whoever reads a run need not wait for it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = 3
OURS = "fastattn"
FAILED = ("wrong", "error", "out of memory", "timed out")  # "unchecked" says nothing of the variant
EQUIVARIANCE = "equivariance"  # the task of the rows of quality that nobody was trained for
TIE = 0.02  # accuracies nearer than this are no difference: two standard errors of the smallest held-out set

Document = dict[str, Any]
Result = dict[str, Any]  # one variant on one case
Spread = dict[str, float]  # median, p20, p80, and low to high: the 95 % confidence interval of the median

_NEEDED = {"case", "family", "variant", "status", "reason", "wall_ms", "ratio", "best", "best_ratio", "rounds"}
_NEEDED |= {"contended", "others", "peak_mib"}
_PARTS = {"state", "settings", "environment", "ceilings", "results", "left_out", "seconds"}
_OF_SPREAD = {"median", "p20", "p80", "low", "high"}

# The ways to process a sequence, by what the name of a variant or of a model holds.
_WAYS = {
    "recurrence": re.compile("rnn|gru|lstm", re.IGNORECASE),
    "convolution": re.compile("conv|tcn", re.IGNORECASE),
    "attention": re.compile("att|sdpa", re.IGNORECASE),
}


def read_run(path: Path) -> Document:
    """The document of a run.

    Raises:
        ValueError: it cannot be read or is none; the message names the file and what was expected.
    """
    expected = f"{path}: expected a run of schema {SCHEMA}, as `python -m benchmarks --json FILE` writes it"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{expected}; {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{expected}; it has no schema")
    if document["schema"] != SCHEMA:
        raise ValueError(f"{expected}; it has schema {document['schema']}: run it again")
    if missing := sorted(_PARTS - set(document)):
        raise ValueError(f"{expected}; it has no {', '.join(missing)}")
    rows = document["results"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= _NEEDED for row in rows):
        raise ValueError(f"{expected}; its results are not rows with {', '.join(sorted(_NEEDED))}")
    for row in rows:
        for name in ("wall_ms", "ratio", "best_ratio"):
            spread = row[name]
            if spread is not None and not (isinstance(spread, dict) and set(spread) >= _OF_SPREAD):
                raise ValueError(f"{expected}; {name} of {row['case']}, {row['variant']} is no spread: {spread!r}")
    return document


def write_run(path: Path, document: Document) -> None:
    """Write the file whole or not at all; numbers may be NaN, as an error is where a result was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=1, allow_nan=True) + "\n")
    partial.replace(path)


def by_family(document: Document) -> dict[str, list[Result]]:
    """The rows of each family, in the order in which the run met them."""
    families: dict[str, list[Result]] = {}
    for row in document["results"]:
        families.setdefault(row["family"], []).append(row)
    return families


def by_case(rows: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """For each case its rows by variant."""
    cases: dict[str, dict[str, Result]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    return cases


def plain_norms(rows: Iterable[Result]) -> list[Result]:
    """Those rows of norms that differ in nothing but the kind, the direction and the size: with a residual of their own
    dtype, the one of most rows, without dropout, and of about as many elements as the most."""
    plain = [r for r in rows if "wide_residual" in r and not (r["wide_residual"] or r["dropout_p"] or r.get("alone"))]
    dtype = statistics.mode(r["dtype"] for r in plain) if plain else None
    plain = [r for r in plain if r["dtype"] == dtype]
    most = max((r["rows"] * r["size"] for r in plain), default=0)
    return [r for r in plain if r["rows"] * r["size"] >= most // 4]


def timed_of(rows: Iterable[Result]) -> list[Result]:
    return [row for row in rows if row["wall_ms"] is not None]


def peer_of(rows: Iterable[Result]) -> str | None:
    """The variant that these rows' ratios were taken to: it has none itself."""
    timed = timed_of(rows)
    with_ratios = {row["case"] for row in timed if row["ratio"] is not None}
    return next((r["variant"] for r in timed if r["ratio"] is None and r["case"] in with_ratios), None)


def rival_of(row: Result, peer: str | None) -> tuple[str, Spread] | None:
    """Whom a row is to be held against, and its time over that one's: the fastest other, else the peer."""
    if row.get("best") and row["best_ratio"] is not None:
        return row["best"], row["best_ratio"]
    return (peer, row["ratio"]) if peer is not None and row["ratio"] is not None else None


def verdict(ratio: Spread) -> str:
    """By the confidence interval of the median: an interval that holds 1 says nothing."""
    return "slower" if ratio["low"] > 1 else "faster" if ratio["high"] < 1 else "level"


def short_names(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Names of cases without the parts that all of them have, and those parts."""
    parts = {name: name.split("-") for name in names}
    if not parts:
        return {}, ""
    first, *others = parts.values()
    shared = [part for part in first if all(part in other for other in others)]
    short = {name: "-".join(p for p in of_name if p not in shared) for name, of_name in parts.items()}
    return {name: text or name for name, text in short.items()}, "-".join(shared)


def way_of(name: str) -> str | None:
    """``recurrence``, ``convolution`` or ``attention``; None where the name does not tell."""
    return next((way for way, pattern in _WAYS.items() if pattern.search(name)), None)


def sequence_rows(document: Document) -> list[Result]:
    """Rows of the family ``sequence`` of one width and dtype, that of most: a quick run's are not mixed with others."""
    rows = [row for row in by_family(document).get("sequence", []) if row["status"] == "ok"]
    if not rows:
        return []
    width = statistics.mode((row["heads"], row["head_dim"], row["dtype"]) for row in rows)
    return [row for row in rows if (row["heads"], row["head_dim"], row["dtype"]) == width]


def reaches(document: Document) -> dict[str, int | None]:
    """Tokens that a variant of the family ``sequence`` reaches at most; None: however many there are."""
    limits: dict[str, int | None] = {}
    for lines in (document.get("theory") or {}).values():
        seqlen = max(line["reach"] for line in lines)  # some variant reaches all of it
        limits |= {line["variant"]: line["reach"] if line["reach"] < seqlen else None for line in lines}
    return limits


def learned(document: Document) -> dict[str, dict[str, Result]]:
    """For each task of quality the rows of the models that were trained for it."""
    tasks: dict[str, dict[str, Result]] = {}
    for row in document.get("quality") or []:
        if row["task"] != EQUIVARIANCE:
            tasks.setdefault(row["task"], {})[row["model"]] = row
    return tasks
