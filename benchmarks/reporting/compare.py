"""``python -m benchmarks compare A.json B.json``: what became slower, faster or wrong from one run to the next.

A verdict has to survive two tests. The medians have to differ by more than the noise of both runs, and where the peer
was measured beside the row, the ratio to the peer has to move as well: else it was the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.measure.spread import Spread
from benchmarks.reporting.document import FAILED, OURS, Document, Result, read_run
from benchmarks.reporting.text import Table, show

Verdict = Literal["same", "faster", "slower", "machine"]
Key = tuple[str, str]  # case and variant

THRESHOLD = 0.05
# At 20 rounds, equal runs whose ranges just touch are some four standard errors of the median apart: what a table of
# hundreds of rows needs. With fewer the ranges are widened to that; five give percentiles that are too narrow by half,
# hence the three rounds that do not count.
_ROUNDS, _SPENT = 20, 3
_PAGES = 1.0  # MiB: on a CPU a peak is counted in pages, and the allocator keeps some of them
_MEMORY_NOISE = 10.0  # MiB by which the same step may differ on a CPU
_FACTS = ("torch", "triton", "processor", "gpu", "cuda", "cores", "threads", "backend", "interpreted", "driver")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run says of a case and a variant."""

    status: str
    reason: str
    wall: Spread | None
    ratio: Spread | None
    peak_mib: float | None


def _spread(values: dict[str, float] | None, rounds: int | None) -> Spread | None:
    if values is None:
        return None
    wider = max(1.0, (_ROUNDS / max(1, (rounds or 0) - _SPENT)) ** 0.5)
    spread = Spread(**values)
    p20, p80 = (spread.median + wider * (end - spread.median) for end in (spread.p20, spread.p80))
    return dataclasses.replace(spread, p20=p20, p80=p80)


def _measured(document: Document) -> dict[Key, Measured]:
    return {(row["case"], row["variant"]): _of_row(row) for row in document["results"]}


def _of_row(row: Result) -> Measured:
    wall, ratio = (_spread(row[name], row["rounds"]) for name in ("wall_ms", "ratio"))
    return Measured(row["status"], row["reason"], wall, ratio, row["peak_mib"])


def _sign(a: float, b: float, threshold: float) -> int:
    """1 where ``b`` is above ``a`` by more than the threshold, -1 where it is below; by quotients, as times go."""
    return (b > a * (1 + threshold)) - (b < a / (1 + threshold))


def _moved(a: Spread, b: Spread, threshold: float) -> int:
    """As :func:`_sign` of the medians, but 0 where the ranges overlap."""
    apart = b.p20 > a.p80 or b.p80 < a.p20
    return _sign(a.median, b.median, threshold) if apart else 0


def _follows(relative: float, wall: float, threshold: float) -> int:
    """Where a row went from the others of its case, if that is more than half of where its time went, else 0.

    The ranges of a ratio are wider than those of a time: they may overlap although nothing else was slow.
    """
    return _sign(1.0, relative, max(threshold, max(wall, 1 / wall) ** 0.5 - 1))


def _verdict(wall: int, relative: int | None) -> Verdict:
    """``relative`` is None where nothing was measured beside the row that could tell it from the machine."""
    if wall == 0:
        return "same"
    if relative is not None and relative != wall:
        return "machine"
    return "slower" if wall > 0 else "faster"


@dataclasses.dataclass(frozen=True)
class Change:
    """A row that both runs have timed.

    Attributes:
        case: its name.
        variant: its name.
        a: milliseconds in A, the median.
        b: milliseconds in B.
        ratio: to the peer, that of B over that of A; None where one of them has none.
        verdict: what to make of it.
    """

    case: str
    variant: str
    a: float
    b: float
    ratio: float | None
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Run B beside run A.

    Attributes:
        changes: rows timed in both.
        statuses: rows whose status differs, with both.
        appeared: rows that only B has, and their status.
        disappeared: rows that only A has, and their status.
        memory: peaks in MiB of rows that have one in both.
        warnings: what differs between the machines.
    """

    changes: list[Change]
    statuses: dict[Key, tuple[Measured, Measured]]
    appeared: dict[Key, Measured]
    disappeared: dict[Key, Measured]
    memory: dict[Key, tuple[float, float]]
    warnings: list[str]

    @property
    def failures(self) -> list[Key]:
        """Of ours, what began to fail, and what had a time in A and is refused, unchecked or missing in B.

        What fails in both runs is no change, and what peers do is theirs.
        """
        new = {key: b.status in FAILED for key, b in self.appeared.items()}
        new |= {key: b.status in FAILED or a.wall is not None for key, (a, b) in self.statuses.items()}
        new |= {key: a.wall is not None for key, a in self.disappeared.items()}
        return [key for key, failed in new.items() if failed and is_ours(key)]

    @property
    def grown(self) -> list[Key]:
        """Of ours, whose peak memory is larger by more than a quarter, and by more than what the measurement misses."""
        return [key for key, (a, b) in self.memory.items() if is_ours(key) and b > max(1.25 * a, a + _MEMORY_NOISE)]

    @property
    def regressed(self) -> bool:
        slower = any(change.verdict == "slower" and is_ours((change.case, change.variant)) for change in self.changes)
        return bool(self.failures or self.grown) or slower


def is_ours(key: Key) -> bool:
    return key[1] == OURS or key[1].startswith(f"{OURS}-")


def compare(a: Path, b: Path, *, threshold: float = THRESHOLD) -> Comparison:
    """Join two runs by case and variant.

    Args:
        a: the run before.
        b: the run after.
        threshold: by which share a median has to move to count.
    Raises:
        ValueError: one of them is no run of this schema, or they have no row in common.
    """
    documents = read_run(a), read_run(b)
    before, after = (_measured(document) for document in documents)
    common = [key for key in after if key in before]
    if not common:
        raise ValueError(f"{a} and {b} have no case and variant in common: there is nothing to compare")
    return Comparison(
        changes=_changes(before, after, threshold),
        statuses={k: (before[k], after[k]) for k in common if before[k].status != after[k].status},
        appeared={k: row for k, row in after.items() if k not in before},
        disappeared={k: row for k, row in before.items() if k not in after},
        memory={k: (x, y) for k in common if (x := before[k].peak_mib) and (y := after[k].peak_mib)},
        warnings=_warnings(*documents),
    )


def _changes(before: dict[Key, Measured], after: dict[Key, Measured], threshold: float) -> list[Change]:
    timed = {
        key: (a.wall, b.wall)
        for key, b in after.items()
        if (a := before.get(key)) is not None and a.wall is not None and b.wall is not None
    }
    quotients = {key: b.median / a.median for key, (a, b) in timed.items()}
    changes = []
    for key, (a, b) in timed.items():
        wall, ratios = _moved(a, b, threshold), (before[key].ratio, after[key].ratio)
        others = [q for other, q in quotients.items() if other[0] == key[0] and other != key]
        ratio = relative = None
        if ratios[0] is not None and ratios[1] is not None:
            ratio = ratios[1].median / ratios[0].median
            relative = _moved(ratios[0], ratios[1], threshold) or _follows(ratio, quotients[key], threshold)
        elif others:  # the peer itself, or there is none
            relative = _follows(quotients[key] / statistics.median(others), quotients[key], threshold)
        changes.append(Change(*key, a.median, b.median, ratio, _verdict(wall, relative)))
    return changes


def _warnings(a: Document, b: Document) -> list[str]:
    facts = a.get("environment", {}), b.get("environment", {})
    warnings = [
        f"{name}: {facts[0].get(name)} in A, {facts[1].get(name)} in B"
        for name in _FACTS
        if facts[0].get(name) != facts[1].get(name)
    ]
    for name in ("seed", "seconds"):
        asked = a["settings"].get(name), b["settings"].get(name)
        if asked[0] != asked[1]:
            warnings.append(f"--{name}: {asked[0]} in A, {asked[1]} in B")
    for name, run in (("A", a), ("B", b)):
        if run["state"] != "complete" or run["left_out"]:
            warnings.append(f"{name} is {run['state']}, {len(run['left_out'])} jobs left out")
    for name in ("device", "dtype"):
        sets = [", ".join(sorted({str(row[name]) for row in run["results"] if name in row})) for run in (a, b)]
        if sets[0] != sets[1]:
            warnings.append(f"{name} of the rows: {sets[0] or 'none'} in A, {sets[1] or 'none'} in B")
    return warnings


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _show(title: str, header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> None:
    show(Table(title, header, tuple(lines)))


def _print(comparison: Comparison, threshold: float) -> None:
    for warning in comparison.warnings:
        print(f"the runs are not alike: {warning}")
    if comparison.changes:
        lines = [
            (c.case, c.variant, f"{c.a:.3g}", f"{c.b:.3g}", f"{c.b / c.a:.2f}", _number(c.ratio), c.verdict)
            for c in comparison.changes
        ]
        header = ("case", "variant", "A ms", "B ms", "B/A", "B/A of the ratio to the peer", "verdict")
        _show(f"B over A, beyond noise and {threshold:.0%}", header, lines)
    lines = [
        (*key, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}")
        for key, (a, b) in comparison.memory.items()
        if _sign(a, b, threshold) and abs(b - a) >= _PAGES
    ]
    if lines:
        _show(f"peak memory, MiB, where it moved by {threshold:.0%}", ("case", "variant", "A", "B", "B/A"), lines)
    if comparison.statuses:
        lines = [(*key, a.status, b.status, b.reason) for key, (a, b) in comparison.statuses.items()]
        _show("status changed", ("case", "variant", "A", "B", "reason"), lines)
    for title, rows in (("only in A", comparison.disappeared), ("only in B", comparison.appeared)):
        if rows:
            lines = [(*key, row.status, row.reason) for key, row in rows.items()]
            _show(title, ("case", "variant", "status", "reason"), lines)

    verdicts = [change.verdict for change in comparison.changes]
    counts = [f"{verdicts.count(name)} {name}" for name in ("slower", "faster", "machine", "same")]
    print(
        f"\n{', '.join(counts)}, {len(comparison.failures)} of {OURS} began to fail or are missing, "
        f"{len(comparison.grown)} take more memory"
    )
    if 4 * verdicts.count("machine") > len(verdicts):
        print("the machine was not the same: measure both again, one right after the other, before you trust a verdict")


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is 1 where something of ours is worse, 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="What became slower, faster or wrong from run A to run B. 'machine': the peer, measured beside it, "
        "moved along.",
    )
    parser.add_argument("a", metavar="A.json", type=Path, help="the run before")
    parser.add_argument("b", metavar="B.json", type=Path, help="the run after")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        metavar="SHARE",
        help=f"of a median that has to move to count (default: {THRESHOLD})",
    )
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:  # NaN is neither
        parser.error(f"--threshold {options.threshold}: expected a share, 0 or more")
    try:
        comparison = compare(options.a, options.b, threshold=options.threshold)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    _print(comparison, options.threshold)
    return 1 if comparison.regressed else 0


if __name__ == "__main__":
    sys.exit(main())
