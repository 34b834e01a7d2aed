"""What a family is made of: variants (ways to solve a case), what solving means, what a step has to do at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch

from benchmarks.cases import Case

Step = Callable[[], tuple[Tensor, ...]]
C = TypeVar("C", bound=Case)


def _accepts(case: Case) -> str | None:
    return None


def _everything(case: Case, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results


def _no_allowance(case: Case, result: Tensor) -> float:
    return 0.0


def _always(case: Case) -> bool:
    return True


def _nothing(case: Case) -> float:
    return 0.0


class Refused(Exception):
    """Raised by a build or a first step: the variant cannot take the case after all; the message says why."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step has to do at least, whoever does it; the floor under its time follows from the machine's rates.

    Attributes:
        flops: operations, a multiplication and an addition being two; None where they bound nothing.
        moved_bytes: through memory, every tensor that comes in or goes out once; None where they bound nothing.
        formula: both in the field's symbols, for people.
    """

    flops: float | None = None
    moved_bytes: int | None = None
    formula: str = ""


def _no_work(case: Case, variant: str) -> Work:
    return Work()


@dataclasses.dataclass(frozen=True)
class Variant(Generic[C]):
    """One way to solve the cases of a family.

    Attributes:
        name: unique within the family.
        build: makes the step that is checked and timed, for a case, in a dtype (float64 where it is its own truth).
        applies: None, or why it cannot take the case.
        slow: it takes seconds to build, and so has no place in a quick run.
        definition: of what this variant computes, where the family has no reference that all share; else it is held
            against itself in float64.
        holds: MiB that its step reads beside what the case gives, made where the step is built, as a whole mask is
            where the variant has no word for a window: they count in the peak of memory.
    """

    name: str
    build: Callable[[C, torch.dtype], Step]
    applies: Callable[[C], str | None] = _accepts
    slow: bool = False
    definition: Callable[[C, torch.dtype], Step] | None = None
    holds: Callable[[C], float] = _nothing


@dataclasses.dataclass(frozen=True)
class Family(Generic[C]):
    """Cases and variants that belong together.

    Attributes:
        reference: builds the definition: in float64 it is the truth, in the case's dtype it sets the error budget.
            None: the variants compute different functions, and each is held against itself in float64.
        peer: the variant that ratios are taken to.
        comparable: what of a variant's results the reference has; it may leave some out, so that long truths fit.
        allowance: relative error that a result may have beside its budget, since its sums are long.
        work: what a variant's step has to do at least; where all compute the same, it is the same for all.
        replays: whether the steps of a case may be captured as CUDA graphs; one that goes back through an older graph
            may not.
        observed: of a case that draws numbers itself: the definition with those that a variant's results show.
    """

    name: str
    variants: tuple[Variant[C], ...]
    peer: str
    reference: Callable[[C, torch.dtype], Step] | None
    comparable: Callable[[C, tuple[Tensor, ...]], tuple[Tensor, ...]] = _everything
    allowance: Callable[[C, Tensor], float] = _no_allowance
    work: Callable[[C, str], Work] = _no_work
    observed: Callable[[C, tuple[Tensor, ...]], Callable[[C, torch.dtype], Step]] | None = None
    replays: Callable[[C], bool] = _always

    def variant(self, name: str) -> Variant[C]:
        return next(v for v in self.variants if v.name == name)


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
            d_output = case.draw(*output.shape, dtype=output.dtype, generator=case.generator(1))
        gradients = torch.autograd.grad(output, leaves, d_output)
        return output.detach(), *(t.detach() for t in rest), *gradients

    return forward_backward


def backward_alone(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], d_outputs: Callable[[Tensor], Tensor]
) -> Step:
    """A step that goes back through the graph of ``function(*inputs)``, which is made here, once.

    Args:
        function: what is differentiated.
        inputs: whose gradients are taken.
        d_outputs: the gradient of an output like this; asked once for each, in their order.
    """
    leaves = [t.requires_grad_() for t in inputs]
    # torch.compile would let the backward overwrite what it saved, and it runs many times here
    with functorch.patch(donated_buffer=False):
        outputs = function(*leaves)
    gradients = [d_outputs(t) for t in outputs]
    made = tuple(t.detach() for t in outputs)

    def step() -> tuple[Tensor, ...]:
        return *made, *torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return step
