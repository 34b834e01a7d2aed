"""The gate before the stopwatch: a variant's results against float64, so that no wrong result has a speed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.registry import Case, Family, Step, Variant


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far the worst of a variant's results is from float64.

    Attributes:
        error: root mean square of the difference over that of the truth, largest over the results.
        budget: what it may be: twice the error of the definition in the case's dtype, plus one unit in the last place.
        passed: every result is within its budget.
    """

    error: float
    budget: float
    passed: bool


class Gate:
    """Holds the variants of one case against the family's definition, computed once."""

    def __init__(self, family: Family, case: Case) -> None:
        self.family, self.case = family, case
        self._truth: list[Tensor] | None = None
        self._budgets: list[float] = []
        if family.reference is not None:
            self._truth = _double(family.reference(case, torch.float64)())
            eager = _double(family.reference(case, case.dtype)())
            self._budgets = [2 * _error(e, t) + self._ulp for e, t in zip(eager, self._truth)]

    @property
    def _ulp(self) -> float:
        return torch.finfo(self.case.dtype).eps

    def check(self, step: Step, variant: Variant) -> Accuracy:
        """Run a variant's step once and compare all it returns."""
        truth, budgets = self._truth, self._budgets
        if truth is None:
            truth = _double(variant.build(self.case, torch.float64)())
            # Rounding errors of a recurrence add up over its steps.
            budgets = [self._ulp * max(16, self.case.seqlen)] * len(truth)
        return compare(_double(self.family.comparable(self.case, step())), truth, budgets)


def _double(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().double() for t in results]


def compare(results: list[Tensor], truth: list[Tensor], budgets: list[float]) -> Accuracy:
    """The worst result, judged by its own budget."""
    if [r.shape for r in results] != [t.shape for t in truth]:
        return Accuracy(float("inf"), 0.0, False)
    judged = [(_error(r, t), budget) for r, t, budget in zip(results, truth, budgets)]
    error, budget = max(judged, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))
    return Accuracy(error, budget, all(error <= budget for error, budget in judged))


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative root mean square error; NaN where the result holds NaN."""
    scale = truth.square().mean().sqrt()
    return float((result - truth).square().mean().sqrt() / scale.clamp_min(torch.finfo(torch.float64).tiny))
