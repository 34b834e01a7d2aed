"""``python -m benchmarks.gpu --out DIR``: first launches, numerical parity, then the matrix of cases, on a GPU within
nine minutes; with ``--sweep`` every configuration of our kernels instead of parity and matrix.

Installs nothing. Each part has its budget, and writes its file as it grows, so that a kill keeps the rest:

1. ``DIR/first_launches.json``: every kernel of ours once, on small problems, side by side, each under a watchdog. They
   are first, since a hang in the parity tests would take the tests' whole time along.
2. ``DIR/parity.json``: the parity tests' error table, by the public functions. Where a Hopper kernel that the package
   would pick hung before, they run in plain Triton.
3. ``DIR/run.json``: the matrix, ``python -m benchmarks --device cuda`` in a process of its own, without what failed
   before; where a kernel hangs, the process ends, and another goes on behind it.

Exit status: 2 without a GPU (nothing is written), 1 where a test failed or this package was wrong, else 0.
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

from benchmarks import first_launches
from benchmarks.plan import Settings, entries
from benchmarks.reporting.document import read_run, write_run
from benchmarks.reporting.kernels import kernel_findings, kernel_tables
from benchmarks.reporting.tables import summary
from benchmarks.reporting.text import show
from benchmarks.run import HUNG

TOTAL_SECONDS = 540.0
LAUNCH_SECONDS = 140.0
SWEPT_LAUNCH_SECONDS = 220.0
PARITY_SECONDS = 120.0
CASE_SECONDS = 45.0  # a variant that takes longer than this hangs

_ROOT = Path(__file__).parent.parent
# What it takes to try the path without a GPU: tiny cases, which the kernels themselves refuse.
_DRY = ["--device", "cpu", "--quick", "--sweep", "--seconds", "0.01"]
_PLAIN = {"FASTATTN_KERNELS": "triton"}


def _environ(more: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def run_first_launches(settings: Settings, out: Path, seconds: float) -> dict[str, Any]:
    """The first launches of what the run is to time; what became of them is printed, too."""
    tasks = first_launches.tasks_of(entries(settings))
    document = first_launches.carry_out(tasks, out / first_launches.FILE, budget=seconds)
    for sentence in first_launches.sentences(document):
        print(sentence, flush=True)
    return document


def run_parity(out: Path, seconds: float, environ: dict[str, str]) -> dict[str, Any]:
    """The parity tests in a process of their own, with these variables; what became of them."""
    # torch's own backend has nothing to prove here. The kernels take all of the time, most of it compilation: what
    # has not begun in time is skipped, so that the table of the rest is written.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "parity", "-k", "triton or gluon"]
    command += ["tests/ops/test_norm_parity.py", "tests/ops", "--budget", str(max(10.0, seconds - 45.0))]
    command += ["--error-table-json", str((out / "parity.json").resolve())]
    try:
        import xdist  # type: ignore[import-untyped]  # noqa: F401

        command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal"]
    except ImportError:
        pass
    started, log = time.monotonic(), out / "parity.log"
    with log.open("w") as stream:
        status = _run(command, seconds, environ, stdout=stream, stderr=subprocess.STDOUT)
    if status is None:
        verdict = f"not done after {seconds:.0f} s"
    else:
        verdict = "passed" if status == 0 else f"failed (pytest's exit status {status})"
    last = (log.read_text(errors="replace").strip().split("\n") or [""])[-1]
    facts = {"verdict": verdict, "last_line": last, "seconds": round(time.monotonic() - started, 1), **environ}
    print(f"parity {verdict} in {facts['seconds']} s: {last}", flush=True)
    return facts


def _run(command: list[str], seconds: float, environ: dict[str, str] | None = None, **streams: Any) -> int | None:
    """A process's exit status; None: it took longer, and was ended with all that it had begun.

    A worker that hangs would keep its hold on the GPU while others are timed.
    """
    process = subprocess.Popen(command, cwd=_ROOT, env=_environ(environ or {}), start_new_session=True, **streams)
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
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU, no parity tests")
    parser.add_argument("--no-parity", action="store_true", help="no parity tests")
    parser.add_argument("--sweep", action="store_true", help="every configuration of our kernels, into DIR/sweep")
    parser.add_argument("--only", metavar="TEXT", default="", help="a family, or cases whose name contains TEXT")
    options = parser.parse_args(arguments)
    end = time.monotonic() + TOTAL_SECONDS
    if not options.dry_run and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device; nothing was run", file=sys.stderr)
        return 2
    out = (options.out / "sweep" if options.sweep else options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run, launched = out / "run.json", out / first_launches.FILE
    for path in (run, launched):  # of an earlier time: what is shown below is of this one
        path.unlink(missing_ok=True)

    settings = Settings(quick=False, device="cuda", only=options.only, sweep=options.sweep)
    if options.dry_run:
        settings = Settings(quick=True, sweep=True)
    launches = run_first_launches(settings, out, SWEPT_LAUNCH_SECONDS if options.sweep else LAUNCH_SECONDS)
    parity = None
    if not (options.dry_run or options.no_parity or options.sweep):
        parity = run_parity(out, PARITY_SECONDS, _PLAIN if first_launches.hangs(launches) else {})

    chosen = ["--device", "cuda", "--only", options.only, "--timeout", str(CASE_SECONDS)]
    chosen = _DRY if options.dry_run else [*chosen, *(["--sweep"] if options.sweep else [])]
    command = [sys.executable, "-m", "benchmarks", *chosen, "--launched", str(launched), "--out", str(out)]
    status = supervise(command, end=end)
    if not run.exists():
        print(f"the benchmarks wrote nothing: exit status {status}", file=sys.stderr)
        return 1
    document = read_run(run) | {"first_launches": launches} | ({} if parity is None else {"parity": parity})
    write_run(run, document)
    _print(document)
    return 1 if status or (parity is not None and parity["verdict"] != "passed") else 0


def _print(document: dict[str, Any]) -> None:
    """What a run has to say, the most telling last."""
    show(summary(document))
    print()
    for sentence in first_launches.sentences(document["first_launches"]):
        print(sentence)
    if parity := document.get("parity"):
        print(f"parity: {parity['verdict']}: {parity['last_line']}")
    for table in kernel_tables(document):
        show(table)
    for sentence in kernel_findings(document):
        print(sentence)


if __name__ == "__main__":
    sys.exit(main())
