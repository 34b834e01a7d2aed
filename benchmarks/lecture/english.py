"""Real English that is on every machine which runs this: Python's language reference, docstrings of numpy and torch."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

SOURCES = ("python", "numpy", "torch")
UNKNOWN, PARAGRAPH = "_", "\n"  # a word outside the vocabulary; the end of a paragraph

# What tells a source by one word is hidden: a passage is to be told by what it says.
_NAMES = frozenset({"python", "numpy", "np", "ndarray", "ndarrays", "torch", "pytorch", "tensor", "tensors"})
# Words, numbers, the marks of sentences; what else there is marks up names, and goes.
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:()]")

_MARKUP = re.compile(r":[a-z:]+:(?=`)|\.\. [\w:-]+::|(?<=:):|\.{2,}")  # as in :func:`name`, .. note::, such as this::


def documents(source: str) -> list[str]:
    """The texts of one of :data:`SOURCES`, each once: chapters of the reference, or docstrings of a package."""
    if source == "python":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source == "numpy":
        import numpy

        return _docstrings(numpy, numpy.ndarray, numpy.linalg, numpy.fft, numpy.ma, numpy.random)
    if source != "torch":
        raise ValueError(f"source={source!r}: expected one of {', '.join(map(repr, SOURCES))}")
    nn = torch.nn
    return _docstrings(torch, torch.Tensor, nn, nn.functional, torch.optim, torch.distributions, torch.linalg)


def _docstrings(*owners: ModuleType | type) -> list[str]:
    found: dict[str, None] = {}  # a set that keeps its order
    for owner in owners:
        for name in sorted(vars(owner)):
            text = getattr(getattr(owner, name), "__doc__", None) if not name.startswith("_") else None
            if isinstance(text, str):
                found[inspect.cleandoc(text)] = None
    return list(found)


def paragraphs(text: str) -> list[list[str]]:
    """Of a document those paragraphs that are sentences, no code, tables or lists of names, as words in lower case."""
    found = []
    for paragraph in re.split(r"\n\s*\n", _MARKUP.sub("", text)):
        tokens = _WORD.findall(paragraph.lower())
        characters = "".join(paragraph.split())
        letters = sum(map(str.isalpha, characters))
        if len(tokens) >= 10 and letters >= 0.8 * len(characters) and ">>>" not in paragraph:
            found.append([UNKNOWN if token in _NAMES else token for token in tokens])
    return found


class Vocabulary:
    """The commonest words of some paragraphs, numbered; 0 is :data:`UNKNOWN`, 1 is :data:`PARAGRAPH`.

    Args:
        text: paragraphs of words.
        size: number of words, these two included.
    """

    def __init__(self, text: Iterable[list[str]], size: int) -> None:
        counts = Counter(word for paragraph in text for word in paragraph if word != UNKNOWN)
        common = sorted(counts, key=lambda word: (-counts[word], word))
        self.words = [UNKNOWN, PARAGRAPH, *common[: size - 2]]
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: Iterable[list[str]]) -> Tensor:
        """Integers ``[words]``: the paragraphs one after the other, :data:`PARAGRAPH` behind each."""
        numbers = [self._numbers.get(word, 0) for paragraph in text for word in (*paragraph, PARAGRAPH)]
        return torch.tensor(numbers, dtype=torch.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """As a person would write it: no blanks in front of commas, nor inside brackets."""
        text = " ".join(self.words[token] for token in tokens)
        return re.sub(r" ([.,;:)])", r"\1", text.replace("( ", "(")).strip()
