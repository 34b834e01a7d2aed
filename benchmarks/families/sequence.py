"""The family ``sequence``: three ways to process a sequence causally (arXiv:1706.03762, table 1).

The axis that is matched is the width ``d`` of inputs, outputs and states. Parameters and operations are not, and
:func:`theory` counts them. The ways compute different functions: the ratio is a cost, not a speed-up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.families.sequence_models import (
    Attend,
    AttentionByHand,
    CausalConvolutions,
    CausalSelfAttention,
    CellLoop,
    DilatedConvolutions,
    Recurrence,
    attend_naively,
    attend_sdpa,
    full_reach,
)
from benchmarks.variants import Family, Step, Variant, Work, differentiated

# A step of a loop takes as long in a long sequence as in a short one, which two lengths show; a training step of 512
# took half of the family's time in a quick run, and on a busy machine each step of the loop waits for the processor.
_LONGEST_LOOP = 256
# In float64, as the gate holds them; a training step needs about three times as much.
_MOST_SCORE_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Law:
    """A row of table 1 of arXiv:1706.03762, a layer's: ``n`` tokens of width ``d``, kernel size ``k``."""

    complexity: str
    sequential: str
    path: str


RECURRENT = Law("n d^2", "n", "n")
CONVOLUTIONAL = Law("k n d^2", "1", "n/k")
DILATED = Law("k n d^2", "1", "log_k n")
ATTENTION = Law("n^2 d", "1", "1")


def _nothing(case: AttentionCase) -> int:
    return 0


def _every_score(case: AttentionCase) -> int:
    return case.batch * case.heads * case.seqlen**2


def _averaged_weights(case: AttentionCase) -> int:
    """Those of a step, and those that they are compared with."""
    return 2 * case.batch * case.seqlen**2


def _scores_of_torch(case: AttentionCase) -> int:
    """Torch's module keeps every score in evaluation; in training it makes the mask a floating one, and no scores."""
    return case.seqlen**2 if case.backward else _every_score(case)


@dataclasses.dataclass(frozen=True)
class Way:
    """A variant with its theory.

    Attributes:
        name: of the variant.
        make: its module.
        law: what table 1 says of its like.
        products: of a ``d x d`` matrix and a token, in each layer.
        layers: for a sequence length.
        held: numbers for pairs of tokens that are in memory at once.
        hidden_too: whether scores that the causal mask hides are computed.
        longest: sequence that is taken, where there is such a limit.
    """

    name: str
    make: Callable[[AttentionCase], nn.Module]
    law: Law
    products: int
    layers: Callable[[int], int] = lambda seqlen: 1
    held: Callable[[AttentionCase], int] = _nothing
    hidden_too: Callable[[AttentionCase], bool] = lambda case: False
    longest: int | None = None

    def applies(self, case: AttentionCase) -> str | None:
        if case.mask != "causal" or case.weights:
            return "the family compares causal layers by their outputs"
        if self.longest is not None and case.seqlen > self.longest:
            return f"a Python loop of {case.seqlen} steps: at most {self.longest} are taken"
        held = self.held(case) * torch.float64.itemsize
        if held > _MOST_SCORE_BYTES:
            return f"L x L numbers take {held / 2**30:.1f} GiB where float64 checks it: at most 2 GiB are taken"
        return None

    def flops_per_token(self, case: AttentionCase) -> int:
        """Operations of the forward for a token; a multiplication and an addition are two.

        ``2 d^2`` for each product of a matrix and a token: an RNN has 2 of them, a GRU 6, an LSTM 8, a convolution of
        size k has k in each layer, attention 4 (query, key, value and output projection). Attention adds ``2 d`` for
        the scores with a key and ``2 d`` for its value, over L keys, or the (L + 1) / 2 that are visible on average
        where hidden ones are left out. What is not a product (biases, gates, softmax, activations) is not counted.
        """
        flops = 2 * self.products * self.layers(case.seqlen) * case.embed_dim**2
        if self.law is ATTENTION:
            flops += 2 * case.embed_dim * (2 * case.seqlen if self.hidden_too(case) else case.seqlen + 1)
        return flops

    def reach(self, seqlen: int) -> int:
        """Tokens that the last output depends on, its own included."""
        layers = self.layers(seqlen)
        limits = {CONVOLUTIONAL: 2 * layers + 1, DILATED: 2 ** (layers + 1) - 1}
        return min(seqlen, limits.get(self.law, seqlen))

    def sequential_steps(self, seqlen: int) -> int:
        """Steps that wait for one another: a token's in a recurrence, else a layer's."""
        return seqlen if self.law is RECURRENT else self.layers(seqlen)

    def longest_path(self, seqlen: int) -> int | None:
        """Steps between the first token and the last output; None where that output does not depend on it."""
        return self.sequential_steps(seqlen) if self.reach(seqlen) == seqlen else None

    def build(self, case: AttentionCase, dtype: torch.dtype) -> Step:
        module = self.module(case, dtype)
        x = case.draw(case.batch, case.seqlen, case.embed_dim, dtype=dtype, generator=case.generator())
        parameters = tuple(module.parameters()) if case.backward else ()

        def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            # nn.Module reads its parameters itself: they are passed so that their gradients are taken
            results = module(x)
            return results if isinstance(results, tuple) else (results,)

        return differentiated(function, (x, *parameters), case)

    def module(self, case: AttentionCase, dtype: torch.dtype) -> nn.Module:
        """The same parameters for a case in every dtype, and for all attention: rounded to the case's dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            module = self.make(case)
        return module.to(case.dtype).to(case.device, dtype).train(case.backward)


def _attention(kind: type[nn.MultiheadAttention], *, weights: bool) -> Callable[[AttentionCase], nn.Module]:
    return lambda case: CausalSelfAttention(
        kind(case.embed_dim, case.heads, batch_first=True), case.seqlen, weights=weights
    )


def _by_hand(attend: Attend) -> Callable[[AttentionCase], nn.Module]:
    return lambda case: AttentionByHand(
        nn.MultiheadAttention(case.embed_dim, case.heads, batch_first=True), case.seqlen, attend
    )


def _recurrence(kind: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]) -> Callable[[AttentionCase], nn.Module]:
    return lambda case: Recurrence(kind(case.embed_dim, case.embed_dim, batch_first=True))


def _cell_loop(kind: type[nn.RNNCell] | type[nn.GRUCell]) -> Callable[[AttentionCase], nn.Module]:
    return lambda case: CellLoop(kind(case.embed_dim, case.embed_dim))


WAYS = (
    Way("fastattn", _attention(fastattn.MultiheadAttention, weights=False), ATTENTION, 4),
    Way(
        "fastattn-weights", _attention(fastattn.MultiheadAttention, weights=True), ATTENTION, 4, held=_averaged_weights
    ),
    Way(
        "nn.MultiheadAttention",
        _attention(nn.MultiheadAttention, weights=False),
        ATTENTION,
        4,
        held=_scores_of_torch,
        hidden_too=lambda case: not case.backward,
    ),
    Way(
        "nn.MultiheadAttention-weights",
        _attention(nn.MultiheadAttention, weights=True),
        ATTENTION,
        4,
        held=_every_score,
        hidden_too=lambda case: True,
    ),
    Way("qkv+sdpa", _by_hand(attend_sdpa), ATTENTION, 4),
    Way(
        "naive-attention",
        _by_hand(attend_naively),
        ATTENTION,
        4,
        held=_every_score,
        hidden_too=lambda case: True,
    ),
    Way("naive-rnn", _cell_loop(nn.RNNCell), RECURRENT, 2, longest=_LONGEST_LOOP),
    Way("naive-gru", _cell_loop(nn.GRUCell), RECURRENT, 6, longest=_LONGEST_LOOP),
    Way("nn.RNN", _recurrence(nn.RNN), RECURRENT, 2),
    Way("nn.GRU", _recurrence(nn.GRU), RECURRENT, 6),
    Way("nn.LSTM", _recurrence(nn.LSTM), RECURRENT, 8),
    Way("causal-conv", lambda case: CausalConvolutions(case.embed_dim, 1), CONVOLUTIONAL, 3),
    Way("causal-conv-x4", lambda case: CausalConvolutions(case.embed_dim, 4), CONVOLUTIONAL, 3, lambda seqlen: 4),
    Way("dilated-tcn", lambda case: DilatedConvolutions(case.embed_dim, case.seqlen), DILATED, 3, full_reach),
)


def _allowance(case: AttentionCase, result: Tensor) -> float:
    """Rounding errors add up over the layers and, as a random walk, over the steps of a recurrence and of sums.

    The longest sum is that over a sequence, and, in training, that of a parameter's gradient over all tokens. Never
    more than a tenth: results that have nothing to do with the truth are as far from it as it is large.
    """
    longest = case.batch * case.seqlen if case.backward else case.seqlen
    return min(0.1, torch.finfo(case.dtype).eps * max(16.0, longest**0.5))


def _of_attention(case: AttentionCase, dtype: torch.dtype) -> Step:
    """All attention computes one function: by the formula, or, where that would hold too many scores, by SDPA."""
    formula, fused = (next(way for way in WAYS if way.name == name) for name in ("naive-attention", "qkv+sdpa"))
    return (fused if formula.applies(case) else formula).build(case, dtype)


def _definition(way: Way) -> Callable[[AttentionCase, torch.dtype], Step] | None:
    """Recurrences, convolutions and averaged weights are held against themselves in float64."""
    return _of_attention if way.law is ATTENTION and not way.name.endswith("-weights") else None


def work(case: AttentionCase, variant: str) -> Work:
    """The operations of this variant, in training three times its forward's. Memory's rate bounds no way: no bytes."""
    way = next(way for way in WAYS if way.name == variant)
    passes = 3 if case.backward else 1
    in_symbols = f"{2 * passes * way.products * way.layers(case.seqlen)} d^2"
    if way.law is ATTENTION:
        in_symbols += f" + {4 * passes} d L" if way.hidden_too(case) else f" + {2 * passes} d (L + 1)"
    flops = float(passes * way.flops_per_token(case) * case.batch * case.seqlen)
    return Work(flops, formula=f"flops B L ({in_symbols})")


FAMILY = Family(
    "sequence",
    tuple(Variant(way.name, way.build, way.applies, definition=_definition(way)) for way in WAYS),
    peer="nn.MultiheadAttention",
    reference=None,
    allowance=_allowance,
    work=work,
)


def theory(case: AttentionCase) -> list[dict[str, Any]]:
    """What can be said of each variant without a stopwatch, as plain values.

    ``complexity_per_layer``, ``sequential_per_layer`` and ``path_in_symbols`` are table 1 of arXiv:1706.03762, whose
    ``n^2 d`` leaves the projections out; the numbers are of the whole variant at this width and length, and hold them.
    """
    lines = []
    for way in WAYS:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in way.make(case).parameters())
        lines.append(
            {
                "variant": way.name,
                "parameters": parameters,
                "flops_per_token": way.flops_per_token(case),
                "layers": way.layers(case.seqlen),
                "sequential_steps": way.sequential_steps(case.seqlen),
                "longest_path": way.longest_path(case.seqlen),
                "reach": way.reach(case.seqlen),
                "complexity_per_layer": way.law.complexity,
                "sequential_per_layer": way.law.sequential,
                "path_in_symbols": way.law.path,
            }
        )
    return lines


def quick_cases() -> list[AttentionCase]:
    """1024 tokens of width 128 in ever longer sequences, evaluation and training."""
    return [
        AttentionCase("sequence", 1024 // seqlen, 4, seqlen, 32, backward=backward, mask="causal")
        for seqlen in (128, 256, 512)
        for backward in (False, True)
    ]


def more_cases() -> list[AttentionCase]:
    """4096 tokens of width 256 in ever longer sequences; one sequence where it is longer than that."""
    return [
        AttentionCase("sequence", max(1, 4096 // seqlen), 8, seqlen, 32, backward=backward, mask="causal")
        for seqlen in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
        for backward in (False, True)
    ]
