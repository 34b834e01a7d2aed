"""The quick cases through pytest-benchmark: ``pytest benchmarks/``. The families are the command line's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.families import families, quick_cases
from benchmarks.measure.accuracy import Gate
from benchmarks.measure.timing import keep_freed_memory
from benchmarks.variants import Refused, Variant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

_PAIRS = [
    pytest.param(case, variant, id=f"{case.name}-{variant.name}")
    for case in quick_cases()
    for variant in families()[case.family].variants
    if not variant.slow
]


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "variant"), _PAIRS)
def test_benchmark(benchmark: Any, case: Case, variant: Variant) -> None:
    """Checked against float64 first; the time itself is no verdict."""
    reason = variant.applies(case)
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = case.name
    try:
        step = variant.build(case, case.dtype)
        accuracy = Gate(families()[case.family], case).check(step, variant)
    except Refused as refusal:
        pytest.skip(str(refusal))
    benchmark.extra_info["error"] = accuracy.error
    assert accuracy.passed, f"error {accuracy.error:.2e} exceeds the budget {accuracy.budget:.2e}"
    benchmark(step)
