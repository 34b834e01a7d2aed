"""S10: a language model that learned English from unlabelled text needs few labels; one that did not, many.

A causal transformer reads documentation of three sources, word by word, and learns to say the next one. Its trunk then
learns to tell which source a passage is from, of a few labelled passages a source. The same trunk without that past
learns it from the same passages, in as many steps. Nothing that is asked was read before: documents are held out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lecture.english import SOURCES, Vocabulary, documents, paragraphs
from benchmarks.lecture.experiment import Experiment
from benchmarks.lecture.training import train
from fastattn.models.transformer import (
    TransformerClassifier,
    TransformerConfig,
    TransformerLanguageModel,
    TransformerTrunk,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY = 2000
CONTEXT = 32  # words that the language model learns from at once
PASSAGE = 32  # words of which the source is asked
RUN = 8  # words that are a quotation
SAID = 40  # words of the continuation that is shown
CONFIG = TransformerConfig(width=64, heads=4, layers=2, max_length=SAID + 8)  # post-norm, as the lecture draws it
PROMPT = ["returns", "the"]
FINE_TUNED, SCRATCH = "fine-tuned", "from scratch"


class Corpus(NamedTuple):
    """Words as numbers, of each source those that are learned from and those that are held out."""

    vocabulary: Vocabulary
    train: dict[str, Tensor]
    held_out: dict[str, Tensor]


def corpus() -> Corpus:
    """Every fifth document of each source is held out; the vocabulary is that of the others.

    Documents quote each other, so a paragraph counts only if it shares no run of words with those met before it.
    """
    train: dict[str, list[list[str]]] = {source: [] for source in SOURCES}
    held_out: dict[str, list[list[str]]] = {source: [] for source in SOURCES}
    met: set[tuple[str, ...]] = set()
    for source in SOURCES:
        for i, document in enumerate(documents(source)):
            for paragraph in paragraphs(document):
                runs = set(_runs(paragraph))
                if met.isdisjoint(runs):
                    (train if i % 5 else held_out)[source].append(paragraph)
                met |= runs
    vocabulary = Vocabulary((paragraph for text in train.values() for paragraph in text), VOCABULARY)
    return Corpus(
        vocabulary,
        {source: vocabulary.encode(text) for source, text in train.items()},
        {source: vocabulary.encode(text) for source, text in held_out.items()},
    )


def _runs(paragraph: list[str]) -> Iterator[tuple[str, ...]]:
    """All that follow each other in it, ``RUN`` words at a time."""
    return zip(*(paragraph[i:] for i in range(RUN)))


def passages(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` passages ``[count, length]`` from all over ``text`` ``[words]``."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def labelled(texts: dict[str, Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` passages of each source, ``[count * sources, PASSAGE]``, and the numbers of their sources."""
    drawn = [passages(texts[source], PASSAGE, count, generator) for source in SOURCES]
    return torch.cat(drawn), torch.arange(len(SOURCES)).repeat_interleave(count)


def new_model(vocabulary: int, seed: int) -> TransformerLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformerLanguageModel(vocabulary, CONFIG)


def pretrain(
    data: Corpus, steps: int, seed: int, say: Callable[[str], None]
) -> tuple[TransformerLanguageModel, list[dict[str, float]]]:
    """A language model after ``steps`` steps of 16 passages, and its losses on the way, in nats a word."""
    generator = torch.Generator().manual_seed(seed)
    model = new_model(len(data.vocabulary), seed)
    text = torch.cat([data.train[source] for source in SOURCES])
    unseen = torch.cat([passages(data.held_out[source], CONTEXT, 100, generator) for source in SOURCES])
    curve: list[dict[str, float]] = []

    def look(step: int) -> None:
        with torch.no_grad():
            curve.append({"step": step, "loss": model.loss(unseen).item()})
        say(f"step {step}: {curve[-1]['loss']:.2f} nats a held-out word")

    look(0)
    for step in train(model, lambda step: model.loss(passages(text, CONTEXT, 16, generator)), steps, rate=3e-3):
        if step % max(1, steps // 10) == 0:
            look(step)
    return model, curve


def classify(
    trunk: TransformerTrunk, learned: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], steps: int, seed: int
) -> float:
    """Accuracy on the passages ``asked`` once ``trunk``, and a new linear layer, have learned those ``learned``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TransformerClassifier(trunk, len(SOURCES))
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = learned

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(tokens), (24,), generator=generator)
        return F.cross_entropy(model(tokens[chosen]), targets[chosen])

    for _ in train(model, loss, steps, rate=2e-3):
        pass
    with torch.no_grad():
        return (model(asked[0]).argmax(-1) == asked[1]).double().mean().item()


def compare(data: Corpus, pretrained: TransformerTrunk, labels: int, draws: int, seed: int) -> dict[str, Any]:
    """Accuracies with ``labels`` passages a source, on average over ``draws`` choices of them."""
    asked = labelled(data.held_out, 300, torch.Generator().manual_seed(seed))
    found: dict[str, list[float]] = {FINE_TUNED: [], SCRATCH: []}
    for draw in range(draws):
        own = 1 + draw + draws * seed
        learned = labelled(data.train, labels, torch.Generator().manual_seed(own))
        trunks = copy.deepcopy(pretrained), new_model(len(data.vocabulary), own).trunk
        for name, trunk in zip(found, trunks):
            found[name].append(classify(trunk, learned, asked, 40, own))
    return {"labels a source": labels} | {name: sum(values) / draws for name, values in found.items()}


def word_frequencies(data: Corpus) -> float:
    """Nats a held-out word for who knows how common each word is, and nothing of what comes before it."""
    counts = torch.bincount(torch.cat(list(data.train.values())), minlength=len(data.vocabulary)).double() + 1
    logs = (counts / counts.sum()).log()
    return -torch.stack([logs[data.held_out[source]].mean() for source in SOURCES]).mean().item()


def run(quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Pretrain once, then learn the sources with and without, by more and more labels."""
    data = corpus()
    model, curve = pretrain(data, 900 if quick else 2000, seed, say)
    prompt = data.vocabulary.encode([PROMPT])[None, :-1]
    said = model.generate(prompt, SAID, temperature=0.5, seed=seed)[0].tolist()
    continuation = data.vocabulary.decode(said)
    say(f"it says: {continuation!r}")
    rows = []
    for labels in (8, 32) if quick else (4, 16, 64):
        rows.append(compare(data, model.trunk, labels, 2 if quick else 4, seed))
        say(", ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()))
    frequencies = word_frequencies(data)
    learned, least = frequencies - curve[-1]["loss"], 0.7 if quick else 1.0
    ahead = sum(row[FINE_TUNED] - row[SCRATCH] for row in rows) / len(rows)
    bound = 0.03 if quick else 0.1
    claims: list[dict[str, Any]] = [
        {"text": "nats a held-out word, below what word frequencies give by", "value": learned, "bound": least},
        {"text": "accuracy fine-tuned, above that from scratch by", "value": ahead, "bound": bound},
    ]
    if not quick:
        fewer = rows[1][FINE_TUNED] - rows[2][SCRATCH]
        text = "accuracy fine-tuned by 16 labels, above that from scratch by 64 by"
        claims.append({"text": text, "value": fewer, "bound": 0.05})
    claims = [claim | {"holds": claim["value"] >= claim["bound"]} for claim in claims]
    return {"rows": rows, "claims": claims, "curve": curve, "frequencies": frequencies, "continuation": continuation}


def draw(result: dict[str, Any]) -> Figure:
    """Left, how the language model learned; right, what that is worth; below, what it says."""
    import textwrap

    from matplotlib.figure import Figure

    from benchmarks.reporting.looks import BLUE, GREY, ORANGE, WIDTH, title

    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    title(figure, "First to say the next word, without labels; then to tell sources apart, by a few")
    left, right = figure.subplots(1, 2)
    curve, rows = result["curve"], result["rows"]
    left.plot([p["step"] for p in curve], [p["loss"] for p in curve], "o-", color=BLUE, label="language model")
    left.axhline(result["frequencies"], color=GREY, linestyle="--", label="word frequencies alone")
    left.set(xlabel="step of pretraining", ylabel="nats a held-out word")
    left.legend()
    labels = [row["labels a source"] for row in rows]
    for name, colour, marker in ((FINE_TUNED, BLUE, "o"), (SCRATCH, ORANGE, "s")):
        right.plot(labels, [row[name] for row in rows], color=colour, marker=marker, label=name)
    right.axhline(1 / len(SOURCES), color=GREY, linestyle="--", label="guessing")
    right.set_xscale("log", base=2)
    right.set_xticks(labels, map(str, labels))
    right.set(xlabel="labelled passages a source", ylabel="sources told rightly", ylim=(0.25, 0.85))
    right.legend(loc="upper left")
    said = textwrap.fill(" ".join(result["continuation"].split()), 110)
    figure.supxlabel(f"What it says, from “{' '.join(PROMPT)}” on:\n{said}", fontsize=8.5, x=0.01, ha="left")
    return figure


EXPERIMENT = Experiment(
    name="language",
    systems=("S10",),
    claim="A transformer that was pretrained on text needs fewer labels than one that starts from nothing.",
    run=run,
    draw=draw,
)
