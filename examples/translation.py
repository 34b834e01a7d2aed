"""A network learns a small, made-up part of French and, without being told, which word comes from which.

Sentences of a small grammar ("the black cat sees a red house") are drawn with their translation ("le chat noir voit une
maison rouge"): adjectives stand behind their noun, and articles follow the gender of a noun that is yet to come. Each
word is read alone, as a vector of what it is and where it stands; an RNN writes, and looks back at them by additive
attention before each word (``fastattn.models.AttentionDecoder``, arXiv:1409.0473). Expect nearly all sentences that it
never read to be translated rightly, and an alignment whose lines cross where adjective and noun change places. An
article looks at two words, since it depends on both "the" and "cat".

    python examples/translation.py --quick
    python examples/translation.py --out alignment.png    # a quarter of a minute
"""

from __future__ import annotations

import argparse
import random
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastattn
from fastattn.models import AttentionDecoder, Memory

NOUNS = {
    "cat": "chat m", "dog": "chien m", "book": "livre m", "tree": "sapin m", "house": "maison f", "car": "voiture f",
    "table": "table f", "flower": "fleur f",
}  # fmt: skip
ADJECTIVES = {"black": "noir noire", "green": "vert verte", "red": "rouge rouge", "white": "blanc blanche"}
VERBS = {"sees": "voit", "finds": "trouve", "likes": "aime", "hides": "cache"}
ARTICLES = {"the": "le la", "a": "un une"}
WITH = ("with", "avec")
START, END, PADDING = "(start)", "(end)", "(padding)"

# Of each word that is said, the number of the word that it comes from
Pair = tuple[list[str], list[str], list[int]]


def noun_phrase(stream: random.Random) -> Pair:
    """An article, in half of the cases an adjective, and a noun."""
    article, adjective, noun = (stream.choice([*words]) for words in (ARTICLES, ADJECTIVES, NOUNS))
    french, gender = NOUNS[noun].split()
    of_gender = "mf".index(gender)
    said_article, said_adjective = ARTICLES[article].split()[of_gender], ADJECTIVES[adjective].split()[of_gender]
    if stream.random() < 0.5:
        return [article, noun], [said_article, french], [0, 1]
    return [article, adjective, noun], [said_article, french, said_adjective], [0, 2, 1]


def sentence(stream: random.Random) -> Pair:
    """Who does what, sometimes with whom."""
    verb = stream.choice([*VERBS])
    parts = [noun_phrase(stream), ([verb], [VERBS[verb]], [0]), noun_phrase(stream)]
    if stream.random() < 0.5:
        parts += [([WITH[0]], [WITH[1]], [0]), noun_phrase(stream)]
    english, french, origins = [], [], []
    for read, said, of_part in parts:
        origins += [len(english) + origin for origin in of_part]
        english += read
        french += said
    return english, french, origins


def draw(stream: random.Random, count: int, held_out: bool) -> list[Pair]:
    """Sentences of which every fifth that there is, chosen by a hash, is never learned from."""
    found: list[Pair] = []
    while len(found) < count:
        pair = sentence(stream)
        if (zlib.crc32(" ".join(pair[0]).encode()) % 5 == 0) == held_out:
            found.append(pair)
    return found


SOURCE = [PADDING, WITH[0], *NOUNS, *ADJECTIVES, *VERBS, *ARTICLES]
_SAID = [WITH[1], *VERBS.values(), *ADJECTIVES.values(), *ARTICLES.values(), *(n[:-2] for n in NOUNS.values())]
TARGET = [END, START, *dict.fromkeys(" ".join(_SAID).split())]


def tensors(pairs: list[Pair]) -> tuple[Tensor, ...]:
    """Sources ``[N, S]``, padded, and targets ``[N, T]`` from START on, filled up with END; both fillings are 0."""
    lines = [english for english, _, _ in pairs], [[START, *french, END] for _, french, _ in pairs]
    numbers = ([torch.tensor([*map(of.index, line)]) for line in part] for part, of in zip(lines, (SOURCE, TARGET)))
    return tuple(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in numbers)


class Translator(nn.Module):
    """Vectors of words and of their places, and a decoder that looks at them."""

    def __init__(self, width: int = 64, longest: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(len(SOURCE), width)
        self.positions = fastattn.LearnedPositionalEncoding(longest, width, std=0.5)
        self.decoder = AttentionDecoder(len(TARGET), width, hidden=64, attention_dim=32)

    def read(self, source: Tensor) -> Memory:
        """What the decoder looks at, of sentences ``[N, S]``."""
        vectors, padding = self.positions(self.words(source)), source == 0
        kept = ~padding[..., None]
        return Memory(vectors, (vectors * kept).sum(1) / kept.sum(1), padding)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, ask and draw; returns the shares of sentences that are right and of words that are aligned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--out", metavar="FILE", help="write the picture of an alignment there")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    stream = random.Random(0)

    model = Translator()
    steps = 180 if options.quick else 600
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(1, steps + 1):
        source, target = tensors(draw(stream, 64, held_out=False))
        loss = model.decoder.loss(target, model.read(source))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 5) == 0:
            print(f"step {step}: {loss.item():.3f} nats a word")

    asked = draw(stream, 300, held_out=True)
    source, target = tensors(asked)
    with torch.no_grad():
        memory = model.read(source)
        weights = model.decoder(target[:, :-1], memory, need_weights=True)[1]
    said = model.decoder.generate(memory, target.shape[1] - 1, start=1, end=0).tokens
    said = torch.nn.functional.pad(said, (0, target.shape[1] - said.shape[1]))
    right = (said == target).all(1).double().mean().item()
    assert weights is not None
    looked = [
        row[i] == origin
        for row, (english, _, origins) in zip(weights.argmax(-1).tolist(), asked)
        for i, origin in enumerate(origins)
        if english[origin] not in ARTICLES
    ]
    aligned = sum(looked) / len(looked)
    print(f"{right:.1%} of {len(asked)} sentences that it has not seen are translated rightly")
    print(f"{aligned:.1%} of their words, articles aside, look most at the word that they come from")
    for (english, _, _), tokens in zip(asked[:4], said.tolist()):
        print(f"  {' '.join(english)}  ->  {' '.join(TARGET[i] for i in tokens if i > 1)}")
    if options.out:
        i = max(range(len(asked)), key=lambda i: len(asked[i][0]))
        english, french, _ = asked[i]
        shown, title = weights[i, : len(french), : len(english)], "Where each word looks before it is said"
        figure = fastattn.plot_attention(shown, tokens=(french, english), title=title)
        figure.axes[0].set(xlabel="read", ylabel="said")
        figure.savefig(options.out)
        print(f"written: {options.out}")
    return {"right": right, "aligned": aligned}


if __name__ == "__main__":
    main()
