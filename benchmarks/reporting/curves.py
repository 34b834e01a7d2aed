"""The pictures with lines: time and memory against a sequence's length, a norm's rate against its size, learning."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.document import Document, Result, learned, plain_norms, sequence_rows, timed_of
from benchmarks.reporting.looks import (
    WIDTH,
    decimal_axis,
    doubling_axis,
    legend,
    panels,
    title,
    variants_looks,
    ways_looks,
)

Quantity = Callable[[Result], float]

# Those that hold a number for each pair of tokens at once (families.sequence.Way.held); the memory of all others is
# linear in the sequence's length. In training nn.MultiheadAttention holds no scores unless it returns weights.
_PAIRS_HELD = {False: re.compile("naive-att|-weights|^nn.Multihead"), True: re.compile("naive-att|-weights")}


def lengths(document: Document) -> Figure | None:
    """Time, and memory where it was measured, against L, each beside what theory says of its growth.

    Of a token, since a run shrinks the batch as L grows, until it is 1: so what is linear in L is flat throughout.
    """
    rows = timed_of(sequence_rows(document))
    seqlens = sorted({row["seqlen"] for row in rows})
    if len(seqlens) < 2:
        return None
    measures: list[tuple[str, list[Result], Quantity, Quantity]] = [("time per token, µs", rows, _time, _operations)]
    if weighed := [row for row in rows if row["peak_mib"]]:
        measures.append(("peak memory per token, KiB", weighed, _memory, _held))
    figure = Figure(figsize=(WIDTH, 1.8 + 3.7 * len(measures)), layout="constrained")
    grid = panels(figure, len(measures), 2, sharex=True, sharey="row")
    looks = ways_looks(list(dict.fromkeys(row["variant"] for row in rows)))
    for line, (label, measured, quantity, growth) in zip(grid, measures):
        for backward, axes in zip((False, True), line):
            axes.set_title("training: forward and backward" if backward else "evaluation")
            for variant, look in looks.items():
                of_one = [row for row in measured if (row["variant"], row["backward"]) == (variant, backward)]
                if of_one:
                    of_one.sort(key=lambda row: row["seqlen"])
                    _line_and_growth(axes, of_one, quantity, growth, {"label": variant, **look})
            doubling_axis(axes, seqlens)
        decimal_axis(line[0], [quantity(row) for row in measured])
        line[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length L")
    of_all = f"width {rows[0]['heads'] * rows[0]['head_dim']}, {rows[0]['dtype']}"
    title(figure, f"{of_all}: lower is better; flat is linear in L; dotted, what theory says of its growth")
    legend(figure, [axes for line in grid for axes in line])
    return figure


def _line_and_growth(
    axes: Axes, rows: list[Result], quantity: Quantity, growth: Quantity, look: dict[str, Any]
) -> None:
    seqlens, last = [row["seqlen"] for row in rows], rows[-1]
    axes.plot(seqlens, [quantity(row) for row in rows], **look)
    if not growth(last):
        return
    # Through the longest, where what grows fastest counts most
    expected = [quantity(last) * growth(row) / growth(last) for row in rows]
    axes.plot(seqlens, expected, ":", color=look["color"], linewidth=1, alpha=0.7)


def _tokens(row: Result) -> int:
    return row["batch"] * row["seqlen"]


def _time(row: Result) -> float:
    return 1e3 * row["wall_ms"]["median"] / _tokens(row)


def _operations(row: Result) -> float:
    return (row["flops"] or 0.0) / _tokens(row)


def _memory(row: Result) -> float:
    return 1024 * row["peak_mib"] / _tokens(row)


def _held(row: Result) -> float:
    """Of a token: L where there is a number for each pair of tokens, else as much at each length."""
    return row["seqlen"] if _PAIRS_HELD[row["backward"]].search(row["variant"]) else 1.0


def sizes(rows: list[Result]) -> Figure | None:
    """A norm's share of the copy rate against its size."""
    rows = [row for row in plain_norms(timed_of(rows)) if row["of_floor"] is not None]
    if not rows:
        return None
    elements = sorted({row["size"] for row in rows})
    if len(elements) < 2:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    looks = variants_looks(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(WIDTH, 1.4 + 2.5 * len(kinds)), layout="constrained")
    grid = panels(figure, len(kinds), 2, sharex=True, sharey=True)
    for kind, line in zip(kinds, grid):
        for backward, axes in zip((False, True), line):
            axes.set_title(f"{kind} norm, {'backward' if backward else 'forward'}")
            axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="copy, measured")
            for variant, look in looks.items():
                of_line = [r for r in rows if (r["kind"], r["backward"], r["variant"]) == (kind, backward, variant)]
                _share_line(axes, sorted(of_line, key=lambda row: row["size"]), variant, look)
            doubling_axis(axes, elements)
            axes.set_ylim(bottom=0)
        line[0].set_ylabel("share of the copy rate")
    for axes in grid[-1]:
        axes.set_xlabel("elements of a row")
    rate = rows[0]["tb_per_s"] / rows[0]["of_floor"]
    title(
        figure, f"residual add and norm, {rows[0]['dtype']}: share of the copy rate ({rate:.3g} TB/s), higher is better"
    )
    legend(figure, grid[0])
    return figure


def _share_line(axes: Axes, rows: list[Result], variant: str, look: dict[str, Any]) -> None:
    if not rows:
        return
    elements = [row["size"] for row in rows]
    low, high = (
        [row["of_floor"] * row["wall_ms"]["median"] / row["wall_ms"][name] for row in rows] for name in ("p80", "p20")
    )
    axes.fill_between(elements, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(elements, [row["of_floor"] for row in rows], label=variant, **look)


def learning(document: Document) -> Figure | None:
    """Accuracy on sequences not trained on, after so many steps: a panel for each task."""
    tasks = learned(document)
    if not tasks:
        return None
    looks = ways_looks(list(dict.fromkeys(model for models in tasks.values() for model in models)))
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    (line,) = panels(figure, 1, len(tasks), sharey=True)
    for axes, (task, models) in zip(line, tasks.items()):
        axes.set_title(task)
        chance = next(iter(models.values()))["chance"]
        axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance")
        for model in (name for name in looks if name in models):
            curve = models[model]["curve"]
            axes.plot(curve["step"], curve["accuracy"], label=model, **looks[model])
        axes.set_xlabel("steps of training")
        axes.set_ylim(-0.02, 1.05)
    line[0].set_ylabel("accuracy")
    title(figure, "what is learned, at the same width, parameters and steps; who has solved it stops")
    legend(figure, line, columns=6)
    return figure
