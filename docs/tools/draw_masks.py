"""Draws the pictures of docs/masks.md: ``python docs/tools/draw_masks.py``.

Each picture shows what the code above it on the page computes: the code runs, and the last call of
fastattn.attention is made again with queries that are zero, whose weights show nothing but the masks.
"""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import fastattn

PAGE = Path(__file__).parents[1] / "masks.md"
PICTURES = PAGE.parent / "pictures"
_BLOCK_OR_PICTURE = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^!\[[^\]]*\]\(pictures/(?P<name>\w+\.svg)\)$", re.M | re.S
)
_SHADES = LinearSegmentedColormap.from_list("shades", ["#d3e5f1", "#0072B2"])  # the blue of the benchmarks' pictures
_STYLE = {"font.size": 9, "svg.hashsalt": "fastattn", "axes.edgecolor": "#777777", "axes.labelcolor": "#333333"}


def weights_of_page(text: str) -> dict[str, np.ndarray]:
    """``[L, S]`` by the picture's name: the weights of the last call in front of it, of its first sequence and head."""
    attend, space, found = fastattn.attention, {}, {}
    call: list[Any] = []

    def noted(*tensors: torch.Tensor, **words: Any) -> Any:
        call[:] = tensors, words
        return attend(*tensors, **words)

    with mock.patch.object(fastattn, "attention", noted), fastattn.use_backend("torch"):
        for match in _BLOCK_OR_PICTURE.finditer(text):
            if match["code"] is not None:
                exec(compile(match["code"], PAGE.name, "exec"), space)
            else:
                (query, *others), words = call
                result = attend(query * 0, *others, **words, need_weights=True, average_attn_weights=False)
                found[match["name"]] = result[1][0, 0].detach().numpy()
    return found


def draw(weights: np.ndarray) -> Figure:
    """A square for each pair that is seen, the darker the more it weighs in its row."""
    queries, keys = weights.shape
    shade = weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-30)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(0.6 + 0.17 * keys, 0.5 + 0.17 * queries), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.pcolormesh(
            np.ma.masked_equal(shade, 0.0), cmap=_SHADES, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=1
        )
        axes.set(
            xlim=(0, keys), ylim=(queries, 0), aspect="equal", xlabel="keys", ylabel="queries", xticks=[], yticks=[]
        )
    return figure


def write(folder: Path) -> list[Path]:
    """Draw every picture of the page into ``folder``."""
    paths = []
    for name, weights in weights_of_page(PAGE.read_text(encoding="utf-8")).items():
        paths.append(folder / name)
        with mpl.rc_context(_STYLE):
            draw(weights).savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    print(*write(PICTURES), sep="\n")
