"""``python -m benchmarks.gpu --out DIR``: numerical parity, then the matrix of cases, on a GPU within nine minutes.

Installs nothing. The matrix is ``python -m benchmarks --device cuda`` in a process of its own: where a kernel hangs, it
ends, and another process goes on behind it. ``DIR/run.json`` holds every case as soon as it is done, so that a kill
keeps the rest; the parity tests' error table lies in ``DIR/parity.json``. Exit status: 2 without a GPU (nothing is
written), 1 where a test failed or this package was wrong, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.document import read_run, write_run
from benchmarks.reporting.tables import summary
from benchmarks.reporting.text import show
from benchmarks.run import HUNG

TOTAL_SECONDS = 540.0
PARITY_SECONDS = 240.0
CASE_SECONDS = 45.0  # a variant that takes longer than this hangs

_ROOT = Path(__file__).parent.parent
# A small case for trying the path without a GPU.
_DRY = ["--device", "cpu", "--quick", "--only", "attention-b2-h4-l64-d32-eval", "--seconds", "0.01"]


def _environ() -> dict[str, str]:
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run_parity(out: Path, seconds: float) -> dict[str, Any]:
    """The parity tests in a process of their own; what became of them."""
    # torch's own backend has nothing to prove here. The kernels take all of the time, most of it compilation: what
    # has not begun in time is skipped, so that the table of the rest is written.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "parity", "-k", "triton"]
    command += ["tests/ops/test_norm_parity.py", "tests/ops", "--budget", str(max(10.0, seconds - 45.0))]
    command += ["--error-table-json", str((out / "parity.json").resolve())]
    try:
        import xdist  # type: ignore[import-untyped]  # noqa: F401

        command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal"]
    except ImportError:
        pass
    started, log = time.monotonic(), out / "parity.log"
    with log.open("w") as stream:
        status = _run(command, seconds, stdout=stream, stderr=subprocess.STDOUT)
    if status is None:
        verdict = f"not done after {seconds:.0f} s"
    else:
        verdict = "passed" if status == 0 else f"failed (pytest's exit status {status})"
    last = (log.read_text(errors="replace").strip().split("\n") or [""])[-1]
    return {"verdict": verdict, "last_line": last, "seconds": round(time.monotonic() - started, 1)}


def _run(command: list[str], seconds: float, **streams: Any) -> int | None:
    """A process's exit status; None: it took longer, and was ended with all that it had begun.

    A worker that hangs would keep its hold on the GPU while others are timed.
    """
    process = subprocess.Popen(command, cwd=_ROOT, env=_environ(), start_new_session=True, **streams)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:  # it has a session of its own: pass it on, for what is done to be written
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def supervise(command: list[str], *, end: float) -> int:
    """Run the command, and again with ``--resume`` as long as it ends because the GPU gave no answer.

    Args:
        command: whose last process's exit status is returned; it is told its ``--budget``.
        end: on the monotonic clock, when to give up.
    """
    more: list[str] = []
    while (left := end - time.monotonic()) > 0:
        # The run keeps its budget itself; a process that outlives it by this much is beyond help
        status = _run([*command, "--budget", f"{max(left, 1.0):.0f}", *more], left + 30.0)
        if status != HUNG:
            return HUNG if status is None else status
        more = ["--resume"]
    return HUNG


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Parity and speed on a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--dry-run", action="store_true", help="a small case on the CPU, no parity tests")
    parser.add_argument("--no-parity", action="store_true", help="go straight to the benchmarks")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device; nothing was run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    parity = None
    if not options.dry_run and not options.no_parity:
        parity = run_parity(options.out, PARITY_SECONDS)
        print(f"parity {parity['verdict']} in {parity['seconds']} s: {parity['last_line']}", flush=True)

    run = options.out / "run.json"
    run.unlink(missing_ok=True)  # of an earlier time: what is shown below is of this one
    chosen = _DRY if options.dry_run else ["--device", "cuda", "--only", options.only, "--timeout", str(CASE_SECONDS)]
    command = [sys.executable, "-m", "benchmarks", *chosen, "--out", str(options.out.resolve())]
    status = supervise(command, end=started + TOTAL_SECONDS)
    if not run.exists():
        print(f"the benchmarks wrote nothing: exit status {status}", file=sys.stderr)
        return 1
    document = read_run(run)
    show(summary(document))
    if parity is not None:
        write_run(run, document | {"parity": parity})
        print(f"parity: {parity['verdict']}: {parity['last_line']}")
    return 1 if status or (parity is not None and parity["verdict"] != "passed") else 0


if __name__ == "__main__":
    sys.exit(main())
