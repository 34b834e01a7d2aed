"""The pictures with lines: a norm's rate against its size, and learning; ``lengths`` has that of sequences."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.document import Document, Result, learned, plain_norms, timed_of
from benchmarks.reporting.looks import (
    WIDTH,
    doubling_axis,
    is_power_of_two,
    legend,
    panels,
    title,
    variants_looks,
    ways_looks,
)

_ODD = "no power of two"


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
    legend(figure, grid[0], last=_ODD)
    return figure


def _share_line(axes: Axes, rows: list[Result], variant: str, look: dict[str, Any]) -> None:
    if not rows:
        return
    doubled = [row for row in rows if is_power_of_two(row["size"])]
    others = [row for row in rows if not is_power_of_two(row["size"])]
    elements = [row["size"] for row in doubled]
    low, high = (
        [row["of_floor"] * row["wall_ms"]["median"] / row["wall_ms"][name] for row in doubled]
        for name in ("p80", "p20")
    )
    axes.fill_between(elements, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(elements, [row["of_floor"] for row in doubled], label=variant, **look)
    if others:  # rows that begin at any address: through them, the line would jump
        odd: dict[str, Any] = {**look, "linestyle": "", "fillstyle": "none", "label": _ODD}
        axes.plot([row["size"] for row in others], [row["of_floor"] for row in others], **odd)


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
