"""``python -m benchmarks.pictures RUN.json``: a run as Markdown, CSV and pictures, the same bytes for the same run."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.compare import read_run
from benchmarks.tables import OURS, Result, markdown, peer_of, timed_of, write_csv

# Okabe and Ito's colours, which colour-blind people tell apart; ours is always the first.
_BLUE, _ORANGE, _GREEN, _SKY, _RED, _PINK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
_COLOURS = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, _SKY)
_GREY = "#777777"
_MARKERS = "osD^vPX<>*"
_WIDTH = 8.0  # inches, at 100 dots each: what a web page shows without scaling
_MOST_BARS = 8  # cases in a picture of memory
_STYLE = {
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
# The ways to process a sequence of length L, by what a variant's name holds; the power of L that their operations grow
# with (table 1 of arXiv:1706.03762), and colours, the last one for all that follow.
_WAYS = (
    (re.compile("rnn|gru|lstm", re.IGNORECASE), 1, (_RED, _ORANGE)),
    (re.compile("conv|tcn", re.IGNORECASE), 1, (_GREEN,)),
    (re.compile("att|sdpa", re.IGNORECASE), 2, (_BLUE, _SKY)),
)


def report(run: Path, out: Path) -> list[Path]:
    """Write ``report.md``, ``results.csv`` and the pictures of a run.

    Args:
        run: the JSON file of a run.
        out: a folder, made where it is missing; of each picture it gets an SVG and a PNG, where the run holds its data.
    Returns:
        What was written, the report first.
    Raises:
        ValueError: ``run`` is no run of this schema.
    """
    document = read_run(run)
    results = document["results"]
    out.mkdir(parents=True, exist_ok=True)
    table = out / "results.csv"
    write_csv(table, results)
    drawn: dict[str, list[tuple[str, str]]] = {}  # by family: file name without suffix, and caption
    files = []
    with matplotlib.rc_context(_STYLE):
        for family in dict.fromkeys(row["family"] for row in results):
            of_family = [row for row in results if row["family"] == family]
            for name, caption, figure in _pictures(family, of_family):
                files += _save(figure, out / name)
                drawn.setdefault(family, []).append((name, caption))
    text = out / "report.md"
    text.write_text(markdown(document, drawn))
    return [text, table, *files]


def _save(figure: Figure, stem: Path) -> list[Path]:
    metadata = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
    paths = [stem.with_name(stem.name + suffix) for suffix in metadata]
    for path in paths:
        figure.savefig(path, metadata=metadata[path.suffix])
    return paths


def _pictures(family: str, results: list[Result]) -> Iterable[tuple[str, str, Figure]]:
    """File name without suffix, caption and figure of each picture that the results of a family allow."""
    kinds: tuple[tuple[str, str, Callable[[str, list[Result]], Figure | None]], ...] = (
        ("ratio", "time of fastattn as a ratio to its peer", _ratios),
        ("size", "share of the copy rate against the row's size", _sizes),
        ("length", "time against the sequence's length", _lengths),
        ("memory", "peak memory of a step", _memory),
    )
    for name, caption, draw in kinds:
        figure = draw(family, results)
        if figure is not None:
            yield f"{family}-{name}", f"{family}: {caption}", figure


# ------------------------------------------------------------------------------------------------------------ pictures


def _short_names(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Names without the parts that all of them have, and those parts."""
    parts = [name.split("-") for name in names]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    short = {name: "-".join(p for p in of_name if p not in shared) for name, of_name in zip(names, parts)}
    return {name: text or name for name, text in short.items()}, "-".join(shared)


def _ratio_to_fastest(ours: Result, results: list[Result]) -> dict[str, float] | None:
    """Where no ratios were measured: that of the medians, and the farthest that the percentiles allow."""
    others = [row["wall_ms"] for row in timed_of(results) if row["case"] == ours["case"] and row is not ours]
    if not others:
        return None
    own, best = ours["wall_ms"], min(others, key=lambda wall: wall["median"])
    pairs = {"median": ("median", "median"), "p20": ("p20", "p80"), "p80": ("p80", "p20")}
    return {name: own[above] / best[below] for name, (above, below) in pairs.items()}


def _ratios(family: str, results: list[Result]) -> Figure | None:
    peer = peer_of(results)
    found = {}
    for row in timed_of(results):
        if row["variant"] == OURS:
            ratio = row["ratio"] if peer else _ratio_to_fastest(row, results)
            if ratio is not None:
                found[row["case"]] = ratio
    if not found:
        return None
    names, shared = _short_names(list(found))
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    looks = {"faster": (_BLUE, "o"), "no difference beyond noise": (_GREY, "D"), "slower": (_RED, "s")}
    for position, ratio in enumerate(found.values()):
        verdict = "faster" if ratio["p80"] < 1 else "slower" if ratio["p20"] > 1 else "no difference beyond noise"
        colour, marker = looks[verdict]
        axes.plot([ratio["p20"], ratio["p80"]], [position, position], color=colour, linewidth=2, alpha=0.5)
        axes.plot(ratio["median"], position, marker, color=colour)
    axes.axvline(1.0, color="black", linewidth=1)
    _ratio_axis(axes, found.values())
    axes.set_yticks(range(len(found)), [names[case] for case in found], fontsize=8.5)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"time of {OURS} / time of {peer or 'the fastest other'} (median, p20 to p80)")
    for verdict, (colour, marker) in looks.items():
        axes.plot([], [], marker, color=colour, label=verdict)
    _title(figure, f"{shared}: left of 1 {OURS} is faster")
    _legend(figure, axes)
    return figure


def _ratio_axis(axes: Axes, ratios: Collection[dict[str, float]]) -> None:
    """Logarithmic, so that twice and half as fast are as far from 1, with numbers as fine as the range is narrow."""
    low = min(0.8, *(ratio["p20"] for ratio in ratios)) / 1.1
    high = max(1.25, *(ratio["p80"] for ratio in ratios)) * 1.1
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
    ticks = fine if high / low < 4 else [2.0**power for power in range(-10, 11)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")


def _legend(figure: Figure, *axes: Axes) -> None:
    """One for all panels, each label once."""
    entries = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=4)


def _looks(variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each variant, ours first."""
    ordered = sorted(variants, key=lambda name: name != OURS)
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(ordered)
    }


def _panels(figure: Figure, rows: int, columns: int) -> list[list[Axes]]:
    return [list(line) for line in figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)]


def _variants(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in results))


def _sizes(family: str, results: list[Result]) -> Figure | None:
    rows = [
        row
        for row in timed_of(results)
        if row.get("size") and row["of_floor"] is not None and not (row["wide_residual"] or row["dropout_p"])
    ]
    if not rows:
        return None
    # The dtype of most rows: others are single points
    dtype = statistics.mode(row["dtype"] for row in rows)
    rows = [row for row in rows if row["dtype"] == dtype]
    sizes = sorted({row["size"] for row in rows})
    if len(sizes) < 2:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    looks = _looks(_variants(rows))
    figure = Figure(figsize=(_WIDTH, 1.4 + 2.5 * len(kinds)), layout="constrained")
    panels = _panels(figure, len(kinds), 2)
    for kind, line in zip(kinds, panels):
        for backward, axes in zip((False, True), line):
            axes.set_title(f"{kind} norm, {'backward' if backward else 'forward'}")
            axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="copy, measured")
            for variant, look in looks.items():
                of_line = [r for r in rows if (r["kind"], r["backward"], r["variant"]) == (kind, backward, variant)]
                _share_line(axes, sorted(of_line, key=lambda row: row["size"]), variant, look)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [_thousands(size) for size in sizes])
            axes.set_ylim(bottom=0)
        line[0].set_ylabel("share of the copy rate")
    for axes in panels[-1]:
        axes.set_xlabel("elements of a row")
    rate = rows[0]["tb_per_s"] / rows[0]["of_floor"]
    title = f"residual add and norm, {dtype}: share of the copy rate ({rate:.3g} TB/s), higher is better"
    _title(figure, title)
    _legend(figure, *panels[0])
    return figure


def _thousands(value: int) -> str:
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else str(value)


def _share_line(axes: Axes, rows: list[Result], variant: str, look: dict[str, Any]) -> None:
    if not rows:
        return
    sizes = [row["size"] for row in rows]
    low, high = (
        [row["of_floor"] * row["wall_ms"]["median"] / row["wall_ms"][name] for row in rows] for name in ("p80", "p20")
    )
    axes.fill_between(sizes, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(sizes, [row["of_floor"] for row in rows], label=variant, **look)


def _lengths(family: str, results: list[Result]) -> Figure | None:
    if family != "sequence":
        return None
    # Of one width: the one of most rows, so that a quick run's and a long one's are not mixed
    timed = timed_of(results)
    if not timed:
        return None
    width = statistics.mode((row["heads"], row["head_dim"], row["dtype"]) for row in timed)
    rows = [row for row in timed if (row["heads"], row["head_dim"], row["dtype"]) == width]
    lengths = sorted({row["seqlen"] for row in rows})
    if len(lengths) < 2:
        return None
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    ((forward, training),) = _panels(figure, 1, 2)
    looks = _ways(_variants(rows))
    for axes, backward, title in ((forward, False, "forward"), (training, True, "forward and backward")):
        axes.set_title(title)
        for variant, (look, power) in looks.items():
            line = [row for row in rows if (row["variant"], row["backward"]) == (variant, backward)]
            _time_line(axes, sorted(line, key=lambda row: row["seqlen"]), variant, look, power)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [_thousands(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("sequence length L")
    medians = [row["wall_ms"]["median"] for row in rows]
    forward.set_ylim(min(medians) / 1.5, max(medians) * 1.5)
    forward.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    forward.set_ylabel("time of a step, ms")
    heads, head_dim, dtype = width
    tokens = {row["batch"] * row["seqlen"] for row in rows}
    more = " or more" if len(tokens) > 1 else ""
    title = f"{min(tokens)} tokens{more} a step, width {heads * head_dim}, {dtype}: lower is better"
    _title(figure, title)
    forward.plot([], [], ":", color=_GREY, label="slope of its operations")
    _legend(figure, forward, training)
    return figure


def _ways(variants: Sequence[str]) -> dict[str, tuple[dict[str, Any], int | None]]:
    """How a variant looks, by the way that its name tells, and the power of its length that its work grows with."""
    found: dict[str, tuple[dict[str, Any], int | None]] = {}
    for pattern, power, colours in _WAYS:
        members = [name for name in variants if pattern.search(name) and name not in found]
        for i, name in enumerate(sorted(members, key=lambda name: name != OURS)):
            colour = colours[min(i, len(colours) - 1)]
            line = ("-", "--", "-.")[i % 3]
            found[name] = ({"color": colour, "marker": _MARKERS[i % len(_MARKERS)], "linestyle": line}, power)
    rest = [name for name in variants if name not in found]
    return found | {name: ({"color": _GREY, "marker": _MARKERS[i]}, None) for i, name in enumerate(rest)}


def _time_line(axes: Axes, rows: list[Result], variant: str, look: dict[str, Any], power: int | None) -> None:
    if not rows:
        return
    lengths = [row["seqlen"] for row in rows]
    front: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if variant == OURS else {}
    axes.plot(lengths, [row["wall_ms"]["median"] for row in rows], label=variant, **front, **look)
    if power is None or len(rows) < 2:
        return
    # Through the longest, where what grows fastest counts most; the batch may shrink as the length grows
    work = [row["batch"] * row["seqlen"] ** power for row in rows]
    last = rows[-1]["wall_ms"]["median"]
    axes.plot(lengths, [last * amount / work[-1] for amount in work], ":", color=look["color"], linewidth=1)


def _memory(family: str, results: list[Result]) -> Figure | None:
    cases: dict[str, dict[str, float]] = {}
    for row in results:
        if row["peak_mib"] is not None:
            cases.setdefault(row["case"], {})[row["variant"]] = row["peak_mib"]
    cases = {case: peaks for case, peaks in cases.items() if OURS in peaks and len(peaks) > 1}
    if not cases:
        return None
    every = len(cases)
    # The largest: they are why one asks
    kept = sorted(cases, key=lambda case: -max(cases[case].values()))[:_MOST_BARS]
    cases = {case: peaks for case, peaks in cases.items() if case in kept}
    names, shared = _short_names(list(cases))
    looks = _looks(list(dict.fromkeys(variant for peaks in cases.values() for variant in peaks)))
    bars = sum(len(peaks) + 1 for peaks in cases.values())
    figure = Figure(figsize=(_WIDTH, 1.4 + 0.2 * bars), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0, []
    for peaks in cases.values():
        start = position
        for variant in (name for name in looks if name in peaks):
            bar = axes.barh(position, peaks[variant], height=0.9, color=looks[variant]["color"], label=variant)
            axes.bar_label(bar, fmt="%.0f", padding=3, fontsize=8)
            position += 1
        ticks.append((start + position - 1) / 2)
        position += 1
    axes.margins(x=0.08)
    axes.set_yticks(ticks, [names[case] for case in cases], fontsize=8.5)
    axes.set_ylim(position - 1.2, -0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of a step beside what was there before it, MiB")
    of_all = "" if len(cases) == every else f", the largest {len(cases)} of {every} cases"
    _title(figure, f"{shared}: peak memory{of_all}, lower is better")
    _legend(figure, axes)
    return figure


# -------------------------------------------------------------------------------------------------------------- tables


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is 2 where the file is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description="Write a run as Markdown, CSV and pictures."
    )
    parser.add_argument("run", metavar="RUN.json", type=Path, help="what `python -m benchmarks --json` wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to (default: RUN, beside the file)")
    options = parser.parse_args(arguments)
    try:
        written = report(options.run, options.out or options.run.with_suffix(""))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
