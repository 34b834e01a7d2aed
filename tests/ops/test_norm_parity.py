"""Forward and every gradient of the norms against the float64 reference: features alone, in pairs, at random."""

import dataclasses
import random
from typing import Any

import pytest

from tests.ops.norm_cases import AXES, DTYPES, Case, check
from tests.pairwise import pairwise

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("poisoned")]

RANDOM_CASES = 20
MOST_COST = 40  # thousand elements

# Levels that mean nothing by themselves, and what they need.
NEEDED: dict[str, dict[str, Any]] = {"layout": {"rows": (3, 1, 2)}, "rows": {"size": 33}}


def alone(axis: str, level: Any, dtype: str, kind: str) -> tuple[str, Case]:
    levels: dict[str, Any] = {"dtype": dtype, "kind": kind, **NEEDED.get(axis, {}), axis: level}
    return f"{axis} {level}", Case(**levels)


ALONE = [
    case
    for dtype in DTYPES
    for kind in AXES["kind"]
    for case in [
        ("plain", Case(dtype=dtype, kind=kind)),
        *(
            alone(axis, level, dtype, kind)
            for axis in AXES
            for level in AXES[axis]
            if axis not in ("dtype", "kind") and level != getattr(Case(), axis)
        ),
    ]
    if case[1].makes_sense
]


def allowed(levels: dict[str, Any]) -> bool:
    case = Case(**levels)
    return case.makes_sense and case.cost <= MOST_COST


PAIRS = [("pairs of features", Case(**levels)) for levels in pairwise(AXES, allowed)]


def random_cases(seed: int) -> list[tuple[str, Case]]:
    """Whole combinations."""
    rng = random.Random(seed)
    cases: list[tuple[str, Case]] = []
    while len(cases) < RANDOM_CASES:
        levels = {axis: rng.choice(levels) for axis, levels in AXES.items()}
        if allowed(levels):
            cases.append(("random combinations", dataclasses.replace(Case(**levels), seed=seed)))
    return cases


def pytest_generate_tests(metafunc):
    if "sampled" in metafunc.fixturenames:
        cases = random_cases(metafunc.config.seed)
        metafunc.parametrize("sampled", cases, ids=[f"{i}-{case.id}" for i, (_, case) in enumerate(cases)])


def named(cases):
    return [pytest.param(feature, case, id=case.id) for feature, case in cases]


@pytest.mark.parametrize(("feature", "case"), named(ALONE))
def test_norm_grad_matches_reference(feature, case, backend, device):
    check(feature, case, backend, device)


@pytest.mark.parametrize(("feature", "case"), named(PAIRS))
def test_norm_grad_of_pairs_matches_reference(feature, case, backend, device):
    check(feature, case, backend, device)


def test_norm_grad_of_random_combinations_matches_reference(sampled, backend, device):
    feature, case = sampled
    check(feature, case, backend, device)


@pytest.mark.parametrize("kind", AXES["kind"])
@pytest.mark.parametrize("size", [16384, 65536])
def test_norm_grad_of_wide_rows_matches_reference(kind, size, backend, device):
    check("wide rows", Case(kind=kind, size=size, rows=(3,)), backend, device)
