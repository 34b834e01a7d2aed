"""S3: pictures of several handwritten digits, and a caption that reads them out: "three one seven".

The same decoder as for dates, on the grid of features that a small CNN makes. Without attention one vector has to say
which digits stand where; with it each word has a look of its own at the picture, and what it looks at can be drawn.
Only captions are given: which digit is where, and that there are such things as digits, is never told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from benchmarks.lecture.digits import Handwriting, handwriting
from benchmarks.lecture.experiment import Experiment
from benchmarks.lecture.training import train
from fastattn.models import ImageCaptioner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "(start)", "(end)")
START, END = 10, 11
SIDE, CELL = 8, 12  # pixels of a digit, and of the cell that it stands in, anywhere
SHARE = CELL // 4  # positions of the CNN's grid to a cell, in each direction


# ------------------------------------------------------------------------------------------------------------ pictures


class Pictures(NamedTuple):
    """Digits in some of the cells of a square, and the words for them in reading order."""

    images: Tensor  # [N, 1, CELL * cells, CELL * cells], from 0 to 1
    captions: Tensor  # [N, 2 + most]: START, a word for each digit, END from there on
    places: Tensor  # [N, most]: the cell of each digit, numbered in reading order, then -1


def draw_pictures(source: Handwriting, count: int, cells: int, most: int, generator: torch.Generator) -> Pictures:
    """``count`` pictures of ``cells`` x ``cells`` cells with 1 to ``most`` digits."""

    def number(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    digits = 1 + number(most, count, 1)
    taken = torch.rand(count, cells * cells, generator=generator).argsort(1).argsort(1) < digits  # [N, cells]
    which = number(len(source.classes), count, cells * cells)
    canvas = torch.zeros(count, cells * cells, CELL, CELL)
    down, right = number(CELL - SIDE + 1, 2, count, cells * cells, 1, 1)
    picture, cell = torch.arange(count)[:, None, None, None], torch.arange(cells * cells)[:, None, None]
    steps = torch.arange(SIDE)
    canvas[picture, cell, down + steps[:, None], right + steps] = source.images[which] * taken[..., None, None]
    images = canvas.view(count, cells, cells, CELL, CELL).transpose(2, 3).reshape(count, 1, cells * CELL, cells * CELL)

    # The cells that are taken first, each half in reading order
    order = (~taken).long().argsort(dim=1, stable=True)[:, :most]
    behind = torch.arange(most) >= digits
    words = source.classes[which].gather(1, order).masked_fill(behind, END)
    edge = torch.full((count, 1), END)
    return Pictures(images, torch.cat((edge - 1, words, edge), dim=1), order.masked_fill(behind, -1))


def behind_the_end(captions: Tensor) -> Tensor:
    """True at each END but the first, ``[N, T]``."""
    ended = captions == END
    return ended & ended.roll(1, dims=1)


# ------------------------------------------------------------------------------------------------------------ networks


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the experiment: 1 to ``most`` digits in ``cells`` x ``cells`` cells, ``steps`` of ``batch`` pictures."""

    cells: int
    most: int
    steps: int
    asked: int
    batch: int = 32
    channels: int = 48


def learn(size: Size, attention: bool, seed: int, say: Callable[[str], None]) -> ImageCaptioner:
    """A network that learned from captions alone."""
    generator = torch.Generator().manual_seed(seed)  # both networks see the same pictures
    source = handwriting(held_out=False)
    pixels = CELL * size.cells
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention_dim = 32 if attention else None
        model = ImageCaptioner(1, len(WORDS), (pixels, pixels), channels=size.channels, attention_dim=attention_dim)
    losses: list[float] = []

    def loss(step: int) -> Tensor:
        pictures = draw_pictures(source, size.batch, size.cells, size.most, generator)
        found = model.loss(pictures.images, pictures.captions, behind_the_end(pictures.captions))
        losses.append(found.item())
        return found

    for step in train(model, loss, size.steps, rate=2e-3):
        if step % (size.steps // 5) == 0:
            name = "with attention" if attention else "without"
            say(f"  {name}, step {step}: {sum(losses[-20:]) / 20:.3f} nats a word")
    return model.eval()


def right_captions(model: ImageCaptioner, pictures: Pictures) -> Tensor:
    """Boolean ``[N]``: every word of the caption that it says, running free, is right, and so is its end."""
    length = pictures.captions.shape[1] - 1
    said = model.generate(pictures.images, length, start=START, end=END).tokens
    said = torch.nn.functional.pad(said, (0, length + 1 - said.shape[1]), value=END)
    return (said == pictures.captions).all(1)


@torch.no_grad()
def looked_at(model: ImageCaptioner, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """The cell on which most weight lies before each word, ``[N, most]``, and the weights ``[N, most, h, w]``."""
    weights = model(pictures.images, pictures.captions[:, :-1], need_weights=True)[1]
    assert weights is not None
    height, width = model.grid
    weights = weights[:, : pictures.places.shape[1]]
    most = weights.argmax(-1)
    cells = most // width // SHARE * (width // SHARE) + most % width // SHARE
    return cells, weights.unflatten(-1, (height, width))


# ------------------------------------------------------------------------------------------------------ the experiment

QUICK = Size(cells=2, most=3, steps=600, asked=256, channels=64)
FULL = Size(cells=3, most=4, steps=1300, asked=512)


def run(quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    size = QUICK if quick else FULL
    models = {name: learn(size, attention, seed, say) for name, attention in (("without", False), ("with", True))}
    generator = torch.Generator().manual_seed(seed)
    pictures = draw_pictures(handwriting(held_out=True), size.asked, size.cells, size.most, generator)
    right = {name: right_captions(model, pictures) for name, model in models.items()}
    cells, weights = looked_at(models["with"], pictures)
    there = cells == pictures.places
    digits = (pictures.places >= 0).sum(1)
    rows = []
    for count in range(1, size.most + 1):
        these = digits == count
        row: dict[str, Any] = {"digits": count, "pictures": int(these.sum())}
        row |= {f"captions right, {name}": of_all[these].double().mean().item() for name, of_all in right.items()}
        rows.append(row | {"looks at the digit it names": there[these, :count].double().mean().item()})
    with_, without = (right[name][digits == size.most].double().mean().item() for name in ("with", "without"))
    on_digits = there[pictures.places >= 0].double().mean().item()
    claims = [
        (f"captions of {size.most} digits that are right: with attention more than without by", with_ - without, 0.3),
        ("words before which most weight lies on the digit's cell", on_digits, 0.9),
    ]
    shown = torch.nonzero((digits == size.most) & right["with"])[:3, 0]
    return {
        "rows": rows,
        "claims": [
            {"text": text, "value": value, "bound": at_least, "holds": value >= at_least}
            for text, value, at_least in claims
        ],
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "shown": [
            {
                "image": [[round(16 * pixel) for pixel in line] for line in pictures.images[i, 0].tolist()],
                "words": [WORDS[word] for word in pictures.captions[i, 1:-1].tolist()],
                "weights": [[[round(w, 4) for w in line] for line in word] for word in weights[i].tolist()],
            }
            for i in shown.tolist()
        ],
    }


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy against the number of digits, and pictures, before each word what is looked at lit up."""
    import numpy as np
    from matplotlib.figure import Figure

    from benchmarks.reporting.looks import BLUE, RED, WIDTH, title

    shown, rows = result["shown"], result["rows"]
    figure = Figure(figsize=(WIDTH, 1.6 * max(1, len(shown)) + 2.9), layout="constrained")
    heights = 2.4, 1.6 * max(1, len(shown))
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    axes = above.subplots()
    for name, colour, marker in (("with", BLUE, "o"), ("without", RED, "s")):
        right = [row[f"captions right, {name}"] for row in rows]
        axes.plot([row["digits"] for row in rows], right, color=colour, marker=marker, label=f"{name} attention",
                  clip_on=False, zorder=3)  # fmt: skip
    axes.set_xticks([row["digits"] for row in rows])
    axes.set(ylim=(0, 1), ylabel="captions all right", xlabel="digits in a picture")
    axes.legend(loc="lower left")

    lines: Any = below.subfigures(max(1, len(shown)), 2, squeeze=False, width_ratios=(1, len(rows)))
    for (alone, looked), example in zip(lines, shown):
        image = 1 - torch.tensor(example["image"]) / 16
        alone.subplots().imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        weights = torch.tensor(example["weights"])
        grid = weights.shape[1], weights.shape[2]
        fastattn.plot_attention(weights.flatten(1), image=image, grid=grid, tokens=example["words"], figure=looked)
        edges = np.arange(CELL, len(image), CELL)
        for panel, start in [(alone.axes[0], -0.5), *((panel, 0) for panel in looked.axes)]:
            panel.set_xticks(edges + start, [])
            panel.set_yticks(edges + start, [])
            panel.tick_params(length=0)
            panel.set_axisbelow(False)
            panel.grid(True)
            panel.spines[:].set(visible=True, color="#cccccc")
        alone.axes[0].set_title(" ", loc="center", fontsize=9)  # so that it stands as high as those with words
    title(figure, "Digits read out: before each word the decoder looks at the digit")
    return figure


EXPERIMENT = Experiment(
    "captions",
    ("S3",),
    "Each word has a look of its own at the picture, and looks, without being told, at the digit that it names.",
    run,
    draw,
)
