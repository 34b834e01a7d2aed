"""Draws the pictures of docs/masks.md and docs/cookbook.md: ``python docs/tools/draw_masks.py``.

Each picture shows what the code above it on the page computes: the code runs, and the last call of
fastattn.attention is made again with queries that are zero, whose weights show nothing but the masks.
"""

import itertools
import re
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import fastattn

DOCS = Path(__file__).parents[1]
PAGES = (DOCS / "masks.md", DOCS / "cookbook.md")
PICTURES = DOCS / "pictures"
_BLOCK_OR_PICTURE = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^!\[[^\]]*\]\(pictures/(?P<name>\w+\.svg)\)$", re.M | re.S
)
_SHADES = LinearSegmentedColormap.from_list("shades", ["#d3e5f1", "#0072B2"])  # the blue of the benchmarks' pictures
_STYLE = {"font.size": 9, "svg.hashsalt": "fastattn", "axes.edgecolor": "#777777", "axes.labelcolor": "#333333"}


def weights_of_page(page: Path) -> dict[str, np.ndarray]:
    """``[L, S]`` by the picture's name: the weights of the last call in front of it, of its first sequence and head."""
    attend, space, found = fastattn.attention, {}, {}
    call: list[Any] = []

    def noted(*tensors: torch.Tensor, **words: Any) -> Any:
        call[:] = tensors, words
        return attend(*tensors, **words)

    with mock.patch.object(fastattn, "attention", noted), fastattn.use_backend("torch"):
        for match in _BLOCK_OR_PICTURE.finditer(page.read_text(encoding="utf-8")):
            if match["code"] is not None:
                exec(compile(match["code"], page.name, "exec"), space)
            else:
                (query, *others), words = call
                result = attend(query * 0, *others, **words, need_weights=True, average_attn_weights=False)
                found[match["name"]] = result[1][0, 0].detach().numpy()
    return found


def draw(weights: np.ndarray) -> Figure:
    """A square for each pair that is seen, the darker the more it weighs in its row."""
    queries, keys = weights.shape
    inch = 0.17 if keys <= 16 else 0.05  # of a square
    runs, shades = [], []  # neighbours of one shade are one rectangle, which keeps the file small
    for row, line in enumerate(weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-30)):
        for shade, run in itertools.groupby(range(keys), key=line.round(3).__getitem__):
            if shade > 0:
                places = [*run]
                left, right = places[0], places[-1] + 1
                runs.append([(left, row), (right, row), (right, row + 1), (left, row + 1)])
                shades.append(_SHADES(float(shade)))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(0.6 + inch * keys, max(0.9, 0.5 + inch * queries)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        # With edges of their own colour neighbouring rows have no light line between them.
        axes.add_collection(PolyCollection(runs, facecolors=shades, edgecolors="face", linewidths=0.3))
        axes.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal", xlabel="keys", ylabel="queries")
        axes.set(xticks=range(keys + 1), yticks=range(queries + 1))
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        if keys <= 16:
            axes.grid(color="white", linewidth=1)
    return figure


def write(folder: Path) -> list[Path]:
    """Draw every picture of the pages into ``folder``."""
    paths = []
    for page in PAGES:
        for name, weights in weights_of_page(page).items():
            paths.append(folder / name)
            with mpl.rc_context(_STYLE):
                draw(weights).savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    print(*write(PICTURES), sep="\n")
