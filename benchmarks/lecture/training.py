"""Training for a given number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def train(model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float) -> Iterator[int]:
    """Steps of AdamW on ``loss(step)``; after each its number, from 1 on, for who wants to look.

    The rate goes up over the first twentieth and down to nothing along half a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(steps):
        up, down = min(1.0, 20 * (step + 1) / steps), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * up * down
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1
