"""How every picture looks: colours, markers, titles, legends and axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.reporting.document import OURS, way_of

# Okabe and Ito's colours, which colour-blind people tell apart; ours is always the first.
BLUE, ORANGE, GREEN, SKY, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
YELLOW, BROWN = "#F0E442", "#8B5A2B"
GREY = "#777777"
WIDTH = 8.0  # inches, at 100 dots each: what a web page shows without scaling
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 100,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "svg.hashsalt": "fastattn",  # else the ids in the file are drawn at random
}

_COLOURS = (RED, GREEN, ORANGE, PINK, SKY, YELLOW, BROWN, GREY)  # of others than ours
_MARKERS = "osD^vPX<>*"
# Of each way to process a sequence; the last is for all that follow.
_OF_WAYS: dict[str | None, tuple[str, ...]] = {
    "attention": (BLUE, SKY),
    "recurrence": (RED,),
    "convolution": (GREEN,),
    None: (GREY,),
}


def variants_looks(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each variant, ours first; nobody else is blue."""
    others = (name for name in variants if name != OURS)
    looks = {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[1 + i % (len(_MARKERS) - 1)]}
        for i, name in enumerate(others)
    }
    return {OURS: {"color": BLUE, "marker": _MARKERS[0]}} | looks


def ways_looks(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """A colour for each way to process a sequence, a line and a marker for each of its like; ours stands out."""
    looks: dict[str, dict[str, Any]] = {}
    for way, colours in _OF_WAYS.items():
        members = sorted((name for name in names if way_of(name) == way), key=lambda name: name != OURS)
        for i, name in enumerate(members):
            look = {
                "color": colours[min(i, len(colours) - 1)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "linestyle": ("-", "--", "-.")[i % 3],
            }
            looks[name] = look | ({"linewidth": 2.5, "zorder": 3} if name == OURS else {})
    return looks


def title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")


def legend(figure: Figure, axes: Iterable[Axes], *, columns: int = 4, last: str = "") -> None:
    """One for all panels, each label once, in the order in which they were drawn, but for the one that comes last."""
    entries = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels())}
    legend_of(figure, dict(sorted(entries.items(), key=lambda entry: entry[0] == last)), columns=columns)


def legend_of(figure: Figure, entries: dict[str, Any], *, columns: int = 4) -> None:
    """Labels and what is drawn beside each, read line by line, as text is; matplotlib fills column by column."""
    labels = [label for column in range(columns) for label in list(entries)[column::columns]]
    figure.legend([entries[label] for label in labels], labels, loc="outside lower left", ncols=columns)


def panels(figure: Figure, rows: int, columns: int, **share: Any) -> list[list[Axes]]:
    return [list(line) for line in figure.subplots(rows, columns, squeeze=False, **share)]


def doubling_axis(axes: Axes, values: Sequence[int]) -> None:
    """Of sizes that double: a tick at each, without those that are no power of two or would touch their neighbours."""
    axes.set_xscale("log", base=2)
    shown: list[int] = []
    for value in sorted(filter(is_power_of_two, values), reverse=True):  # the largest always
        if not shown or math.log2(shown[-1] / value) >= math.log2(max(values) / min(values)) / 8:
            shown.append(value)
    shown.reverse()
    axes.set_xticks(shown, [f"{v // 1024}K" if v >= 1024 and v % 1024 == 0 else str(v) for v in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def is_power_of_two(value: int) -> bool:
    return value.bit_count() == 1


def decimal_axis(axes: Axes, values: Collection[float]) -> None:
    """Logarithmic, in numbers that people write, and wide enough for the values and a little more."""
    low, high = min(values) / 1.4, max(values) * 1.4
    steps = (1,) if high / low > 300 else (1, 2, 5) if high / low < 30 else (1, 3)
    ticks = [step * 10.0**power for power, step in itertools.product(range(-9, 10), steps)]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ratio_axis(axes: Axes, low: float, high: float) -> None:
    """Logarithmic, so that twice and half as fast are as far from 1, with numbers as fine as the range is narrow."""
    low, high = min(0.8, low) / 1.1, max(1.25, high) * 1.1
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
    medium = (0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0, 8.0)
    ticks = fine if high / low < 4 else medium if high / low < 20 else [2.0**power for power in range(-10, 11)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
