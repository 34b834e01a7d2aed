"""The family ``sequence``: three ways to process a sequence causally, at equal width (arXiv:1706.03762, table 1).

They compute different functions: each is held against itself in float64, and the ratio is a cost, not a speed-up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.registry import Family, Step, Variant, differentiated


class NaiveRNN(nn.Module):
    """``h_t = tanh(W x_t + U h_(t-1))``, its cell in a Python loop."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(size, size)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(x.shape[0], x.shape[2]), []
        for token in x.unbind(1):
            state = self.cell(token, state)
            states.append(state)
        return torch.stack(states, dim=1)


class CausalConvolutions(nn.Module):
    """Four causal convolutions, kernel size 3: each output reaches 8 tokens back."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(size, size, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        for layer in self.layers:
            x = F.relu(layer(F.pad(x, (2, 0))))
        return x.mT


class CausalSelfAttention(nn.Module):
    """A ``MultiheadAttention`` of either make with a causal mask, without weights."""

    def __init__(self, attention: nn.MultiheadAttention, seqlen: int) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("hidden", torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.hidden, need_weights=False)[0]


def _step(make: Callable[[AttentionCase], nn.Module]) -> Callable[[AttentionCase, torch.dtype], Step]:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            module = make(case)
        module = module.to(case.dtype).to(case.device, dtype).train(case.backward)
        x = case.draw(case.batch, case.seqlen, case.embed_dim, dtype=dtype, generator=case.generator())
        parameters = tuple(module.parameters()) if case.backward else ()
        return differentiated(lambda x, *_: (module(x),), (x, *parameters), case)

    return build


def _attention(kind: Callable[[], type[nn.MultiheadAttention]]) -> Callable[[AttentionCase, torch.dtype], Step]:
    return _step(
        lambda case: CausalSelfAttention(kind()(case.embed_dim, case.heads, batch_first=True).float(), case.seqlen)
    )


def _allowance(case: AttentionCase, result: Tensor) -> float:
    """Rounding errors of a recurrence add up over its steps."""
    return torch.finfo(case.dtype).eps * max(16, case.seqlen)


FAMILY = Family(
    "sequence",
    (
        Variant("fastattn", _attention(lambda: fastattn.MultiheadAttention)),
        Variant("nn.MultiheadAttention", _attention(lambda: nn.MultiheadAttention)),
        Variant("naive-rnn", _step(lambda case: NaiveRNN(case.embed_dim))),
        Variant("causal-conv", _step(lambda case: CausalConvolutions(case.embed_dim))),
    ),
    peer="nn.MultiheadAttention",
    reference=None,
    allowance=_allowance,
)


def quick_cases() -> list[AttentionCase]:
    """One length, both directions."""
    return [AttentionCase("sequence", 4, 4, 256, 32, backward=backward, mask="causal") for backward in (False, True)]


def more_cases() -> list[AttentionCase]:
    """The same tokens in longer sequences."""
    return [
        AttentionCase("sequence", 4096 // seqlen, 8, seqlen, 32, backward=backward, mask="causal")
        for seqlen in (128, 1024, 4096)
        for backward in (False, True)
    ]
