"""Training a model on a task for a given number of steps, and how well it does on the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.models import Model
from benchmarks.quality.tasks import IGNORED, Task

SOLVED = 0.995  # at this accuracy training stops

_HELD_OUT = 256  # sequences
_WARM_UP = 50  # steps


@dataclasses.dataclass(frozen=True)
class Sample:
    """After ``step`` steps and ``seconds`` of wall time: loss and accuracy on sequences that are never trained on."""

    step: int
    seconds: float
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """How a model of so many ``parameters`` learned a task; the first sample is of the untrained model.

    ``chance`` is the accuracy of a guess that reads nothing.
    """

    task: str
    chance: float
    model: str
    parameters: int
    samples: tuple[Sample, ...]

    @property
    def accuracy(self) -> float:
        """Of the last sample."""
        return self.samples[-1].accuracy

    def as_json(self) -> dict[str, Any]:
        """Plain values; ``curve`` holds one list for each field of :class:`Sample`."""
        last = self.samples[-1]
        return {
            "task": self.task,
            "chance": self.chance,
            "model": self.model,
            "parameters": self.parameters,
            "steps": last.step,
            "seconds": last.seconds,
            "accuracy": round(last.accuracy, 5),
            "curve": {f.name: [round(getattr(s, f.name), 5) for s in self.samples] for f in dataclasses.fields(Sample)},
        }


def train(
    task: Task,
    model: Model,
    *,
    seed: int,
    steps: int,
    every: int = 25,
    device: str | torch.device = "cpu",
    show: Callable[[Sample], None] = lambda sample: None,
) -> Curve:
    """Train with AdamW for ``steps`` steps, or until :data:`SOLVED`; look every ``every`` steps.

    All models get the same sequences for a seed. On a CPU with one thread everything but the seconds repeats bitwise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.build(task).to(device)
    # Weights and streams of a seed, the one trained on and the one held out, are made on the CPU: the same everywhere
    stream = torch.Generator().manual_seed(2 * seed)
    held_out = _draw(task, torch.Generator().manual_seed(2 * seed + 1), _HELD_OUT, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=model.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    samples: list[Sample] = []
    began = time.perf_counter()

    def look(step: int) -> None:
        loss, accuracy = _evaluate(network, *held_out)
        samples.append(Sample(step, time.perf_counter() - began, loss, accuracy))
        show(samples[-1])

    look(0)
    for step in range(1, steps + 1):
        tokens, targets = _draw(task, stream, task.batch, device)
        optimizer.zero_grad()
        _loss(network(tokens), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            look(step)
            if samples[-1].accuracy >= SOLVED:
                break
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Curve(task.name, task.chance, model.name, parameters, tuple(samples))


def _draw(task: Task, generator: torch.Generator, size: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    tokens, targets = task.draw(generator, size)
    return tokens.to(device), targets.to(device)


def _rate(step: int, steps: int) -> float:
    """A linear warm-up times half a cosine down to a twentieth."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _evaluate(network: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    logits = network(tokens)
    right = logits.argmax(-1) == targets
    return _loss(logits, targets).item(), right[targets != IGNORED].double().mean().item()
