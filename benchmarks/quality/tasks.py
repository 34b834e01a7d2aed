"""Three tasks, drawn from a seed, of which each way of processing sequences finds another one easy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target where nothing is asked: cross entropy's own index for it


@dataclass(frozen=True)
class Task:
    """Tokens in; at each position a class out, or nothing asked.

    ``draw(generator, size)`` gives tokens and targets, both int64 ``[size, seqlen]``; a target is a class or
    :data:`IGNORED`. ``steps``, of ``batch`` fresh sequences each, is what every model may take alike.
    """

    name: str
    vocabulary: int
    classes: int
    seqlen: int
    batch: int
    steps: int
    quick_steps: int
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]

    @property
    def chance(self) -> float:
        """The accuracy of a guess that reads nothing."""
        return 1 / self.classes


def _orders(generator: torch.Generator, size: int, count: int) -> Tensor:
    """``[size, count]``: permutations of ``0 .. count - 1``."""
    return torch.rand(size, count, generator=generator).argsort(1)


def recall(pairs: int = 8, keys: int = 32, values: int = 32) -> Task:
    """``k1 v1 .. kn vn``, then the keys again, shuffled: answer each with its value (arXiv:2312.04927).

    Tokens below ``keys`` are keys, those from there on values. The keys of a sequence differ, the values need not.
    Who remembers the values but not whose they are gets more than :attr:`Task.chance`: ``1 / pairs`` and a little.
    """

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        key = _orders(generator, size, keys)[:, :pairs]
        value = torch.randint(values, (size, pairs), generator=generator)
        asked = _orders(generator, size, pairs)
        shown = torch.stack((key, keys + value), dim=2).flatten(1)
        tokens = torch.cat((shown, key.gather(1, asked)), dim=1)
        targets = torch.cat((torch.full_like(shown, IGNORED), value.gather(1, asked)), dim=1)
        return tokens, targets

    return Task(f"recall {pairs} pairs", keys + values, values, 3 * pairs, 64, 2000, 200, draw)


def copy(length: int = 40, symbols: int = 8) -> Task:
    """``length`` symbols, a delimiter, blanks: from the delimiter on, say the symbols again.

    The delimiter is token ``symbols``, a blank the one after it. Blanks are fed instead of the answers so far, so that
    nobody is told what should have been said.
    """

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        symbol = torch.randint(symbols, (size, length), generator=generator)
        rest = torch.full_like(symbol, symbols + 1)
        rest[:, 0] = symbols
        return torch.cat((symbol, rest), dim=1), torch.cat((torch.full_like(symbol, IGNORED), symbol), dim=1)

    return Task(f"copy {length} tokens", symbols + 2, symbols, 2 * length, 32, 2000, 150, draw)


def parity(length: int = 32) -> Task:
    """Bits; at each, is the number of ones so far odd?

    A machine of two states, which is to say a recurrence; parallel layers have to build it anew for every length. So
    recurrences solve it in 50 to 75 steps, and the TCN, whose layers can pair the bits up in a tree, in 1000. Asked at
    each bit and not at the last alone: so short ones, which anybody learns, show the way.
    """

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (size, length), generator=generator)
        return bits, bits.cumsum(1) % 2

    return Task(f"parity {length} bits", 2, 2, length, 64, 2000, 100, draw)


def tasks() -> tuple[Task, ...]:
    """One for attention, one for attention and convolution of full reach, one that recurrence learns first."""
    return recall(), copy(), parity()
