"""Which of a test's cases `make test` runs on the compiler's modules, too; `make proof` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases as arguments of ``pytest.mark.parametrize``, the chosen ones marked ``machine``.

    Raises:
        ValueError: a chosen one is none of the cases.
    """
    cases = list(cases)
    if missing := [case for case in chosen if case not in cases]:
        raise ValueError(f"chosen={missing}: the cases are {cases}")
    return [pytest.param(case, marks=pytest.mark.machine) if case in chosen else case for case in cases]
