"""What becomes of a score, by a function: each of these makes a ``score_mod``.

Floating tensors that it captures are learned. Plain code to copy; docs/cookbook.md shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def t5_bias(table: Tensor, longest: int = 128) -> Callable[..., Tensor]:
    """A learned bias for each bucket of distances, one distance wide near the query and ever wider away from it.

    ``table`` is ``[buckets, H]``; one half of the buckets is for the keys behind a query (arXiv:1910.10683).
    """
    half = table.shape[0] // 2
    exact = half // 2
    wider = (half - exact) / math.log(longest / exact)

    def score_mod(score, batch, head, query_index, key_index):
        distance = torch.abs(key_index - query_index)
        # A thousandth more keeps the rounding of the logarithm from deciding where a bucket begins.
        far = exact + wider * torch.log((distance + 1e-3) / exact)
        bucket = torch.where(distance < exact, distance, torch.clamp(far, max=half - 1).to(torch.int32))
        return score + table[torch.where(key_index > query_index, bucket + half, bucket), head]

    return score_mod


def pair_bias(bias: Tensor) -> Callable[..., Tensor]:
    """A learned bias for each head and pair, the same for all rows of an alignment (doi:10.1038/s41586-021-03819-2).

    ``bias`` is ``[H, L, S]``. The gate of AlphaFold's attention is applied to the output, and is none of this.
    """

    def score_mod(score, batch, head, query_index, key_index):
        return score + bias[head, query_index, key_index]

    return score_mod


def alibi(slopes: Tensor) -> Callable[..., Tensor]:
    """A penalty for distance with a slope for each head, which may be learned (arXiv:2108.12409).

    ``slopes`` is ``[H]``.
    """

    def score_mod(score, batch, head, query_index, key_index):
        return score - slopes[head] * torch.abs(query_index - key_index)

    return score_mod


def swin_bias(table: Tensor) -> Callable[..., Tensor]:
    """A learned bias for each difference of rows and of columns between two pixels of an image (arXiv:2103.14030).

    ``table`` is ``[H, 2 * height - 1, 2 * width - 1]``; pixels are numbered row by row.
    """
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2

    def score_mod(score, batch, head, query_index, key_index):
        down = query_index // width - key_index // width
        right = query_index % width - key_index % width
        return score + table[head, down + height - 1, right + width - 1]

    return score_mod


def softcap(cap: float) -> Callable[..., Tensor]:
    """No score beyond ``cap``, to either side, by a smooth function (arXiv:2408.00118)."""

    def score_mod(score, batch, head, query_index, key_index):
        return cap * torch.tanh(score / cap)

    return score_mod


def head_scale(overall: Tensor, per_head: Tensor) -> Callable[..., Tensor]:
    """A learned temperature for each head, and one for all of them (arXiv:2111.09883).

    ``overall`` is a tensor without axes, ``per_head`` is ``[H]``.
    """

    def score_mod(score, batch, head, query_index, key_index):
        return score * (overall * per_head[head])

    return score_mod


def logit_noise(scale: Tensor, seed: Tensor) -> Callable[..., Tensor]:
    """Noise of unit variance times a learned scale, without a generator: a hash of the indices (arXiv:1706.10295).

    ``scale`` and ``seed``, a positive integer, are tensors without axes, so that another seed compiles nothing.
    """
    prime = 32717  # no two numbers below it have the same cube, and their squares fit into 31 bits

    def mixed(number):
        number = number % prime
        return number * number % prime * number % prime

    def score_mod(score, batch, head, query_index, key_index):
        state = mixed(4099 * batch + head + mixed(key_index + mixed(query_index + seed)))
        return score + scale * math.sqrt(12) * (state / prime - 0.5)

    return score_mod
