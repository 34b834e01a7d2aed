"""Attention weights as pictures, by matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_Given = TypeVar("_Given", "Figure", "SubFigure")
Tokens = Sequence[str]
_MOST_PANELS = 256  # beyond, none of them could be read
_INCHES = 0.0145  # to a point of a font's size, with room to the next line of text
_FAINT = 0.3  # of an image that weights are drawn over


@overload
def plot_attention(
    weights: Tensor | Sequence[Tensor],
    *,
    tokens: Tokens | tuple[Tokens, Tokens] | None = None,
    image: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    batch: int = 0,
    title: str | None = None,
    figure: None = None,
) -> Figure: ...
@overload
def plot_attention(
    weights: Tensor | Sequence[Tensor],
    *,
    tokens: Tokens | tuple[Tokens, Tokens] | None = None,
    image: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    batch: int = 0,
    title: str | None = None,
    figure: _Given,
) -> _Given: ...
def plot_attention(
    weights: Tensor | Sequence[Tensor],
    *,
    tokens: Tokens | tuple[Tokens, Tokens] | None = None,
    image: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    batch: int = 0,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draw attention weights: a map for each head and layer, or, over an image, one for each query.

    ::

        output, weights = layer(x, x, x)  # a fastattn.MultiheadAttention
        fastattn.plot_attention(weights[0], tokens=["the", "cat", "sat"]).savefig("attention.png")

    Without ``image`` and ``grid`` a map has a row for each query and a column for each key; heads stand side by side,
    layers below each other, and all share one scale of colours, which begins at 0. With one of them the keys are places
    of an image, and each query has a map of its own, lit up as far as the query's own largest weight.

    Args:
        weights: floating ``[L, S]`` (averaged weights), ``[H, L, S]`` (of each head) or ``[B, H, L, S]``, or a list or
            tuple of such tensors, one for each layer. On any device, and with a graph or without. Averaged weights of a
            batch, ``[B, L, S]``, would be taken for heads: pass ``weights[i]``.
        tokens: the labels: ``L`` strings for self-attention; or the pair of ``L`` strings for the queries and ``S`` for
            the keys, for an alignment. Over an image only the queries have labels, ``L`` strings.
        image: what the keys are places of, drawn faintly below the weights: ``[height, width]``,
            ``[1, height, width]`` or ``[3, height, width]``, floating from 0 (black) to 1, or uint8. Needs ``grid``.
        grid: ``(h, w)``, where ``h * w == S``: the keys are the places of such a grid, row by row.
        batch: which sequence of ``[B, H, L, S]`` is drawn.
        title: of the whole figure.
        figure: a figure, or a part of one (``Figure.subfigures``), to draw into; None: a new one.

    Returns:
        The figure, which is not shown. Call its ``savefig``, or let a notebook display it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument is not of the type that is said here.
        ValueError: shapes or lengths do not fit, weights are negative or not finite, the image is not from 0 to 1, or
            there would be more than 256 maps.
    """
    layers = _checked_weights(weights, batch)
    queries, keys = layers[0].shape[1:]
    over_places = _checked_grid(grid, image, keys) is not None
    of_queries, of_keys = _checked_tokens(tokens, queries, keys, over_places)
    shown = None if image is None else _checked_image(image)
    panels = sum(len(layer) for layer in layers) * (queries if over_places else 1)
    if panels > _MOST_PANELS:
        raise ValueError(f"weights would be drawn as {panels} maps: expected at most {_MOST_PANELS}; draw a part")

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install 'fastattn[plot]'") from error
    if grid is not None:
        columns, rows = _lines_of_places(layers, queries, of_queries)
        figure = Figure(figsize=(1.3 * columns + 0.3, 1.45 * len(rows) + 0.4)) if figure is None else figure
        _draw_places(figure, rows, columns, grid, shown)
    else:
        heads = max(len(layer) for layer in layers)
        if figure is None:
            most = 7.0 if heads * len(layers) == 1 else min(3.0, max(1.4, 14.0 / heads))
            width, height = (min(max(0.21 * n, 2.0), most) for n in (keys, queries))
            figure = Figure(figsize=(width * heads + 1.8, height * len(layers) + 1.2))
        _draw_maps(figure, layers, of_queries, of_keys)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


# -------------------------------------------------------------------------------------------------------------- checks


def _checked_weights(weights: Any, batch: int) -> list[Tensor]:
    """``[H, L, S]`` on the CPU in float32 for each layer."""
    several = isinstance(weights, (list, tuple))
    if several and not weights:
        raise ValueError("weights is empty: expected a tensor for each layer")
    found: list[Tensor] = []
    for i, layer in enumerate(weights if several else [weights]):
        name = f"weights[{i}]" if several else "weights"
        if not isinstance(layer, Tensor):
            raise TypeError(f"{name} is {type(layer).__name__}: expected a torch.Tensor, or a list of them for layers")
        if not layer.is_floating_point():
            raise TypeError(f"{name} is {layer.dtype}: expected a floating dtype")
        shape = tuple(layer.shape)
        if layer.dim() not in (2, 3, 4) or 0 in shape:
            raise ValueError(f"{name} has shape {shape}: expected [L, S], [H, L, S] or [B, H, L, S], not empty")
        if layer.dim() == 4:
            if not 0 <= batch < len(layer):
                raise ValueError(f"batch={batch}: expected 0 to {len(layer) - 1}, for {name} of shape {shape}")
            layer = layer[batch]
        found.append(layer.detach().to("cpu", torch.float32).reshape(-1, *shape[-2:]))
        if found[-1].shape[1:] != found[0].shape[1:]:
            raise ValueError(
                f"{name} has shape {shape}: expected {list(found[0].shape[1:])} behind the heads, as first"
            )
        if not bool(found[-1].isfinite().all()) or bool((found[-1] < 0).any()):
            raise ValueError(f"{name} has numbers that are negative or not finite: expected attention weights")
    return found


def _checked_grid(grid: Any, image: Any, keys: int) -> tuple[int, int] | None:
    if grid is None:
        if image is not None:
            raise ValueError("image without grid: expected grid=(h, w), into how many places the keys divide it")
        return None
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(size, int) for size in grid):
        raise TypeError(f"grid={grid!r}: expected a pair of ints (h, w)")
    if min(grid) < 1 or grid[0] * grid[1] != keys:
        raise ValueError(f"grid={tuple(grid)}: expected h * w = {keys}, the number of keys")
    return grid[0], grid[1]


def _checked_tokens(tokens: Any, queries: int, keys: int, over_places: bool) -> tuple[Tokens | None, Tokens | None]:
    """Labels of the queries and of the keys."""
    if tokens is None:
        return None, None
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(f"tokens is {type(tokens).__name__}: expected a list of str (list(text) has its letters)")
    if over_places:
        return _labels("tokens", tokens, queries, "queries"), None
    if len(tokens) == 2 and not any(isinstance(part, str) for part in tokens):
        return _labels("tokens[0]", tokens[0], queries, "queries"), _labels("tokens[1]", tokens[1], keys, "keys")
    if queries != keys:
        raise ValueError(f"tokens is one list for {queries} queries and {keys} keys: expected a pair (queries, keys)")
    labels = _labels("tokens", tokens, keys, "keys")
    return labels, labels


def _labels(name: str, tokens: Any, length: int, of: str) -> list[str]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(f"{name} is {type(tokens).__name__}: expected a list of str (list(text) has its letters)")
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise TypeError(f"{name}[{i}] is {type(token).__name__}: expected a str")
    if len(tokens) != length:
        raise ValueError(f"{name} has {len(tokens)} labels: expected {length}, the number of {of}")
    return [_visible(token) for token in tokens]


def _visible(token: str) -> str:
    """A token whose blanks at its ends, and line breaks, can be seen; a blank alone would have no label."""
    token = token.replace("\n", "↵").replace("\t", "⇥")
    return token if token == token.strip() else token.replace(" ", "␣")


def _checked_image(image: Any) -> Any:
    """``[height, width, 3]`` from 0 to 1, faint."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image is {type(image).__name__}: expected a torch.Tensor")
    shape = tuple(image.shape)
    if image.dim() not in (2, 3) or 0 in shape or (image.dim() == 3 and shape[0] not in (1, 3)):
        raise ValueError(f"image has shape {shape}: expected [height, width], [1, height, width] or [3, height, width]")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image is {image.dtype}: expected a floating dtype or torch.uint8")
    pixels = image.detach().to("cpu", torch.float32) / (255 if image.dtype == torch.uint8 else 1)
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"image is from {low:.3g} to {high:.3g}: expected 0 to 1 (undo what normalised it)")
    return (1 - _FAINT * (1 - pixels.expand(3, *shape[-2:]))).permute(1, 2, 0).numpy()


# --------------------------------------------------------------------------------------------------- queries and keys


def _draw_maps(
    figure: Figure | SubFigure, layers: list[Tensor], of_queries: Tokens | None, of_keys: Tokens | None
) -> None:
    """A row of panels for each layer; ticks and labels at the left and at the bottom."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    _constrain(figure)
    heads = max(len(layer) for layer in layers)
    panels = figure.subplots(len(layers), heads, squeeze=False)
    width, height = figure.bbox.width / figure.figure.dpi, figure.bbox.height / figure.figure.dpi
    colours = ScalarMappable(Normalize(0, max(layer.max().item() for layer in layers)), "Blues")
    style: dict[str, Any] = {"cmap": colours.cmap, "norm": colours.norm, "aspect": "auto", "interpolation": "nearest"}
    for i, (line, layer) in enumerate(zip(panels, layers)):
        for head, axes in enumerate(line):
            if head >= len(layer):
                axes.set_visible(False)
                continue
            axes.imshow(layer[head].numpy(), **style)
            axes.grid(False)
            axes.tick_params(length=0)
            axes.spines[:].set(visible=True, color="#cccccc")
            if heads > 1 and i == 0:
                axes.set_title(f"head {head}", loc="left", fontsize=9)
            _label(axes, "y", of_queries if head == 0 else (), 0.8 * height / len(layers), layer.shape[1])
            _label(axes, "x", of_keys if i + 1 == len(layers) else (), 0.8 * width / heads, layer.shape[2])
        name = f"layer {i}\n" if len(layers) > 1 else ""
        line[0].set_ylabel(f"{name}query")
    for axes in panels[-1]:
        axes.set_xlabel("key")
    figure.colorbar(colours, ax=panels, label="weight", fraction=0.04, pad=0.02, aspect=30)


def _label(axes: Axes, along: str, labels: Tokens | None, inches: float, count: int) -> None:
    """Labels as large as there is room for, and only so many; numbers where there are none, nothing for ()."""
    size = min(9.0, max(5.0, inches / count / _INCHES))
    every = math.ceil(size * _INCHES * count / inches)
    turned = False
    if labels is None:
        size, labels = 8.0, [str(i) for i in range(count)]
        steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
        every = next(step for step in steps if step * inches >= 0.35 * count)
    elif along == "x":
        turned = any(len(label) > 2 for label in labels)
    places = range(0, count, every) if labels else ()
    axis: Any = axes.xaxis if along == "x" else axes.yaxis
    axis.set_ticks(places, [labels[i] for i in places], fontsize=size, rotation=90 if turned else 0, parse_math=False)


# ----------------------------------------------------------------------------------------------------------- an image


def _lines_of_places(
    layers: list[Tensor], queries: int, of_queries: Tokens | None
) -> tuple[int, list[tuple[str, list[tuple[str, Tensor]]]]]:
    """How many maps there are in a row, and the rows: a name, and a title and the weights ``[S]`` of each map.

    Heads are side by side where they share one query, else queries are; either go on in the next row.
    """

    def name(i: int, head: int | None) -> str:
        parts = [f"layer {i}"] * (len(layers) > 1) + [f"head {head}"] * (head is not None and len(layers[i]) > 1)
        return ", ".join(parts)

    named = of_queries or ([f"query {i}" for i in range(queries)] if queries > 1 else [""])
    lines: list[tuple[str, list[tuple[str, Tensor]]]] = []
    for i, layer in enumerate(layers):
        if queries == 1:
            titles = [f"head {head}" for head in range(len(layer))] if len(layer) > 1 else [named[0]]
            lines.append((name(i, None), list(zip(titles, layer[:, 0]))))
        else:
            lines += [(name(i, head), list(zip(named, of_head))) for head, of_head in enumerate(layer)]
    columns = min(8, max(len(line) for _, line in lines))
    return columns, [
        (name if start == 0 else "", line[start : start + columns])
        for name, line in lines
        for start in range(0, len(line), columns)
    ]


def _draw_places(
    figure: Figure | SubFigure,
    rows: list[tuple[str, list[tuple[str, Tensor]]]],
    columns: int,
    grid: tuple[int, int],
    image: Any,
) -> None:
    """A panel for each query and head: the image, and over it its weights, the more opaque the larger they are."""
    import numpy

    _constrain(figure)
    extent = (0, grid[1], grid[0], 0) if image is None else (0, image.shape[1], image.shape[0], 0)
    for (name, line), axes in zip(rows, figure.subplots(len(rows), columns, squeeze=False)):
        for panel, (title, weights) in _with_rest_hidden(axes, line):
            light = (weights / weights.max().clamp_min(1e-30)).view(grid).numpy()
            if image is not None:
                panel.imshow(image, extent=extent)
            colour = numpy.full_like(light, 0.8)
            panel.imshow(
                colour, cmap="Blues", vmin=0, vmax=1, alpha=0.85 * light, extent=extent, interpolation="nearest"
            )
            panel.set_title(title, loc="center", fontsize=9, parse_math=False)
            panel.set(xticks=(), yticks=())
            panel.grid(False)
            panel.spines[:].set(visible=True, color="#cccccc")
        axes[0].set_ylabel(name, fontsize=9)


def _with_rest_hidden(axes: Any, line: list[tuple[str, Tensor]]) -> Iterator[tuple[Axes, tuple[str, Tensor]]]:
    """Panels with what is drawn in each; those that are left over are not seen."""
    for panel in axes[len(line) :]:
        panel.set_visible(False)
    yield from zip(axes, line)


def _constrain(figure: Figure | SubFigure) -> None:
    """Let matplotlib make room for labels, unless whoever made the figure chose otherwise."""
    whole: Any = figure.figure
    if whole.get_layout_engine() is None:
        whole.set_layout_engine("constrained")
