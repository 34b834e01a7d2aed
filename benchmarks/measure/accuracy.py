"""The gate before the stopwatch: a variant's results against float64, so that no wrong result has a speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.variants import Family, Step, Variant

Definition = Callable[[Any, torch.dtype], Step]


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
    """What a step should return, and how far from it each result, and the worst row of each, may be."""

    results: list[Tensor]
    budgets: list[float]
    row_budgets: list[float]


class Gate:
    """Holds the variants of one case against the family's definition, computed once where nothing is random."""

    def __init__(self, family: Family, case: Case) -> None:
        self.family, self.case = family, case
        self._known: dict[Definition, _Truth] = {}
        if family.reference is not None and not case.is_random:
            self._defined(family.reference)

    def check(self, step: Step, variant: Variant) -> Accuracy:
        """Run a variant's step once and compare all it returns."""
        results = step()
        compared = _double(self.family.comparable(self.case, results))
        truth = self._truth_of(variant, results)
        if not all(bool(torch.isfinite(t).all()) for t in results):  # also where nothing is compared
            return Accuracy(float("nan"), truth.budgets[0], False)
        return compare(compared, truth)

    def _truth_of(self, variant: Variant, results: tuple[Tensor, ...]) -> _Truth:
        if self.case.is_random and self.family.observed is not None:
            return self._made(self.family.observed(self.case, results))
        definition = self.family.reference or variant.definition
        if definition is not None:
            return self._defined(definition)
        own = _double(variant.build(self.case, torch.float64)())
        budgets = [self._grain(t) for t in own]
        return _Truth(own, budgets, [_WORST_ROW * budget for budget in budgets])

    def _defined(self, definition: Definition) -> _Truth:
        """Made once for all variants that share it."""
        if definition not in self._known:
            self._known[definition] = self._made(definition)
        return self._known[definition]

    def _made(self, definition: Definition) -> _Truth:
        truth = _double(definition(self.case, torch.float64)())
        eager = _double(definition(self.case, self.case.dtype)())
        grains = [self._grain(t) for t in truth]
        budgets = [2 * _error(e, t) + grain for e, t, grain in zip(eager, truth, grains)]
        rows = [
            max(2 * _row_error(e, t), _WORST_ROW * budget) + grain
            for e, t, grain, budget in zip(eager, truth, grains, budgets)
        ]
        return _Truth(truth, budgets, rows)

    def _grain(self, truth: Tensor) -> float:
        return torch.finfo(self.case.dtype).eps + self.family.allowance(self.case, truth)


# Errors of a row are some dozens of numbers: the worst of thousands of rows is this much above them all.
_WORST_ROW = 6.0


def _double(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().double() for t in results]


def compare(results: list[Tensor], truth: _Truth) -> Accuracy:
    """The worst result, judged by its own budget; its worst row may fail it, which the whole would hide."""
    if [r.shape for r in results] != [t.shape for t in truth.results]:
        return Accuracy(float("inf"), 0.0, False)
    judged = [(_error(r, t), budget) for r, t, budget in zip(results, truth.results, truth.budgets)]
    worst_rows = [(_row_error(r, t), budget) for r, t, budget in zip(results, truth.results, truth.row_budgets)]
    failed = [pair for pair in (*judged, *worst_rows) if not pair[0] <= pair[1]]
    error, budget = max(failed or judged, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))
    return Accuracy(error, budget, not failed)


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative root mean square error; NaN where the result holds NaN."""
    return float((result - truth).square().mean().sqrt() / _scale(truth))


def _row_error(result: Tensor, truth: Tensor) -> float:
    """Of the worst row along the last axis, over the root mean square of the whole."""
    if not truth.dim() or not truth.numel():
        return 0.0
    return float((result - truth).square().mean(-1).sqrt().max() / _scale(truth))


def _scale(truth: Tensor) -> Tensor:
    return truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
