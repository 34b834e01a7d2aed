"""A plugin of pytest: what the tests launch is compiled for a GPU that need not be here, and never run.

``python -m pytest -p tests.compile_only --compile-for cuda:90 -m parity -k triton`` says of every parity case whether
this triton compiles its kernels. Results hold nothing, so nothing is compared with the reference. A run that compiles
nothing fails.
"""

from __future__ import annotations

import os
from typing import Any

# Read by tests.machines, which the conftest imports behind this plugin: kernels are not interpreted.
os.environ["FASTATTN_MACHINE"] = "compiler"

_compiled: list[Any] = []


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--compile-for", default="cuda:90", metavar="TARGET", help="of the kernels that are only compiled")
    group.addoption("--front-end", action="store_true", help="only down to Triton's own representation: 5 times faster")


def pytest_configure(config: Any) -> None:
    """Put the compiler in the place of the device, before the tests are imported."""
    import fastattn.testing
    from fastattn.ops.common import backends

    fastattn.testing.assert_within_budget = lambda *_, **__: None
    backends.DEVICES = ("cpu",)
    from tests.ops import attention_cases

    cases: Any = attention_cases
    cases.run_reference = cases.allowances = lambda *_: _Anything()
    if config.getoption("--front-end"):
        _stop_behind_the_front_end()
    from benchmarks.laboratory.stand_in import Compiled

    _compiled.append(Compiled(config.getoption("--compile-for")))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import triton

    (compiled,) = _compiled
    terminalreporter.write_line(f"triton {triton.__version__}: kernels compiled: {len(compiled.kernels)}")


def pytest_sessionfinish(session: Any) -> None:
    """A run that compiled nothing has shown nothing."""
    if not _compiled[0].kernels and not session.exitstatus:
        session.exitstatus = 1


class _Anything(dict[str, None]):
    """A result of every name."""

    def __missing__(self, name: str) -> None:
        return None


class _Seen(Exception):
    """Triton's own representation of a kernel is made."""


def _stop_behind_the_front_end() -> None:
    from triton.compiler.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    make, run = ASTSource.make_ir, JITFunction.run
    made: set[str] = set()

    def make_and_stop(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.hash() not in made:
            make(self, *args, **kwargs)
            made.add(self.hash())
        raise _Seen

    def run_until_stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        except _Seen:
            return None

    ASTSource.make_ir, JITFunction.run = make_and_stop, run_until_stopped
