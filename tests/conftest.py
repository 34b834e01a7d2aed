"""Devices, seeds, the error table, the feature pairs that were met. Imported before any test, triton and fastattn."""

import contextlib
import gc
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for every core: more threads would only fight
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest
import torch

assert "triton" not in sys.modules, "the machine has to be chosen before triton is imported"

from tests import machines  # noqa: E402  # chooses, and so comes before fastattn

# isort: split
from fastattn import testing  # noqa: E402
from tests import pairwise  # noqa: E402
from tests.machines import INTERPRETING  # noqa: E402
from tests.poison import poisoned_memory  # noqa: E402

machines.install()
WORKER = "PYTEST_XDIST_WORKER" in os.environ

if WORKER:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ options


def pytest_addoption(parser):
    group = parser.getgroup("fastattn")
    group.addoption("--seed", type=int, default=0, help="of the random samples; `make fuzz` draws others")
    group.addoption("--error-table", action="store_true", help="end with errors against float64, ours beside eager's")
    group.addoption("--error-table-json", metavar="FILE", help="write the error table to FILE")
    group.addoption("--every", type=int, default=1, metavar="N", help="run each N-th test only: a slice through all")
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip what has not begun by then")


def pytest_configure(config):
    config.seed = config.workerinput["fastattn_seed"] if WORKER else config.getoption("--seed")
    config.deadline = time.monotonic() + (config.getoption("--budget") or math.inf)
    config.error_recording = contextlib.ExitStack()
    config.error_records = config.error_recording.enter_context(testing.record_errors())


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    chosen = items[:: config.getoption("--every")]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % config.getoption("--every")])
        items[:] = chosen


def pytest_collection_finish():
    """What was imported stays: no collection of garbage looks at it again, of which some tests ask for many."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.deadline:
        pytest.skip("the time given with --budget is spent")


def pytest_unconfigure(config):
    config.error_recording.close()


def pytest_report_header(config):
    where = torch.cuda.get_device_name() if machines.NAME == "gpu" else "cpu"
    return f"fastattn: seed {config.seed} (--seed {config.seed} repeats it), device {where}, machine {machines.NAME}"


# ---------------------------------------------------------------------- the error table and feature pairs, by xdist


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["fastattn_seed"] = node.config.seed


def pytest_sessionfinish(session):
    if WORKER:
        session.config.workeroutput["fastattn_errors"] = [tuple(record) for record in session.config.error_records]
        session.config.workeroutput["fastattn_met"] = pairwise.met


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if not error:
        records = node.workeroutput.get("fastattn_errors", [])
        node.config.error_records.extend(testing.ErrorRecord(*record) for record in records)
        pairwise.met.extend(node.workeroutput.get("fastattn_met", []))


def pytest_terminal_summary(terminalreporter, config):
    records = config.error_records
    terminalreporter.write_line(f"seed {config.seed}")
    if pairwise.met and not WORKER:
        from tests.ops import attention_cases, norm_cases

        axes = {"attention": attention_cases.AXES, "norm": norm_cases.AXES}
        for key in sorted({(operation, backend) for operation, backend, _ in pairwise.met}):
            operation, backend = key
            sentence = pairwise.coverage(axes[operation], (case for *of, case in pairwise.met if tuple(of) == key))
            terminalreporter.write_line(f"feature pairs of {operation} on {backend}: {sentence}")
    if config.getoption("--error-table"):
        terminalreporter.section("errors against float64")
        terminalreporter.write_line(testing.error_table(records))
    if path := config.getoption("--error-table-json"):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        document = {
            "device": device,
            "interpreted": INTERPRETING,
            "torch": torch.__version__,
            "seed": config.seed,
            "passed": len(terminalreporter.stats.get("passed", [])),
            "skipped": len(terminalreporter.stats.get("skipped", [])),
            "failed": len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", [])),
            "rows": testing.error_rows(records),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(document, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def device():
    """Where the tensors of a test lie: the GPU where there is one."""
    return machines.DEVICE


@pytest.fixture(params=["triton"] if machines.EXECUTING else ["torch", "triton"])
def backend(request):
    """Every backend by name, that the machine has anything to do with."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def seed(request):
    """A number for the test's random inputs: its own, and the same in every run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def poisoned():
    """Every buffer that Python code allocates uninitialised starts as NaN, so that an unwritten element shows."""
    with poisoned_memory():
        yield
