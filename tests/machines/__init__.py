"""Machines: where the kernels run while the tests look at them. The same tests run on every one.

- ``interpreter``: Triton's own, on the Python source of plain kernels; its products of tiles are summed
  in one order everywhere (``products.py``). What a CPU gets where nothing else is asked for.
- ``ttgir``: the compiler's own modules, executed on a CPU: TTIR of plain kernels, TTGIR of Gluon's (:mod:`.ttgir`).
- ``ptx``: the compiler's PTX, executed on a CPU behind triton's own launcher (:mod:`.soft_gpu`).
- ``gpu``: a real one, where torch sees one.
- ``compiler``: none; kernels are compiled, and not run (:mod:`tests.compile_only` chooses it).

``FASTATTN_MACHINE=ttgir`` or ``ptx`` chooses. It is read when the tests' ``conftest.py`` is imported, before triton is,
which decides at its own import whether it interprets. docs/proof.md says what each machine cannot see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Generator

import torch

VARIABLE = "FASTATTN_MACHINE"
ON_A_CPU = ("ttgir", "ptx")


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _chosen() -> str:
    asked = os.environ.get(VARIABLE, "")
    if asked == "compiler":
        return asked
    if not asked:
        return "gpu" if torch.cuda.is_available() and not _interprets() else "interpreter"
    if asked not in ON_A_CPU:
        raise ValueError(f"{VARIABLE}={asked}: it takes {', '.join(ON_A_CPU)}, or nothing at all")
    if _interprets():
        raise ValueError(f"{VARIABLE}={asked} executes compiled kernels: TRITON_INTERPRET has to be unset or 0")
    return asked


NAME = _chosen()
INTERPRETING = NAME == "interpreter"
EXECUTING = NAME in ON_A_CPU  # compiled kernels for cuda:90, on tensors of the CPU
DEVICE = torch.device("cuda" if NAME == "gpu" else "cpu")
# Gluon has no interpreter, and its kernels here are Hopper's.
RUNS_GLUON = EXECUTING or (NAME == "gpu" and torch.cuda.get_device_capability()[0] == 9)
NO_GLUON = f"Gluon kernels run on sm_90, or by {VARIABLE}=ttgir or ptx: not on {NAME}"

if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"
elif EXECUTING or NAME == "compiler":
    # a module of the tests that asks for the interpreter by default must not switch it on later
    os.environ["TRITON_INTERPRET"] = "0"


def install() -> None:
    """Make the package's launchers launch on the chosen machine. Once, before the first launch."""
    if not INTERPRETING:  # the tests' problems are small, and are to reach Gluon's kernels all the same
        from fastattn_kernels.attention import choice

        choice.fewest_operations = 0
    if INTERPRETING and importlib.util.find_spec("triton"):
        from tests.machines import products

        products.install()
    if not EXECUTING:
        return
    from fastattn.ops.common import backends
    from fastattn_kernels.common import plans

    backends.DEVICES = ("cpu",)
    backends.WHERE = f"Triton kernels executed as {NAME}"  # pyrefly: ignore[bad-assignment]  # it is no literal
    plans.HAND_OVER_ADDRESSES = False  # a machine maps the memory of the tensors that it is handed
    if NAME == "ttgir":
        from tests.machines.ttgir import launcher
    else:
        from tests.machines.soft_gpu import launcher
    launcher.install()


# ------------------------------------------------------------------------------------------------------------- orders

_order = 0


@contextlib.contextmanager
def order_of_events(seed: int) -> Generator[None]:
    """What a machine is free to choose (who goes first, when a copy lands), it draws from ``seed`` meanwhile."""
    global _order
    before, _order = _order, seed
    try:
        yield
    finally:
        _order = before


def order() -> int:
    """The seed of :func:`order_of_events`; 0 outside."""
    return _order
