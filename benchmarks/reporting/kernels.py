"""What a run says of the family ``kernels``: the best of our configurations beside every peer, and where each is best.

A ratio here is the fastest peer's time over ours, so that above 1 ours is ahead: the way in which the bar is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.reporting.document import OURS, Document, Result, by_case, by_family, timed_of
from benchmarks.reporting.text import Table, number, rate, table_of

FAMILY = "kernels"
_BAR = 0.9  # of the fastest peer's rate: what is asked for where there is no mask
_NOTICED = 1.02  # less than that over the best is noise


# What is compared: a part of the rows of each case. A sum in no fixed order is no replacement for one in a fixed order.
_WAYS: dict[str, tuple[bool, Callable[[str], bool]]] = {
    "forward": (False, lambda variant: True),
    "backward": (True, lambda variant: "-one-pass" not in variant),
    "backward in one pass": (True, lambda variant: "-one-pass" in variant),
}


def _ms(row: Result) -> float:
    return row["wall_ms"]["median"]


@dataclasses.dataclass(frozen=True)
class _Contest:
    """The timed rows of one case, in one of the ways.

    Attributes:
        best: the fastest of our configurations.
        picked: what the package picks; None where it was not timed.
        peers: by variant.
        rival: the fastest of them.
    """

    best: Result
    picked: Result | None
    peers: dict[str, Result]
    rival: Result | None

    @property
    def ahead(self) -> float | None:
        """The rival's time over that of our best."""
        return None if self.rival is None else _ms(self.rival) / _ms(self.best)

    @property
    def behind_best(self) -> float | None:
        """The time of what the package picks over that of our best."""
        return None if self.picked is None else _ms(self.picked) / _ms(self.best)


def _contests(document: Document) -> dict[str, list[_Contest]]:
    """By way, where a configuration of ours was timed."""
    found: dict[str, list[_Contest]] = {way: [] for way in _WAYS}
    for rows in by_case(timed_of(by_family(document).get(FAMILY, []))).values():
        peers = {name: row for name, row in rows.items() if name.split("-")[0] != OURS}
        rival = min(peers.values(), key=_ms, default=None)
        for way, (backward, is_of_way) in _WAYS.items():
            ours = [row for name, row in rows.items() if name.split("-")[0] == OURS and is_of_way(name)]
            ours = [row for row in ours if row["backward"] == backward]
            if ours:
                # What the package picks is one of the others: by that name it says how it is configured
                best = min(ours, key=lambda row: (row["variant"] == OURS, _ms(row)))
                found[way].append(_Contest(best, rows.get(OURS), peers, rival))
    return found


def _configuration(row: Result) -> str:
    """Without the package's name, which all have."""
    return row["variant"].removeprefix(f"{OURS}-")


def _quotient(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _size(row: Result) -> str:
    return f"D{row['head_dim']} {row['mask']} L{row['seqlen']}"


# -------------------------------------------------------------------------------------------------------------- tables


def ratio_table(document: Document) -> Table:
    """A line for each case: the best of ours, what the package picks, each peer, and the fastest peer over our best."""
    contests = _contests(document)
    peers = list(dict.fromkeys(name for of_way in contests.values() for contest in of_way for name in contest.peers))
    lines: list[tuple[str, ...]] = []
    strong = []
    for way, of_way in contests.items():
        if of_way:
            lines.append((way, *[""] * (8 + len(peers))))
        for contest in of_way:
            best, ahead = contest.best, contest.ahead
            if ahead is not None and ahead >= 1.0:
                strong.append(len(lines))
            figures = (
                _quotient(ahead),
                contest.rival["variant"] if contest.rival else "",
                _configuration(best),
                number(_ms(best)),
                rate(best["tflops"], "F/s"),
                _quotient(best["of_datasheet"]),
                number(_ms(contest.picked)) if contest.picked else "",
                _quotient(contest.behind_best),
            )
            of_peers = (number(_ms(contest.peers[name])) if name in contest.peers else "" for name in peers)
            lines.append((f"  {_size(best)}", *figures, *of_peers))
    header = ("case", "its / ours", "fastest peer", "best of ours", "ms", "rate", "of datasheet", OURS, "over best")
    notes = [
        "its / ours: the fastest peer's time over that of the best of ours; above 1 ours is ahead, and set off",
        f"{OURS}: what the package picks, deterministic; over best: its time over the best of ours; ms throughout",
    ]
    title = "kernels: the best of ours beside each peer"
    return table_of(title, (*header, *peers), lines, notes if lines else (), strong)


def best_table(document: Document) -> Table:
    """For each way, head size and mask the best of our configurations at each length: what a heuristic needs."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for way, of_way in _contests(document).items():
        for contest in sorted(of_way, key=lambda contest: (contest.best["head_dim"], contest.best["mask"])):
            best, behind = contest.best, contest.behind_best
            gain = "" if behind is None or behind < _NOTICED else f" ({behind:.2f})"
            of_lengths = found.setdefault((way, f"D{best['head_dim']}", best["mask"]), {})
            of_lengths[best["seqlen"]] = _configuration(best) + gain
    lengths = sorted({seqlen for of_lengths in found.values() for seqlen in of_lengths})
    lines = [(*key, *(of_lengths.get(seqlen, "") for seqlen in lengths)) for key, of_lengths in found.items()]
    header = ("way", "head size", "mask", *(f"L {seqlen}" for seqlen in lengths))
    notes = ["in brackets: the time of what the package picks over that of the best"] if lines else ()
    return table_of("kernels: the best configuration by length", header, lines, notes)


def kernel_tables(document: Document) -> list[Table]:
    """Those that the run has anything for."""
    return [table for table in (best_table(document), ratio_table(document)) if table.lines]


# ----------------------------------------------------------------------------------------------------------- sentences


def kernel_findings(document: Document) -> list[str]:
    """A sentence for each way: where the best of ours is ahead, the worst case, and what the package picks."""
    return [
        f"kernels, {way}: {_beside_peers(of_way)}{_beside_best(of_way)}."
        for way, of_way in _contests(document).items()
        if any(contest.ahead is not None for contest in of_way)
    ]


def _beside_peers(contests: list[_Contest]) -> str:
    ratios = [(contest.ahead, contest) for contest in contests if contest.ahead is not None]
    ahead = sum(ratio >= 1.0 for ratio, _ in ratios)
    near = sum(_BAR <= ratio < 1.0 for ratio, _ in ratios)
    worst, contest = min(ratios, key=lambda pair: pair[0])
    rival = contest.rival["variant"] if contest.rival else ""
    cases = "1 case" if len(ratios) == 1 else f"{len(ratios)} cases"
    return (
        f"in {cases} the best of ours is ahead of the fastest peer in {ahead}, has at least {_BAR:.0%} of its rate in "
        f"{near} more, and at worst {worst:.2f} of it ({_size(contest.best)}, {_configuration(contest.best)} beside "
        f"{rival})"
    )


def _beside_best(contests: list[_Contest]) -> str:
    behind = [(contest.behind_best, contest) for contest in contests if contest.behind_best is not None]
    if not behind:
        return ""
    most, contest = max(behind, key=lambda pair: pair[0])
    where = f" ({_size(contest.best)}, {_configuration(contest.best)})" if most >= _NOTICED else ""
    return f"; what the package picks takes up to {most:.2f} times as long as the best of ours{where}"
