"""A run in pictures, from its document: the same bytes for the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.reporting import curves, lengths
from benchmarks.reporting.document import (
    OURS,
    Document,
    Result,
    by_case,
    by_family,
    peer_of,
    short_names,
    timed_of,
    verdict,
)
from benchmarks.reporting.looks import BLUE, GREY, RED, STYLE, WIDTH, legend, ratio_axis, title, variants_looks
from benchmarks.reporting.text import number

_MOST_BARS = 8  # cases in a picture of memory
_SCREENFUL = 30  # cases in a picture of ratios whose axis is in sight from the first of them
_KEPT = "kept for the backward"


@dataclasses.dataclass(frozen=True)
class Picture:
    """What was drawn.

    Attributes:
        section: of the report: a family, or ``quality``.
        caption: what it shows.
        files: an SVG and a PNG.
    """

    section: str
    caption: str
    files: tuple[Path, ...]


def draw(document: Document, out: Path) -> list[Picture]:
    """Every picture that the run has the data for, into a folder that exists."""
    with matplotlib.rc_context(STYLE):
        return [
            Picture(section, f"{section}: {caption}", _save(figure, out / f"{section}-{name}"))
            for section, name, caption, figure in _figures(document)
        ]


def _save(figure: Figure, stem: Path) -> tuple[Path, ...]:
    metadata = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
    paths = tuple(stem.with_name(stem.name + suffix) for suffix in metadata)
    for path in paths:
        figure.savefig(path, metadata=metadata[path.suffix])
    return paths


def _figures(document: Document) -> Iterable[tuple[str, str, str, Figure]]:
    """Section, name, caption and figure."""
    of_families: tuple[tuple[str, str, Callable[[list[Result]], Figure | None]], ...] = (
        ("ratio", f"time of {OURS} as a ratio to its peer", ratios),
        ("size", "share of the copy rate against the row's size", curves.sizes),
        ("memory", "peak memory of a step", memory),
    )
    for family, rows in by_family(document).items():
        if family == "sequence" and (figure := lengths.lengths(document)) is not None:
            yield family, "length", "time and memory against the sequence's length", figure
        for name, caption, make in of_families:
            if (name, family) != ("memory", "sequence") and (figure := make(rows)) is not None:
                yield family, name, caption, figure
    if (figure := curves.learning(document)) is not None:
        yield "quality", "learning", "accuracy against steps of training", figure


# -------------------------------------------------------------------------------------------------------------- ratios


def ratios(rows: list[Result]) -> Figure | None:
    """Ours to the peer, or to the fastest other in a case that the peer does not take."""
    peer = peer_of(rows)
    ours = [row for row in timed_of(rows) if row["variant"] == OURS and (row["ratio"] or row["best_ratio"])]
    if not ours:
        return None
    names, shared = short_names(row["case"] for row in ours)
    figure = Figure(figsize=(WIDTH, 1.7 + 0.24 * len(ours)), layout="constrained")
    axes = figure.subplots()
    colours = {"faster": (BLUE, "o"), "level": (GREY, "D"), "slower": (RED, "s")}
    labels, marks = [], []
    for position, row in enumerate(ours):
        ratio = row["ratio"] or row["best_ratio"]
        colour, marker = colours[verdict(ratio)]
        axes.plot([ratio["p20"], ratio["p80"]], [position] * 2, color=colour, linewidth=1)
        axes.plot([ratio["low"], ratio["high"]], [position] * 2, color=colour, linewidth=5, alpha=0.45)
        axes.plot(ratio["median"], position, marker, color=colour)
        marks += [ratio[name] for name in ("p20", "p80", "low", "high")]
        if row["ratio"] and row["best_ratio"] and row["best"] != peer:
            axes.plot(row["best_ratio"]["median"], position, "o", color="black", fillstyle="none", markersize=7)
            marks.append(row["best_ratio"]["median"])
        beside = "" if row["ratio"] else f" (beside {row['best']})"
        labels.append(names[row["case"]] + beside + ("*" if row["contended"] else ""))
    axes.axvline(1.0, color="black", linewidth=1)
    ratio_axis(axes, min(marks), max(marks))
    axes.set_yticks(range(len(ours)), labels, fontsize=8.5)
    axes.set_ylim(len(ours) - 0.4, -0.6)
    if len(ours) > _SCREENFUL:
        axes.tick_params(axis="x", top=True, labeltop=True)
    axes.set_xlabel(f"time of {OURS} / time of {peer or 'the fastest other'}")
    for name, (colour, marker) in colours.items():
        axes.plot([], [], marker, color=colour, label=name)
    axes.plot([], [], color=GREY, linewidth=5, alpha=0.45, label="95 % interval of the median")
    axes.plot([], [], color=GREY, linewidth=1, label="p20 to p80")
    if any(row["ratio"] and row["best_ratio"] and row["best"] != peer for row in ours):
        axes.plot([], [], "o", color="black", fillstyle="none", markersize=7, label="beside the fastest other")
    if any(row["contended"] for row in ours):
        axes.plot([], [], " ", label="* others wanted the cores")
    title(figure, f"{shared}: left of 1 {OURS} is faster")
    legend(figure, [axes], columns=3)
    return figure


# -------------------------------------------------------------------------------------------------------------- memory


def memory(rows: list[Result]) -> Figure | None:
    """Bars of the largest cases: they are why one asks."""
    cases = {
        case: [row for row in variants.values() if row["peak_mib"] is not None]
        for case, variants in by_case(rows).items()
    }
    cases = {case: of_case for case, of_case in cases.items() if len(of_case) > 1}
    cases = {case: of_case for case, of_case in cases.items() if any(row["variant"] == OURS for row in of_case)}
    if not cases:
        return None
    every = len(cases)
    largest = sorted(cases, key=lambda case: -max(row["peak_mib"] for row in cases[case]))[:_MOST_BARS]
    cases = {case: of_case for case, of_case in cases.items() if case in largest}
    names, shared = short_names(cases)
    looks = variants_looks(dict.fromkeys(row["variant"] for of_case in cases.values() for row in of_case))
    bars = sum(len(of_case) + 1 for of_case in cases.values())
    figure = Figure(figsize=(WIDTH, 1.4 + 0.2 * bars), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0, []
    for of_case in cases.values():
        start = position
        for row in sorted(of_case, key=lambda row: list(looks).index(row["variant"])):
            look = looks[row["variant"]]
            axes.barh(position, row["peak_mib"], height=0.9, color=look["color"], label=row["variant"])
            # What is kept may have been there before the step, and then reaches beyond the peak
            end = max(row["peak_mib"], row["saved_mib"] or 0.0)
            axes.annotate(
                number(row["peak_mib"]), (end, position), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
            if row["saved_mib"]:
                axes.barh(position, row["saved_mib"], height=0.25, color="black", label=_KEPT)
            position += 1
        ticks.append((start + position - 1) / 2)
        position += 1
    axes.margins(x=0.08)
    axes.set_yticks(ticks, [names[case] for case in cases], fontsize=8.5)
    axes.set_ylim(position - 1.2, -0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of a step beside what was there before it, MiB")
    of_all = "" if len(cases) == every else f", the largest {len(cases)} of {every} cases"
    title(figure, f"{shared}: peak memory{of_all}, lower is better")
    legend(figure, [axes], last=_KEPT)
    return figure
