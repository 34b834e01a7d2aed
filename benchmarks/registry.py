"""What is measured: cases (a problem), variants (a way to solve it), and the families that say what solving means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]
# What rules who sees whom, and what else touches the scores.
Mask = Literal["none", "causal", "padding", "boolean", "sparse", "documents", "window", "bias", "alibi", "softcap"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. Its numbers are drawn from its seed, rounded to ``dtype``: every variant gets the same ones."""

    family: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    mask: Mask = "none"
    weights: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def name(self) -> str:
        """Readable and unique: ``module-b1-h2-l16-d32-train-causal-weights-float32``."""
        parts = [self.family, f"b{self.batch}", f"h{self.heads}", f"l{self.seqlen}", f"d{self.head_dim}"]
        parts += ["train" if self.backward else "eval", "" if self.mask == "none" else self.mask]
        parts += ["weights" if self.weights else "", str(self.dtype).removeprefix("torch.")]
        return "-".join(filter(None, parts))

    @property
    def embed_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def attention_flops(self) -> float:
        """``4 B H L S D`` forward, 2.5 times that backward, halved for a causal call (the field's convention)."""
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        causal = self.mask in ("causal", "documents", "window", "alibi", "softcap")
        return forward * (3.5 if self.backward else 1.0) * (0.5 if causal else 1.0)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def draw(self, *shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, representable in the case's dtype, in ``dtype`` on the case's device."""
        return torch.randn(shape, generator=generator).to(self.dtype).to(self.device, dtype)


def _accepts(case: Case) -> str | None:
    return None


def _everything(case: Case, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to solve the cases of a family.

    Attributes:
        name: unique within the family.
        build: makes the step that is checked and timed, for a case, in a dtype (float64 where it is its own truth).
        applies: None, or why it cannot take the case.
    """

    name: str
    build: Callable[[Case, torch.dtype], Step]
    applies: Callable[[Case], str | None] = _accepts


@dataclasses.dataclass(frozen=True)
class Family:
    """Cases and variants that belong together.

    Attributes:
        reference: builds the definition: in float64 it is the truth, in the case's dtype it sets the error budget.
            None: the variants compute different functions, and each is held against itself in float64.
        peer: the variant that ratios are taken to.
        comparable: what of a variant's results the reference has; it may leave some out, so that long truths fit.
    """

    name: str
    variants: tuple[Variant, ...]
    peer: str
    reference: Callable[[Case, torch.dtype], Step] | None
    comparable: Callable[[Case, tuple[Tensor, ...]], tuple[Tensor, ...]] = _everything

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)


def families() -> dict[str, Family]:
    """Every family by name."""
    from benchmarks import attention, module, sequence

    return {family.name: family for family in (attention.FAMILY, module.FAMILY, sequence.FAMILY)}


def quick_cases() -> list[Case]:
    """What ``make bench`` runs on a CPU, in under three minutes."""
    from benchmarks import attention, module, sequence

    return [*sequence.quick_cases(), *attention.quick_cases(), *module.quick_cases()]


def all_cases() -> list[Case]:
    """The quick cases and the longer ones."""
    from benchmarks import attention, module, sequence

    more = [*module.more_cases(), *attention.more_cases(), *sequence.more_cases()]
    return [*quick_cases(), *more]


def differentiated(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    case: Case,
    d_output: Tensor | None = None,
) -> Step:
    """A step that calls ``function(*inputs)`` and, where the case says so, takes its output's gradients too.

    The gradient of the output is drawn once, unless given; that of the weights is not used, as in most training.
    """
    if not case.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*inputs)

        return forward

    leaves = [t.requires_grad_() for t in inputs]

    def forward_backward() -> tuple[Tensor, ...]:
        nonlocal d_output
        output, *rest = function(*leaves)
        if d_output is None:
            generator = torch.Generator().manual_seed(case.seed + 1)
            d_output = case.draw(*output.shape, dtype=output.dtype, generator=generator)
        gradients = torch.autograd.grad(output, leaves, d_output)
        return output.detach(), *(t.detach() for t in rest), *gradients

    return forward_backward
