"""The picture of the ways to process a sequence: time and memory of a token against the sequence's length.

There are more ways than colours that can be told apart: ours and the fastest of each kind stand in front, the others
are grey.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.reporting.document import OURS, Document, Result, reaches, sequence_rows, timed_of, way_of
from benchmarks.reporting.looks import (
    BLUE,
    GREEN,
    RED,
    SKY,
    WIDTH,
    decimal_axis,
    doubling_axis,
    legend_of,
    panels,
    title,
)

Quantity = Callable[[Result], float]

# Those that hold a number for each pair of tokens at once (families.sequence.Way.held); the memory of all others is
# linear in the sequence's length. In training nn.MultiheadAttention holds no scores unless it returns weights.
_PAIRS_HELD = {False: re.compile("naive-att|-weights|^nn.Multihead"), True: re.compile("naive-att|-weights")}

_PALE = "#b0b0b0"
_OTHERS: dict[str, Any] = {"color": _PALE, "linewidth": 0.8, "marker": ".", "markersize": 3, "zorder": 1}
_IN_FRONT: dict[str, dict[str, Any]] = {
    OURS: {"color": BLUE, "marker": "o", "linewidth": 2.5, "zorder": 4},
    "attention": {"color": SKY, "marker": "s", "linewidth": 1.8, "zorder": 3},
    "recurrence": {"color": RED, "marker": "D", "linewidth": 1.8, "zorder": 3},
    "convolution": {"color": GREEN, "marker": "^", "linewidth": 1.8, "zorder": 3},
}
_PANEL_HEIGHT = 3.2  # inches of a row that a panel has at least, its titles and numbers aside
_LABEL_SIZE = 8  # points


def lengths(document: Document) -> Figure | None:
    """Time, and memory where it was measured, against L, each beside what theory says of its growth.

    Of a token, since a run shrinks the batch as L grows, until it is 1: so what is linear in L is flat throughout.
    """
    rows, reach = timed_of(sequence_rows(document)), reaches(document)
    seqlens = sorted({row["seqlen"] for row in rows})
    if len(seqlens) < 2:
        return None
    measures: list[tuple[str, list[Result], Quantity, Quantity]] = [("time per token, µs", rows, _time, _operations)]
    if weighed := [row for row in rows if row["peak_mib"]]:
        measures.append(("peak memory per token, KiB", weighed, _memory, _held))
    figure = Figure(figsize=(WIDTH, 1.4 + 3.7 * len(measures)), layout="constrained")
    grid = panels(figure, len(measures), 2, sharex=True, sharey="row")
    for line, (label, measured, quantity, growth) in zip(grid, measures):
        decimal_axis(line[0], [quantity(row) for row in measured])
        line[0].set_ylabel(label)
        for backward, axes in zip((False, True), line):
            axes.set_title("training: forward and backward" if backward else "evaluation")
            doubling_axis(axes, seqlens)
            axes.set_xlim(seqlens[0] / 1.15, seqlens[-1] * 1.15)
            front = in_front([row for row in rows if row["backward"] == backward], reach)
            _panel(axes, [row for row in measured if row["backward"] == backward], quantity, growth, front, reach)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length L")
    of_all = f"width {rows[0]['heads'] * rows[0]['head_dim']}, {rows[0]['dtype']}"
    title(
        figure,
        f"one token, {of_all}: lower is better, and flat is linear in L\n"
        "in colour ours and, of each kind, the fastest that reaches every token",
    )
    names = {OURS: OURS, "attention": "fastest other attention"}
    handles = {names.get(way, f"fastest {way}"): Line2D([], [], **look) for way, look in _IN_FRONT.items()}
    handles |= {"other ways": Line2D([], [], **_OTHERS), "growth by theory": Line2D([], [], **_DOTTED, color="black")}
    legend_of(figure, handles, columns=3)
    return figure


def in_front(rows: Sequence[Result], reach: dict[str, int | None]) -> dict[str, str]:
    """Ours, and the fastest other of each kind at the longest sequence that its kind took; by variant, which it is.

    A variant whose last output depends on a few tokens alone solves another problem, and is not counted.
    """
    front = {row["variant"]: OURS for row in rows if row["variant"] == OURS}
    for way in (name for name in _IN_FRONT if name != OURS):
        of_way = [row for row in rows if way_of(row["variant"]) == way and reach.get(row["variant"]) is None]
        of_way = [row for row in of_way if row["variant"] != OURS]
        if of_way:
            longest = max(row["seqlen"] for row in of_way)
            front[min((row for row in of_way if row["seqlen"] == longest), key=_time)["variant"]] = way
    return front


_DOTTED: dict[str, Any] = {"linestyle": ":", "linewidth": 1}


def _panel(
    axes: Axes,
    rows: list[Result],
    quantity: Quantity,
    growth: Quantity,
    front: dict[str, str],
    reach: dict[str, int | None],
) -> None:
    """A line for each variant with its name at the right, and for those in front what theory says of its growth."""
    ends: list[_End] = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of_one = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seqlen"])
        look = _IN_FRONT[front[variant]] if variant in front else _OTHERS
        seqlens, found = [row["seqlen"] for row in of_one], [quantity(row) for row in of_one]
        axes.plot(seqlens, found, label=variant, **look)
        if variant in front and growth(of_one[-1]):
            # Through the longest, where what grows fastest counts most
            expected = [found[-1] * growth(row) / growth(of_one[-1]) for row in of_one]
            axes.plot(seqlens, expected, color=look["color"], zorder=2, **_DOTTED)
        name = f"{variant}, reaches {limit}" if (limit := reach.get(variant)) else variant
        ends.append((name, seqlens[-1], found[-1], look["color"] if variant in front else None))
    _name_lines(axes, ends)


_End = tuple[str, float, float, str | None]  # a name, where its line ends, and its colour if it stands in front


def _name_lines(axes: Axes, ends: list[_End]) -> None:
    """Names at the right of a panel, each as near to the height at which its line ends as the others let it be."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[2])
    wanted = [(math.log(y) - low) / (high - low) for _, _, y, _ in ends]
    gap = 1.2 * _LABEL_SIZE / 72 / _PANEL_HEIGHT
    for (name, x, y, colour), height in zip(ends, apart(wanted, gap)):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.05, height),
            textcoords="axes fraction",
            annotation_clip=False,
            fontsize=_LABEL_SIZE if colour else _LABEL_SIZE - 1,
            fontweight="bold" if colour else "normal",
            color=colour or "#666666",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour or _PALE,
                "linestyle": (0, (1, 3)),  # so that nobody takes it for a measurement
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def apart(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Heights in the order of those wanted, at least ``gap`` apart, and as near to them in squares as that allows.

    Less ``gap`` times its rank, a height has only not to lie below the one before: an isotonic regression, solved by
    pooling neighbours that are in the wrong order into their mean. Within ``low`` to ``high`` where there is room.
    """
    pools: list[list[float]] = []
    for rank, height in enumerate(wanted):
        pool = [height - rank * gap]
        while pools and _mean(pools[-1]) > _mean(pool):
            pool = pools.pop() + pool
        pools.append(pool)
    placed = [_mean(pool) for pool in pools for _ in pool]
    top = max(low, high - (len(wanted) - 1) * gap)
    return [min(max(height, low), top) + rank * gap for rank, height in enumerate(placed)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
