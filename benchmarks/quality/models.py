"""Five models: one shell of embedding, norm and head, around what mixes the vectors of a sequence.

Matched are the width of what enters and leaves a mixer, 64, and the parameters, 100 thousand: a mixer is given the
layers or the hidden size that bring it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks.quality.tasks import Task
from benchmarks.reporting.document import EQUIVARIANCE

WIDTH = 64


class Attention(nn.Module):
    """Two pre-norm transformer blocks of this package behind learned positions; the mask is causal."""

    hidden: Tensor | None

    def __init__(self, seqlen: int, *, positions: bool = True, causal: bool = True) -> None:
        super().__init__()
        # Nearly as large as the embeddings: at torch's usual 0.02, copying takes many times the steps
        self.positions = nn.Parameter(0.5 * torch.randn(seqlen, WIDTH)) if positions else None
        self.register_buffer("hidden", torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1) if causal else None)
        self.blocks = nn.ModuleList(
            fastattn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.positions is None else x + self.positions
        for block in self.blocks:
            x = block(x, src_mask=self.hidden, is_causal=self.hidden is not None)
        return x


class DilatedConvolutions(nn.Module):
    """A TCN (arXiv:1803.01271): six causal residual blocks, kernel size 3, that together reach 126 tokens back."""

    def __init__(self) -> None:
        super().__init__()
        dilations = [2**i for i in range(6)]
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in dilations)
        self.dilated = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, dilation=dilation) for dilation in dilations)
        self.pointwise = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, dilated, pointwise) in enumerate(zip(self.norms, self.dilated, self.pointwise)):
            y = dilated(F.pad(norm(x).mT, (2 * 2**i, 0)))
            x = x + pointwise(F.relu(y).mT)
        return x


class TwoConvolutions(nn.Module):
    """Two causal convolutions, kernel size 3, four times as wide between: they reach 4 tokens back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(WIDTH, 4 * WIDTH, 3)
        self.second = nn.Conv1d(4 * WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(F.pad(x.mT, (2, 0))))
        return x + self.second(F.pad(y, (2, 0))).mT


class Recurrence(nn.Module):
    """One recurrent layer, and a linear one from its hidden size to the width."""

    def __init__(self, rnn: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn
        self.linear = nn.Linear(rnn.hidden_size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class SequenceModel(nn.Module):
    """Tokens ``[N, L]`` to logits ``[N, L, classes]``; only the mixer moves anything along ``L``."""

    def __init__(self, mixer: nn.Module, task: Task) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, WIDTH)
        self.mixer = mixer
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.mixer(self.embedding(tokens))))


@dataclass(frozen=True)
class Model:
    """A name, the mixer for a sequence length, and the rate that it learns with on every task."""

    name: str
    mixer: Callable[[int], nn.Module]
    learning_rate: float

    def build(self, task: Task) -> SequenceModel:
        """A new model, its weights from torch's global generator."""
        return SequenceModel(self.mixer(task.seqlen), task)


def models(*, quick: bool = False) -> tuple[Model, ...]:
    """The five, each family with the best of the rates 3e-3, 5e-3 and 1e-2 over all tasks; quick, with one recurrence.

    One wide recurrent layer does better here, and is faster, than three or four 64 wide of as many parameters.
    """
    every = (
        Model("attention", Attention, 5e-3),
        Model("tcn", lambda seqlen: DilatedConvolutions(), 1e-2),
        Model("conv x2", lambda seqlen: TwoConvolutions(), 1e-2),
        Model("gru", lambda seqlen: Recurrence(nn.GRU(WIDTH, 144, batch_first=True)), 1e-2),
        Model("lstm", lambda seqlen: Recurrence(nn.LSTM(WIDTH, 122, batch_first=True)), 1e-2),
    )
    return every[:-1] if quick else every


def deviations(seed: int, seqlen: int = 48) -> list[dict[str, Any]]:
    """Rows ``task, model, parameters, deviation``: how far ``mixer(x[order])`` is from ``mixer(x)[order]``, untrained.

    In float64, the largest difference over the largest result. Attention that knows neither positions nor a mask is
    equivariant and differs by rounding alone; whatever has an order built in differs as much as two results do.
    """
    mixers = {"attention, no positions, no mask": lambda seqlen: Attention(seqlen, positions=False, causal=False)}
    mixers |= {model.name: model.mixer for model in models()}
    rows = []
    for name, make in mixers.items():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            mixer = make(seqlen).double()
            x, order = torch.randn(2, seqlen, WIDTH, dtype=torch.float64), torch.randperm(seqlen)
            result = mixer(x)
            difference = (mixer(x[:, order]) - result[:, order]).abs().max() / result.abs().max()
        parameters = sum(parameter.numel() for parameter in mixer.parameters())
        rows.append({"task": EQUIVARIANCE, "model": name, "parameters": parameters, "deviation": difference.item()})
    return rows
