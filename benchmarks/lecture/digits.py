"""S8: a handwritten 1 or 2 at the left says which of the two digits at the far right is to be named.

1 is for the upper one, 2 for the lower one; scraps of digits lie between. A small CNN whose windows never span both
ends knows all three digits, but can only add up what it found, and no sum lets one digit choose among others. One layer
of self-attention between its convolutions, and every position has looked at every other. In the place of that layer
the other network has one of as many parameters, in which positions stay alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.lecture.experiment import Experiment
from benchmarks.lecture.training import train
from fastattn.models.cnn import Between, ConvNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT, WIDTH, SIDE = 20, 48, 8  # of a canvas, in pixels; a digit has SIDE x SIDE
CELL = 4  # pixels of a canvas to one position of the attention's feature map
SHIFT = 2  # a digit stands up to so many pixels from where it belongs
WITH_ATTENTION = "with self-attention"
NETWORKS: dict[str, Between] = {WITH_ATTENTION: "attention", "with 1x1 convolutions": "pointwise"}
CHANCE = 0.55  # who knows both digits and not which one is meant: right by half, and always where they are the same


class Scenes(NamedTuple):
    """Canvases with three digits each: the pointer, the upper one, the lower one."""

    images: Tensor  # [N, 1, HEIGHT, WIDTH], from 0 to 1
    labels: Tensor  # [N]: the digit that is pointed at
    places: Tensor  # [N, 3, 2]: row and column of each one's upper left corner
    digits: Tensor  # [N, 3]


class Handwriting(NamedTuple):
    """scikit-learn's digits, those of training or the others."""

    images: Tensor  # [M, SIDE, SIDE], from 0 to 1
    classes: Tensor  # [M]


@functools.cache
def handwriting(held_out: bool) -> Handwriting:
    """Every fourth digit is held out."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    chosen = (torch.arange(len(classes)) % 4 == 0) == held_out
    pixels = torch.from_numpy(images).float().view(-1, SIDE, SIDE) / 16
    return Handwriting(pixels[chosen], torch.from_numpy(classes)[chosen])


def draw_scenes(source: Handwriting, count: int, generator: torch.Generator, clutter: int = 6) -> Scenes:
    """Digits from ``source``; ``clutter`` scraps of others, 4 x 4, between the ends."""

    def number(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    pointers = ((source.classes == 1) | (source.classes == 2)).nonzero()[:, 0]
    chosen = number(len(source.classes), count, 3)
    chosen[:, 0] = pointers[number(len(pointers), count)]
    digits = source.classes[chosen]

    rows = number(SHIFT + 1, count, 3) + torch.tensor([(HEIGHT - SIDE - SHIFT) // 2, 0, HEIGHT - SIDE - SHIFT])
    columns = number(SHIFT + 1, count, 3) + torch.tensor([0, WIDTH - SIDE - SHIFT, WIDTH - SIDE - SHIFT])
    places = torch.stack((rows, columns), dim=2)
    canvas = torch.zeros(count, HEIGHT, WIDTH)
    for i in range(3):
        _paste(canvas, source.images[chosen[:, i]], places[:, i])
    first, last = SHIFT + SIDE + 1, WIDTH - SIDE - SHIFT - CELL - 1  # columns in which no scrap touches a digit
    for _ in range(clutter):
        row, column = number(SIDE - CELL + 1, 2).tolist()
        scraps = source.images[number(len(source.classes), count), row : row + CELL, column : column + CELL]
        where = torch.stack((number(HEIGHT - CELL + 1, count), first + number(last - first + 1, count)), dim=1)
        _paste(canvas, scraps, where)
    labels = digits.gather(1, digits[:, :1])[:, 0]  # 1 is the upper one's place, and 2 the lower one's
    return Scenes(canvas[:, None], labels, places, digits)


def _paste(canvas: Tensor, pieces: Tensor, places: Tensor) -> None:
    """Put square ``pieces`` ``[N, S, S]`` with their corners at ``places`` ``[N, 2]``."""
    steps = torch.arange(pieces.shape[1])
    rows = places[:, 0, None, None] + steps[:, None]
    columns = places[:, 1, None, None] + steps
    canvas[torch.arange(len(canvas))[:, None, None], rows, columns] = pieces


def learn(
    between: Between, steps: int, seed: int, held_out: Scenes, say: Callable[[str], None]
) -> tuple[ConvNet, list[dict[str, float]]]:
    """A network after ``steps`` steps of 64 fresh scenes, and its accuracy on those held out on the way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(1, 10, between=between, size=(HEIGHT, WIDTH))
    source, generator = handwriting(held_out=False), torch.Generator().manual_seed(2 * seed)  # the same for all

    def loss(step: int) -> Tensor:
        scenes = draw_scenes(source, 64, generator)
        return F.cross_entropy(model.train()(scenes.images), scenes.labels)

    curve = [{"step": 0, "accuracy": accuracy(model, held_out)}]
    for step in train(model, loss, steps, rate=1e-2):
        if step % max(1, steps // 10) == 0:
            curve.append({"step": step, "accuracy": accuracy(model, held_out)})
            say(f"{between}, step {step}: {curve[-1]['accuracy']:.3f} right")
    return model.eval(), curve


@torch.no_grad()
def accuracy(model: ConvNet, scenes: Scenes) -> float:
    return (model.eval()(scenes.images).argmax(1) == scenes.labels).double().mean().item()


@torch.no_grad()
def looked_at(model: ConvNet, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Where the pointer looks: a map over the canvas ``[N, h, w]``, and how much of it is on each digit ``[N, 3]``.

    From the cells that the pointer covers, on average; each map sums to 1.
    """
    covers = _covered_cells(scenes.places).to(scenes.images.dtype)  # [N, 3, h, w]
    pointer = covers[:, 0]
    maps = torch.einsum("nij,nijkl->nkl", pointer, model.attention_map(scenes.images))
    maps = maps / pointer.sum((1, 2))[:, None, None]
    return maps, torch.einsum("nkl,ndkl->nd", maps, covers)


def _covered_cells(places: Tensor) -> Tensor:
    """Boolean ``[..., h, w]``: the cells that a digit with its corner at ``places`` ``[..., 2]`` reaches into."""
    rows, columns = torch.arange(HEIGHT // CELL) * CELL, torch.arange(WIDTH // CELL) * CELL
    row, column = places[..., 0, None], places[..., 1, None]
    inside_rows = (rows + CELL > row) & (rows < row + SIDE)
    inside_columns = (columns + CELL > column) & (columns < column + SIDE)
    return inside_rows[..., :, None] & inside_columns[..., None, :]


def run(quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both networks on the same scenes, and what the attention looks at."""
    held_out = draw_scenes(handwriting(held_out=True), 1000, torch.Generator().manual_seed(2 * seed + 1))
    named = held_out.digits[:, 0]  # the pointer is also the place of what it points at
    rows: list[dict[str, Any]] = []
    curves, models = {}, {}
    for name, between in NETWORKS.items():
        models[name], curves[name] = learn(between, 350 if quick else 1200, seed, held_out, say)
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        rows.append({"network": name, "parameters": parameters, "accuracy": curves[name][-1]["accuracy"]})
    maps, on_digit = looked_at(models[WITH_ATTENTION], held_out)
    rows[0]["weight on the named digit"] = on_digit.gather(1, named[:, None]).mean().item()
    rows[0]["on the other one"] = on_digit.gather(1, 3 - named[:, None]).mean().item()
    ahead, bound = rows[0]["accuracy"] - rows[1]["accuracy"], 0.15 if quick else 0.3
    most = CHANCE + 0.05  # three deviations of a share of the 1000 scenes
    focus = rows[0]["weight on the named digit"] - rows[0]["on the other one"]
    claims = [
        {"text": "accuracy with attention, above that without by", "value": ahead, "bound": bound,
         "holds": ahead >= bound},
        {"text": "accuracy without attention, that of not knowing which, at most", "value": rows[1]["accuracy"],
         "bound": most, "holds": rows[1]["accuracy"] <= most},
        {"text": "the pointer's weight on the named digit, above that on the other one by", "value": focus,
         "bound": 0.3, "holds": focus >= 0.3},
    ]  # fmt: skip
    shown = [int((named == pointer).nonzero()[0]) for pointer in (1, 2)]
    return {
        "rows": rows,
        "claims": claims,
        "curves": curves,
        "images": held_out.images[shown, 0].tolist(),
        "maps": maps[shown].tolist(),
        "places": held_out.places[shown].tolist(),
        "digits": held_out.digits[shown].tolist(),
    }


def draw(result: dict[str, Any]) -> Figure:
    """Above, two scenes and where the pointer looks in them; below, how both networks learned."""
    from matplotlib.figure import Figure

    from benchmarks.reporting import looks

    figure = Figure(figsize=(looks.WIDTH, 5.4), layout="constrained")
    looks.title(figure, "The pointer at the left finds the digit that it means, at the other end of the image")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    above, below = parts
    scenes = zip(*(result[key] for key in ("images", "maps", "places", "digits")))
    for part, (image, looked, places, digits) in zip(above.subfigures(1, 2), scenes):
        meant = digits[0]
        top, bottom = part.subfigures(2, 1)
        canvas, weights = 1 - torch.tensor(image), torch.tensor(looked)
        scene = top.subplots()
        scene.imshow(canvas.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, WIDTH, HEIGHT, 0))
        scene.set_title(f"{meant}: name the {('upper', 'lower')[meant - 1]} one, a {digits[meant]}", loc="center")
        grid = weights.shape[0], weights.shape[1]
        name = ["attention from the pointer"]
        fastattn.plot_attention(weights.view(1, -1), image=canvas, grid=grid, tokens=name, figure=bottom)
        for axes in (scene, bottom.axes[0]):
            for place, colour in ((places[0], looks.GREEN), (places[meant], looks.ORANGE)):
                _frame(axes, place, colour)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set(visible=True, color="#cccccc")
    axes = below.subplots()
    for (name, curve), colour, marker in zip(result["curves"].items(), (looks.BLUE, looks.ORANGE), "os"):
        steps, right = [point["step"] for point in curve], [point["accuracy"] for point in curve]
        axes.plot(steps, right, color=colour, marker=marker, label=name)
    axes.axhline(CHANCE, color=looks.GREY, linestyle="--", label="all digits known, but not which is meant")
    axes.set(xlabel="step", ylabel="named rightly", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return figure


def _frame(axes: Any, place: list[int], colour: str) -> None:
    from matplotlib.patches import Rectangle

    row, column = place
    axes.add_patch(Rectangle((column, row), SIDE, SIDE, fill=False, edgecolor=colour, linewidth=1.5, clip_on=False))


EXPERIMENT = Experiment(
    name="digits",
    systems=("S8",),
    claim="One layer of self-attention between convolutions relates what their windows never see together.",
    run=run,
    draw=draw,
)
