"""S1 and S2: dates written in many ways, one or several in a line, into 2026-11-22, letter by letter.

Two networks of the same sizes learn it from the same lines. The one has a single vector between its encoder and its
decoder, which one date fills; the other looks back at the letters, and finds the year, the month and the day of each
date in turn, wherever they stand. Nobody tells it that "22 November 2026" has to be read from its end.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastattn
from benchmarks.lecture.experiment import Experiment
from benchmarks.lecture.training import train
from benchmarks.lecture.written_dates import (
    DIGITS,
    END,
    SOURCE_LETTERS,
    STRIDE,
    TARGET_LETTERS,
    Lines,
    as_numbers,
    draw_lines,
)
from fastattn.models import Seq2Seq

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the experiment: lines of 1 to ``most`` dates, ``steps`` of ``batch`` lines, ``asked`` lines of each length."""

    most: int
    steps: int
    steps_of_two: int
    asked: int
    batch: int = 64
    hidden: int = 96
    attention_dim: int = 32


def learn(size: Size, attention: bool, seed: int, say: Callable[[str], None]) -> Seq2Seq:
    """A network that learned from lines of two dates first, then from shorter and longer ones."""
    stream = random.Random(seed)  # both networks see the same lines
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Seq2Seq(
            len(SOURCE_LETTERS),
            len(TARGET_LETTERS),
            hidden=size.hidden,
            attention_dim=size.attention_dim if attention else None,
        )
    losses: list[float] = []

    def loss(step: int) -> Tensor:
        # Of a single date even a network that could look learns to know it by heart, and then it does not learn to look
        dates = 2 if step < size.steps_of_two else stream.randint(1, size.most)
        lines = draw_lines(stream, size.batch, dates)
        found = model.loss(lines.source, lines.target, lines.source == 0)
        losses.append(found.item())
        return found

    for step in train(model, loss, size.steps, rate=1e-2):
        if step % (size.steps // 5) == 0:
            name = "with attention" if attention else "without"
            say(f"  {name}, step {step}: {sum(losses[-20:]) / 20:.3f} nats a letter")
    return model.eval()


def ask(model: Seq2Seq, lines: Lines) -> dict[str, float]:
    """How much of the held-out ``lines`` it says right, running free: whole lines, dates, single letters."""
    length = lines.target.shape[1] - 1
    said = model.generate(lines.source, length, start=0, end=1, source_padding=lines.source == 0).tokens[:, 1:]
    said = torch.nn.functional.pad(said, (0, length - said.shape[1]), value=1)
    right = said == lines.target[:, 1:]
    return {
        "lines": right.all(1).double().mean().item(),
        "dates": right.unflatten(1, (-1, STRIDE)).all(-1).double().mean().item(),
        "letters": right.double().mean().item(),
    }


@torch.no_grad()
def looked_at(model: Seq2Seq, lines: Lines) -> Tensor:
    """``[3, 3]``: of how many fields that are said (year, month, day) most weight lies on the field in each column.

    Of the same date, that is; weights that lie on another date count for none.
    """
    padding = lines.source == 0
    weights = model(lines.source, lines.target[:, :-1], padding, need_weights=True)[1]
    assert weights is not None
    dates = lines.target.shape[1] // STRIDE
    owner = torch.nn.functional.one_hot(lines.fields + 1, 3 * dates + 1)[..., 1:].to(weights.dtype)  # [N, S, fields]
    found = torch.zeros(3, 3)
    for date in range(dates):
        for said, digits in enumerate(DIGITS):
            rows = weights[:, STRIDE * date + digits.start : STRIDE * date + digits.stop]
            most = (rows @ owner).sum(dim=1).argmax(-1)  # [N]
            for field in range(3):
                found[said, field] += (most == 3 * date + field).double().mean().item() / dates
    return found


# ------------------------------------------------------------------------------------------------------ the experiment

SHOWN = "Sunday 22 November 2026; Sep 7, 1981"
QUICK = Size(most=2, steps=240, steps_of_two=110, asked=128)
FULL = Size(most=4, steps=720, steps_of_two=150, asked=256)


def run(quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    size = QUICK if quick else FULL
    models = {name: learn(size, attention, seed, say) for name, attention in (("without", False), ("with", True))}
    asked = [
        draw_lines(random.Random(f"{seed}, asked: {dates}"), size.asked, dates, held_out=True)
        for dates in range(1, size.most + 1)
    ]
    rows: list[dict[str, Any]] = []
    for dates, lines in enumerate(asked, start=1):
        letters = (lines.source != 0).sum(1).double().mean().item()
        for name, model in models.items():
            right = {f"{what} right": share for what, share in ask(model, lines).items()}
            rows.append({"dates in a line": dates, "letters": letters, "attention": name} | right)
    looked = looked_at(models["with"], asked[-1])
    of_one, without, with_ = (rows[i]["lines right"] for i in (0, -2, -1))
    on_longest = f"lines of {size.most} dates that are right"
    claims = [
        (f"{on_longest}: with attention more than without by", with_ - without, 0.3),
        ("the attention is on the field of the date that is being said", looked.trace().item() / 3, 0.75),
    ]
    if not quick:  # which is too short for one vector to learn even one date well
        claims.append((f"without attention, lines right: of 1 date more than of {size.most} by", of_one - without, 0.3))

    shown = as_numbers([SHOWN], SOURCE_LETTERS)
    said = models["with"].generate(shown, 2 * STRIDE, start=0, end=1, need_weights=True)
    assert said.weights is not None
    return {
        "rows": rows,
        "claims": [
            {"text": text, "value": value, "bound": at_least, "holds": value >= at_least}
            for text, value, at_least in claims
        ],
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "looked at": looked.tolist(),
        "alignment": {
            "read": SHOWN,
            "said": "".join(TARGET_LETTERS[i] for i in said.tokens[0, 1:].tolist()),
            "weights": [[round(weight, 4) for weight in row] for row in said.weights[0].tolist()],
        },
    }


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy against length, and the alignment of one line: where order is turned round, its blocks are too."""
    from matplotlib.figure import Figure

    from benchmarks.reporting.looks import BLUE, RED, WIDTH, title

    figure = Figure(figsize=(WIDTH, 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    above, below = parts[0].subplots(), parts[1]
    for name, colour, marker in (("with", BLUE, "o"), ("without", RED, "s")):
        rows = [row for row in result["rows"] if row["attention"] == name]
        letters, right = ([row[what] for row in rows] for what in ("letters", "lines right"))
        above.plot(letters, right, color=colour, marker=marker, label=f"{name} attention", clip_on=False, zorder=3)
        above.set_xticks(letters, [f"{row['letters']:.0f}\n{row['dates in a line']}" for row in rows])
    above.set(ylim=(0, 1), ylabel="lines all right", xlabel="letters, and dates, in a line")
    above.legend(loc="center right")

    alignment = result["alignment"]
    said = ["end" if letter == END else letter for letter in alignment["said"]]
    fastattn.plot_attention(torch.tensor(alignment["weights"]), tokens=(said, list(alignment["read"])), figure=below)
    below.axes[0].set(ylabel="said", xlabel="read")
    title(figure, "Dates in many forms into 2026-11-22, and where attention looks before each letter")
    return figure


EXPERIMENT = Experiment(
    "dates",
    ("S1", "S2"),
    "One vector cannot hold a long line; attention, which is taught no alignment, translates it and finds the order.",
    run,
    draw,
)
