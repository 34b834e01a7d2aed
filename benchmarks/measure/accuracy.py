"""The gate before the stopwatch: a variant's results against float64, so that no wrong result has a speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.registry import Family, Step, Variant


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far the worst of a variant's results is from float64.

    Attributes:
        error: root mean square of the difference over that of the truth, largest over the results.
        budget: what it may be: twice the error of the definition in the case's dtype, plus one unit in the last place,
            plus what the family allows for long sums.
        passed: every result is within its budget.
    """

    error: float
    budget: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class _Truth:
    """What a step should return, and how far each result may be from it."""

    results: list[Tensor]
    budgets: list[float]


class Gate:
    """Holds the variants of one case against the family's definition, computed once where nothing is random."""

    def __init__(self, family: Family, case: Case) -> None:
        self.family, self.case = family, case
        self._truth: _Truth | None = None
        if family.reference is not None and not case.is_random:
            self._truth = self._defined(family.reference)

    def check(self, step: Step, variant: Variant) -> Accuracy:
        """Run a variant's step once and compare all it returns."""
        return self.judge(step(), variant)

    def judge(self, results: tuple[Tensor, ...], variant: Variant) -> Accuracy:
        """Compare what a variant's step returned."""
        truth = self._truth
        if truth is None and self.family.observed is not None:
            truth = self._defined(self.family.observed(self.case, results))
        elif truth is None:
            own = _double(variant.build(self.case, torch.float64)())
            truth = _Truth(own, [self._grain(t) for t in own])
        return compare(_double(self.family.comparable(self.case, results)), truth.results, truth.budgets)

    def _defined(self, definition: Callable[[Any, torch.dtype], Step]) -> _Truth:
        truth = _double(definition(self.case, torch.float64)())
        eager = definition(self.case, self.case.dtype)()
        return _Truth(truth, [2 * _error(e.detach().double(), t) + self._grain(t) for e, t in zip(eager, truth)])

    def _grain(self, truth: Tensor) -> float:
        return torch.finfo(self.case.dtype).eps + self.family.allowance(self.case, truth)


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
