"""What a run found, in sentences: every word follows from the document by rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from benchmarks.reporting.document import (
    FAILED,
    OURS,
    TIE,
    Document,
    by_case,
    by_family,
    learned,
    reaches,
    sequence_rows,
    timed_of,
    verdict,
    way_of,
)
from benchmarks.reporting.kernels import kernel_findings
from benchmarks.reporting.text import span

_ABOVE = 1.05  # of the floor: ceilings have their own noise


def findings(document: Document) -> list[str]:
    """A few sentences in plain English, the most asked for first."""
    return [
        *_failures(document),
        *_speed(document),
        *kernel_findings(document),
        *_sequences(document, backward=False),
        *_sequences(document, backward=True),
        *_learning(document),
        *_ceilings(document),
        *_contention(document),
    ]


def _failures(document: Document) -> list[str]:
    failed = [r for r in document["results"] if r["variant"] == OURS and r["status"] in FAILED]
    return [f"{OURS} failed: {row['status']} in {row['case']}." for row in failed]


def _speed(document: Document) -> list[str]:
    """In how many cases of a family ours is faster than the fastest other, level with it, slower."""
    sentences = []
    for family, rows in by_family(document).items():
        rivals = {}
        for case, variants in by_case(timed_of(rows)).items():
            if OURS in variants and variants[OURS]["best_ratio"] is not None:
                rivals[case] = variants[OURS]["best"], variants[OURS]["best_ratio"]
        if not rivals:
            continue
        counts = Counter(verdict(ratio) for _, ratio in rivals.values())
        cases = "1 case" if len(rivals) == 1 else f"{len(rivals)} cases"
        sentence = f"{family}: in {cases} {OURS} is faster than the fastest other in {counts['faster']}, "
        sentence += f"level in {counts['level']}, slower in {counts['slower']}"
        if counts["slower"]:
            case, (other, ratio) = max(rivals.items(), key=lambda rival: rival[1][1]["low"])
            sentence += f", at worst {ratio['median']:.2f} times as long as {other} ({case})"
        sentences.append(sentence + ".")
    if sentences:
        sentences[-1] += " Level: the 95 % interval of the paired ratio holds 1."
    return sentences


# ----------------------------------------------------------------------------------------------------------- sequences


@dataclasses.dataclass(frozen=True)
class _Order:
    """Who wins at a length."""

    first: str
    first_of_all: str  # of the variants whose last output depends on every token
    attention: str | None  # the fastest of these


def _sequences(document: Document, *, backward: bool) -> list[str]:
    """Which way of processing a sequence is fastest, at lengths taken together where the order is the same."""
    times: dict[int, dict[str, float]] = {}
    for row in timed_of(sequence_rows(document)):
        if row["backward"] == backward:
            times.setdefault(row["seqlen"], {})[row["variant"]] = row["wall_ms"]["median"]
    reach = reaches(document)
    orders = {seqlen: _order(times[seqlen], seqlen, reach) for seqlen in sorted(times)}
    sentences = []
    for order, group in itertools.groupby(orders, key=lambda seqlen: orders[seqlen]):
        lengths = list(group)
        at = f"L = {lengths[0]}" + (f" to {lengths[-1]}" if len(lengths) > 1 else "")
        sentence = f"{'Training' if backward else 'Evaluation'}, {at}: {_named(order.first)} is fastest"
        if order.first != order.first_of_all:
            sentence += f", but reaches {reach[order.first]} tokens; of the ways that reach every token "
            sentence += f"{_named(order.first_of_all)} is"
        sentences.append(sentence + _beside_attention(order, [times[seqlen] for seqlen in lengths]) + ".")
    return sentences


def _order(times: dict[str, float], seqlen: int, reach: dict[str, int | None]) -> _Order:
    ranks = sorted(times, key=times.__getitem__)
    of_all = [name for name in ranks if (reach.get(name) or seqlen) >= seqlen]
    attention = next((name for name in ranks if way_of(name) == "attention"), None)
    return _Order(ranks[0], of_all[0] if of_all else ranks[0], attention)


def _named(variant: str) -> str:
    """With its way, where the name is not the way's own or ours."""
    way = way_of(variant)
    return f"{variant} (a {way})" if way in ("recurrence", "convolution") else variant


def _beside_attention(order: _Order, times: list[dict[str, float]]) -> str:
    if order.attention is None:
        return ""
    if order.first_of_all == order.attention:
        return _of_recurrences(order.attention, times)
    share = span([t[order.first_of_all] / t[order.attention] for t in times])
    return f", in {share} of the time of the fastest attention ({order.attention})"


def _of_recurrences(attention: str, times: list[dict[str, float]]) -> str:
    """How much longer the fastest recurrence takes, where there is one at each length."""
    fastest = [min((t[name] for name in t if way_of(name) == "recurrence"), default=None) for t in times]
    found = [time / t[attention] for time, t in zip(fastest, times) if time is not None]
    return f"; the fastest recurrence takes {span(found)} times as long" if len(found) == len(times) else ""


# ------------------------------------------------------------------------------------------------ learning, contention


def _learning(document: Document) -> list[str]:
    """Which ways win a task."""
    sentences = []
    for task, models in learned(document).items():
        if len(models) < 2:  # as in a run that was cut short: who came first is not the best
            continue
        best = max(row["accuracy"] for row in models.values())
        winners = [name for name, row in models.items() if row["accuracy"] > best - TIE]
        losers = [row["accuracy"] for name, row in models.items() if name not in winners]
        sentence = f"{task}: " + " and ".join(filter(None, (", ".join(winners[:-1]), winners[-1])))
        sentence += f" {'learns' if len(winners) == 1 else 'learn'} it best, to an accuracy of {best:.2f}"
        sentence += f", the others to {span(losers)}" if losers else ""
        sentences.append(sentence + f"; a guess has {next(iter(models.values()))['chance']:.2f}.")
    if sentences:
        sentences[-1] += " Each was trained once, from one seed."
    return sentences


def _ceilings(document: Document) -> list[str]:
    """A row that is faster than its floor says that a ceiling is none."""
    above = [row for row in timed_of(document["results"]) if (row.get("of_floor") or 0.0) > _ABOVE]
    if not above:
        return []
    most = max(above, key=lambda row: row["of_floor"])
    where = f"at most {most['of_floor']:.2f} times as fast ({most['variant']} in {most['case']})"
    return [f"{len(above)} rows are faster than the measured ceilings allow, {where}: there, the floor is too high."]


def _contention(document: Document) -> list[str]:
    watched = [row for row in timed_of(document["results"]) if row["others"] is not None]
    if not watched:
        return []
    disturbed = sum(row["contended"] for row in watched)
    most = max(row["others"] for row in watched)
    count = f"{disturbed} of the {len(watched)} timed rows" if disturbed else f"None of the {len(watched)} timed rows"
    advice = ": trust their cpu ratio" if disturbed else ""
    return [f"{count} waited for a core{advice}; other processes kept up to {most:.1f} cores busy beside them."]
