"""Draws the picture of docs/distributed_model.md: ``python docs/tools/draw_methods.py``.

Which method of context parallelism the communication model chooses, over the number of ranks and the length.
"""

import dataclasses
import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastattn.distributed.cluster import A2_ULTRA, DGX_H100, Cluster
from fastattn.distributed.model import Choice, choose
from fastattn.distributed.workload import Workload

PICTURES = Path(__file__).parents[1] / "pictures"
NAME = "context_parallel_methods.svg"
POWERS = range(3, 13)  # of 2, ranks
LENGTHS = np.arange(13, 24.01, 0.25)  # powers of 2, tokens
WHOLE = Workload(batch=1, heads=32, kv_heads=8, length=2**20, head_dim=128, is_causal=True, training=True)
_COLOURS = {"allgather": "#E69F00", "ulysses": "#0072B2", "2d": "#009E73", "ring": "#CC79A7", "does not fit": "#BBBBBB"}
_LABELS = {
    "allgather": "all-gather",
    "ulysses": "Ulysses",
    "2d": "2-D",
    "ring": "ring",
    "does not fit": "too\nlarge",
}
_CLOSE = 1.1  # a runner-up that takes less than so many times as long makes a cell pale
_STYLE = {"font.size": 9, "svg.hashsalt": "fastattn", "axes.edgecolor": "#777777", "axes.labelcolor": "#333333"}


def with_tensor_parallelism(cluster: Cluster) -> Cluster:
    """One rank a node, with a rank's share of the ports: the others compute other heads, and send at the same time."""
    share = cluster.ports_per_node / cluster.ranks_per_node
    between = dataclasses.replace(cluster.between, bandwidth=cluster.between.bandwidth * share)
    return dataclasses.replace(cluster, between=between, ranks_per_node=1, ports_per_node=1)


def cell(choice: Choice, cluster: Cluster) -> tuple[str, bool]:
    """What a cell of the picture says: the method, and whether another is about as fast."""
    times = sorted(of.time_s for of in choice.estimates.values() if of.memory <= cluster.memory)
    if not times:
        return "does not fit", False
    return choice.method, len(times) > 1 and times[1] < _CLOSE * times[0]


def cells(workload: Workload, cluster: Cluster) -> list[list[tuple[str, bool] | None]]:
    """A column for each number of ranks, with a cell for each length; None where a rank has less than two tokens."""
    columns = []
    for power in POWERS:
        ranks = 2**power
        lengths = [2 * ranks * round(2**length / (2 * ranks)) for length in LENGTHS]
        columns.append([
            cell(choose(dataclasses.replace(workload, length=length), ranks, cluster, balance="zigzag"), cluster)
            if length
            else None
            for length in lengths
        ])  # fmt: skip
    return columns


def draw_panel(axes: Axes, columns: list[list[tuple[str, bool] | None]]) -> None:
    """Cells of one look that lie over each other are one rectangle; each method's name stands where it has most
    room."""
    step = LENGTHS[1] - LENGTHS[0]
    corners, colours = [], []
    for x, column in enumerate(columns):
        for look, run in itertools.groupby(range(len(column)), key=column.__getitem__):
            if look is not None:
                places = [*run]
                low, high = LENGTHS[places[0]] - step / 2, LENGTHS[places[-1]] + step / 2
                corners.append([(x, low), (x + 1, low), (x + 1, high), (x, high)])
                method, close = look
                strength = 0.45 if close else 1.0
                colours.append(tuple(1 - strength * (1 - part) for part in to_rgb(_COLOURS[method])))
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="face", linewidths=0.3))
    methods = np.array([[look[0] if look else "" for look in column] for column in columns])
    for method in sorted({*methods.flat} - {""}):
        x, y, room, width = _middle(methods == method)
        label = _LABELS[method]
        rotation = 90 if width < 2 and len(label.split()[-1]) > 5 else 0
        if room > 0.4:
            axes.text(x, y, label, ha="center", va="center", color="#111111", rotation=rotation)
    axes.set(xlim=(0, len(columns)), ylim=(LENGTHS[0] - step / 2, LENGTHS[-1] + step / 2))
    axes.set_xticks(np.arange(len(columns)) + 0.5, [str(2**power) for power in POWERS])
    powers = range(int(LENGTHS[0]), int(LENGTHS[-1]) + 1)
    axes.set_yticks(powers, [f"{2 ** (p - 10)}K" if p < 20 else f"{2 ** (p - 20)}M" for p in powers])
    axes.tick_params(length=0)


def _middle(inside: np.ndarray) -> tuple[float, float, float, int]:
    """Of a region's cells the one that is farthest from what is outside: its place, how far that is, with a column as
    the unit, and over how many columns the region goes on there."""
    bordered = np.pad(inside, 1)
    column, row = np.indices(bordered.shape)
    x, y = column - 0.5, LENGTHS[0] + (row - 1) * (LENGTHS[1] - LENGTHS[0])
    outside = np.stack([x[~bordered], y[~bordered]], 1)
    within = np.stack([x[bordered], y[bordered]], 1)
    room = np.abs(within[:, None] - outside).max(2).min(1)
    # Of equally good cells the middle one.
    best = np.flatnonzero(room >= room.max() - 1e-9)
    chosen = best[np.abs(within[best] - within[best].mean(0)).sum(1).argmin()]
    in_row = bordered[:, row[bordered][chosen]]
    here = column[bordered][chosen]
    left, right = (np.argmin(side) for side in (in_row[here::-1], in_row[here:]))  # steps to the first cell outside
    x_of_text = within[chosen][0] + (right - left) / 2
    return float(x_of_text), float(within[chosen][1]), float(room.max()), int(left + right - 1)


def draw() -> Figure:
    """Two clusters side by side, all heads above, and what tensor parallelism within a node leaves of them below."""
    clusters = (DGX_H100, A2_ULTRA)
    few = dataclasses.replace(WHOLE, heads=4, kv_heads=1)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 7.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for above, below, cluster in zip(*panels, clusters):
            draw_panel(above, cells(WHOLE, cluster))
            draw_panel(below, cells(few, with_tensor_parallelism(cluster)))
            above.set_title(f"{cluster.name}\n32 heads, 8 of keys", loc="left", fontsize=9)
            below.set_title("one rank a node: 4 heads, 1 of keys", loc="left", fontsize=9)
            below.set_xlabel("ranks that share a sequence")
        for axes in panels[:, 0]:
            axes.set_ylabel("tokens")
    return figure


def write(folder: Path) -> list[Path]:
    """Draw the picture into ``folder``."""
    path = folder / NAME
    with mpl.rc_context(_STYLE):
        draw().savefig(path, metadata={"Date": None, "Creator": None})
    return [path]


if __name__ == "__main__":
    print(*write(PICTURES), sep="\n")
