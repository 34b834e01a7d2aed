"""The laboratory as the tests use it: compile for GPUs that are not here, and hold kernels to their rows."""

from __future__ import annotations

import functools

from benchmarks.laboratory import table
from benchmarks.laboratory.compile import Row, compile_for
from benchmarks.laboratory.targets import SHARED_MEMORY

__all__ = ["SHARED_MEMORY", "compile_for", "hold_to_table"]

_committed = functools.cache(table.read)


def hold_to_table(rows: list[Row]) -> None:
    """Fail where a kernel takes more than docs/kernel_resources.md says; the page of another triton says nothing."""
    complaints = table.regressions(rows, _committed())
    assert not complaints, "\n".join([*complaints, "if that is as it should be, `make resources` writes the page anew"])
