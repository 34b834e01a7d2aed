"""Examples as masks and biases that are made whole: what is written where there is no word and no function for them.

They are written in another way than the functions, which are held to them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Words = dict[str, Any]


def _indices(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """``[L, 1]`` and ``[S]``."""
    return torch.arange(query.shape[2], device=key.device)[:, None], torch.arange(key.shape[2], device=key.device)


def _band(query: Tensor, key: Tensor, window: int) -> Tensor:
    every = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    return every.triu(-window).tril(window)


def with_globals(query: Tensor, key: Tensor, window: int, is_global: Tensor) -> Words:
    mask = _band(query, key, window).expand(len(is_global), 1, -1, -1).clone()
    for entry, row in enumerate(is_global):
        mask[entry, :, row] = True
        mask[entry, :, :, row] = True
    return {"attn_mask": mask}


def window_mask(query: Tensor, key: Tensor, window: int, dilation: int) -> Words:
    comb = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    for start in range(dilation):
        comb[start::dilation, start::dilation] = True
    return {"attn_mask": comb & _band(query, key, window * dilation)}


def draft_mask(query: Tensor, key: Tensor, parents: Tensor, context_lengths: Tensor, depth: int) -> Words:
    drafts = query.shape[2]
    mask = torch.zeros(len(parents), 1, drafts, key.shape[2], dtype=torch.bool)
    for entry, (row, context) in enumerate(zip(parents.tolist(), context_lengths.tolist())):
        mask[entry, :, :, :context] = True
        for draft in range(drafts):
            ancestor = draft
            while not mask[entry, 0, draft, context + ancestor]:
                mask[entry, 0, draft, context + ancestor] = True
                ancestor = row[ancestor]
    return {"attn_mask": mask.to(key.device)}


def bucket_bias(query: Tensor, key: Tensor, table: Tensor, longest: int = 128) -> Words:
    """Each bucket begins at a distance, and buckets are counted."""
    half = len(table) // 2
    exact = half // 2
    growth = longest / exact
    begins = [*range(1, exact + 1), *(exact * growth ** (step / (half - exact)) for step in range(1, half - exact))]
    row, column = _indices(query, key)
    distance = (row - column).abs()[..., None]
    # A begin that is a whole number may come out a little above it
    buckets = (distance >= torch.tensor(begins, dtype=torch.float64, device=key.device) - 1e-6).sum(-1)
    return {"attn_mask": table[buckets + half * (column > row)].permute(2, 0, 1)}


def image_bias(query: Tensor, key: Tensor, table: Tensor) -> Words:
    height, width = ((size + 1) // 2 for size in table.shape[1:])
    pixels = torch.cartesian_prod(*(torch.arange(size, device=key.device) for size in (height, width)))
    down, right = (pixels[:, None] - pixels).unbind(-1)
    return {"attn_mask": table[:, down + height - 1, right + width - 1]}


def noise_bias(query: Tensor, key: Tensor, scale: Tensor, seed: Tensor) -> Words:
    prime, cubes = _cubes(key.device)
    row, column = _indices(query, key)
    state = cubes[(cubes[(row + seed) % prime] + column) % prime]
    (batch, heads), device = query.shape[:2], key.device
    entries = 4099 * torch.arange(batch, device=device)[:, None] + torch.arange(heads, device=device)
    state = cubes[(state + entries[..., None, None]) % prime]
    return {"attn_mask": scale * ((state.double() / prime - 0.5) * 12**0.5).to(scale.dtype)}


@functools.lru_cache(maxsize=2)
def _cubes(device: torch.device) -> tuple[int, Tensor]:
    prime = 32717
    return prime, torch.tensor([pow(number, 3, prime) for number in range(prime)], device=device)
