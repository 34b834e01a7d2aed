"""A plugin of pytest for ``benchmarks.gpu.prefill``: what tests launch is compiled into triton's cache, and no more.

Triton is imported when the tests are collected, not before: their conftest.py wants to be first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

_FOLDER = tempfile.TemporaryDirectory()
_fillers: list[Any] = []


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The Gluon kernels' own tests are skipped, module by module, where nothing executes them: here they compile."""
    import pytest

    for module in {item.getparent(pytest.Module) for item in items if item.get_closest_marker("hopper")}:
        module.own_markers = [mark for mark in module.own_markers if mark.name != "skipif"]


def pytest_collection_finish() -> None:
    from benchmarks.gpu.prefill import Filler

    _fillers.append(Filler(Path(_FOLDER.name)))


def pytest_runtest_teardown() -> None:
    _fillers[-1].build_launchers()


def pytest_unconfigure() -> None:
    _FOLDER.cleanup()
