"""Functions of scores and masks by name, and the tensors that they capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.testing import random_tensor


class Sizes(NamedTuple):
    """Of a call: no multiple of anything."""

    batch: int = 2
    heads: int = 2
    rows: int = 37
    keys: int = 45


class FunctionCase(NamedTuple):
    """A function that captures tensors.

    Attributes:
        bind: makes the function of the tensors.
        draw: makes the tensors for a call's sizes; floating ones, float32, have gradients.
    """

    bind: Callable[..., Callable[..., Any]]
    draw: Callable[[Sizes], tuple[Tensor, ...]] = lambda sizes: ()


def documents_of(batch: int, length: int, longest: int = 16) -> Tensor:
    """Int32 ``[B, length]``: documents of ``longest`` tokens, the first of which is shorter, by the batch entry."""
    return ((torch.arange(length) + 5 * torch.arange(batch)[:, None]) // longest).int()


# -------------------------------------------------------------------------------------------------------------- scores


def table_of_differences(table: Tensor) -> Callable[..., Tensor]:
    """T5's: a learned number for each difference, of which the large ones share one, and each head."""

    def score_mod(score, batch, head, query_index, key_index):
        bucket = torch.clamp(key_index - query_index + 6, min=0, max=12)
        return score + table[bucket, head]

    return score_mod


def alibi(slopes: Tensor) -> Callable[..., Tensor]:
    """ALiBi with slopes that are learned by their logarithm."""

    def score_mod(score, batch, head, query_index, key_index):
        return score - slopes.exp()[head] * (query_index - key_index).abs()

    return score_mod


def pair_bias(pairs: Tensor, scale: Tensor) -> Callable[..., Tensor]:
    def score_mod(score, batch, head, query_index, key_index):
        return score * scale + pairs[batch, head, query_index, key_index]

    return score_mod


def table_of_documents(table: Tensor, documents: Tensor) -> Callable[..., Tensor]:
    def score_mod(score, batch, head, query_index, key_index):
        found = table[documents[batch, query_index], documents[batch, key_index]]
        return torch.tanh(score * 0.5 + found)

    return score_mod


def hidden_by_infinity(per_head: Tensor) -> Callable[..., Tensor]:
    """Hides pairs by their score, and every key of row 3."""

    def score_mod(score, batch, head, query_index, key_index):
        hidden = ((query_index * 7 + key_index * 3) % 5 == 0) | (query_index == 3)
        return torch.where(hidden, float("-inf"), score * per_head[head])

    return score_mod


def arithmetic_of_scores(per_batch: Tensor) -> Callable[..., Tensor]:
    def score_mod(score, batch, head, query_index, key_index):
        magnitude = score.abs()
        wave = torch.add(torch.sin(score), magnitude, alpha=0.5) + torch.cos(per_batch[batch] * 0.1 * key_index)
        curve = torch.log1p(magnitude) - 0.3 * torch.expm1(-magnitude) + torch.sigmoid(score) * torch.erf(score)
        power = torch.pow(magnitude + 1.0, 0.7) + 2**score + (score * 0.2) ** 3 + torch.rsqrt(1.0 + score * score)
        bounded = torch.minimum(F.softplus(score), score.clamp(-0.5, 1.5)) + torch.maximum(score, -wave)
        return 0.3 * wave + 0.2 * curve + 0.1 * power + 0.4 * bounded

    return score_mod


def arithmetic_of_indices(per_place: Tensor) -> Callable[..., Tensor]:
    """Quotients and remainders, of negative numbers too, and what rounds."""

    def score_mod(score, batch, head, query_index, key_index):
        difference = query_index - key_index
        place = (difference // 4 + difference % 3) % 7
        rounded = torch.round(difference * 0.5) + torch.trunc(difference * 0.3) - torch.floor(difference * 0.7)
        sign = torch.sign(difference) * (difference & 1) + (key_index ^ 5) % 4 - (query_index << 1) % 3
        towards_zero = torch.div(difference, -3, rounding_mode="trunc") + torch.fmod(difference, -2)
        return score + 0.01 * rounded * per_place[place] + 0.05 * (sign + towards_zero)

    return score_mod


def of_places_alone(per_head: Tensor) -> Callable[..., Tensor]:
    """Ignores the score."""

    def score_mod(score, batch, head, query_index, key_index):
        return per_head[head] * (key_index - 0.5 * query_index) * 0.02

    return score_mod


def nothing_captured() -> Callable[..., Tensor]:
    def score_mod(score, batch, head, query_index, key_index):
        return torch.where(key_index > query_index, 0.5 * score, score + 0.1 * batch)

    return score_mod


def wrapping(table: Tensor) -> Callable[..., Tensor]:
    """Negative indices count from the end."""

    def score_mod(score, batch, head, query_index, key_index):
        return score + table[-1 - head, (key_index - query_index) % 8 - 8] * table[0, -1]

    return score_mod


def numbers(*shape: int, seed: int) -> Tensor:
    return 0.5 * random_tensor(*shape, seed=seed)


SCORES: dict[str, FunctionCase] = {
    "table_of_differences": FunctionCase(table_of_differences, lambda n: (numbers(n.heads, 13, seed=1).T,)),
    "alibi": FunctionCase(alibi, lambda n: (numbers(n.heads, seed=2) - 2,)),
    "pair_bias": FunctionCase(
        pair_bias,
        lambda n: (
            numbers(n.batch, n.rows, n.heads, n.keys + 3, seed=3).transpose(1, 2)[..., 3:], numbers(1, seed=4)[0] + 1,
        ),
    ),
    "table_of_documents": FunctionCase(
        table_of_documents, lambda n: (numbers(4, 4, seed=5), documents_of(n.batch, max(n.rows, n.keys)))
    ),
    "hidden_by_infinity": FunctionCase(hidden_by_infinity, lambda n: (numbers(2 * n.heads, seed=6)[::2],)),
    "arithmetic_of_scores": FunctionCase(arithmetic_of_scores, lambda n: (numbers(n.batch, seed=7),)),
    "arithmetic_of_indices": FunctionCase(arithmetic_of_indices, lambda n: (numbers(7, seed=8),)),
    "of_places_alone": FunctionCase(of_places_alone, lambda n: (numbers(n.heads, seed=9),)),
    "nothing_captured": FunctionCase(nothing_captured),
    "wrapping": FunctionCase(wrapping, lambda n: (numbers(n.heads, 8, seed=10),)),
}  # fmt: skip

# Tables that are addressed by each of the indices, and by what is computed of them.
ADDRESSED: dict[str, FunctionCase] = {
    "by nothing": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[1, 0], lambda n: (numbers(2, 1, seed=1),)),
    "by batch": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[b], lambda n: (numbers(n.batch, seed=1),)),
    "by head": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[0, h], lambda n: (numbers(1, n.heads, seed=1),)),
    "by query": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[q], lambda n: (numbers(n.rows, seed=1),)),
    "by key": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[k], lambda n: (numbers(n.keys, seed=1),)),
    "by batch and key": FunctionCase(
        lambda x: lambda s, b, h, q, k: s + x[b, k // 2], lambda n: (numbers(n.batch, n.keys, seed=1),)
    ),
    "by difference": FunctionCase(
        lambda x: lambda s, b, h, q, k: s * x[q - k], lambda n: (numbers(n.rows + n.keys, seed=1),)
    ),
    "by difference of key and query": FunctionCase(
        lambda x: lambda s, b, h, q, k: s + x[(k - q).abs() // 3, h], lambda n: (numbers(n.keys, n.heads, seed=1),)
    ),
    "by both differences": FunctionCase(
        lambda x: lambda s, b, h, q, k: s * x[b, 2 * (k - q).clamp(0, 3), (q - k).clamp(0, 5)],
        lambda n: (numbers(n.batch, 7, 6, seed=1),),
    ),
    "by difference and key": FunctionCase(
        lambda x: lambda s, b, h, q, k: s * x[(q - k) % 5, k], lambda n: (numbers(5, n.keys, seed=1),)
    ),
    "by sum": FunctionCase(lambda x: lambda s, b, h, q, k: s * x[q + k], lambda n: (numbers(n.rows + n.keys, seed=1),)),
    "by documents": FunctionCase(
        lambda x, ids: lambda s, b, h, q, k: s * x[h, ids[b, q] - ids[b, k]],
        lambda n: (numbers(n.heads, 9, seed=1), documents_of(n.batch, max(n.rows, n.keys), 7)),
    ),
    "at several places": FunctionCase(
        lambda x, y: lambda s, b, h, q, k: s * x[h] + x[b] * y[q % 3] - x[(q - k) % 2] * y[k % 3] * y[q % 3] * x[0],
        lambda n: (numbers(2, seed=1), numbers(3, seed=2)),
    ),
}

# --------------------------------------------------------------------------------------------------------------- masks


def causal() -> Callable[..., Tensor]:
    return lambda batch, head, query_index, key_index: query_index >= key_index


def documents_or_first(documents: Tensor) -> Callable[..., Tensor]:
    def mask_mod(batch, head, query_index, key_index):
        return (documents[batch, query_index] == documents[batch, key_index]) | (key_index == 0)

    return mask_mod


def of_head_and_batch(reach: Tensor) -> Callable[..., Tensor]:
    def mask_mod(batch, head, query_index, key_index):
        return (query_index - key_index).abs() <= reach[batch, head]

    return mask_mod


def rows_without_keys() -> Callable[..., Tensor]:
    """Rows 5 to 8 see nothing, and nobody sees key 7 or a key from 40 on."""

    def mask_mod(batch, head, query_index, key_index):
        row_sees = (query_index < 5) | (query_index > 8)
        return row_sees & (key_index != 7) & (key_index < 40)

    return mask_mod


def prefix_by_batch(lengths: Tensor) -> Callable[..., Tensor]:
    def mask_mod(batch, head, query_index, key_index):
        return (key_index <= query_index) | (key_index < lengths[batch])

    return mask_mod


def flags_of_keys(flags: Tensor) -> Callable[..., Tensor]:
    return lambda batch, head, query_index, key_index: ~flags[key_index] & ((query_index ^ key_index) % 3 != 0)


MASKS: dict[str, FunctionCase] = {
    "causal": FunctionCase(causal),
    "documents_or_first": FunctionCase(
        documents_or_first, lambda n: (documents_of(n.batch, max(n.rows, n.keys)),)
    ),
    "of_head_and_batch": FunctionCase(
        of_head_and_batch, lambda n: (torch.arange(n.batch * n.heads).view(n.heads, n.batch).T * 4,)
    ),
    "rows_without_keys": FunctionCase(rows_without_keys),
    "prefix_by_batch": FunctionCase(prefix_by_batch, lambda n: (torch.arange(n.batch, dtype=torch.int64) * 9 + 3,)),
    "flags_of_keys": FunctionCase(flags_of_keys, lambda n: (torch.arange(n.keys) % 6 == 2,)),
}  # fmt: skip
