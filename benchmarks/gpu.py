"""``python -m benchmarks.gpu --out DIR``: numerical parity, then the matrix of cases, on a GPU within nine minutes.

Installs nothing. Every case is written to ``DIR/benchmarks.json`` as soon as it is done, so that a kill keeps the rest;
the parity tests' error table lies in ``DIR/parity.json``. Exit status: 2 without a GPU (nothing is written), 1 where a
test failed or this package was wrong, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.cases import AttentionCase, Case, Kind, Mask, NormCase
from benchmarks.ceilings import ceilings, describe
from benchmarks.environment import environment
from benchmarks.norm import of_elements
from benchmarks.registry import families
from benchmarks.report import print_table, write_json
from benchmarks.runner import Row, run_case

TOTAL_SECONDS = 540.0
PARITY_SECONDS = 240.0
CASE_SECONDS = 45.0  # a case that takes longer than this hangs
_TOKENS, _WIDTH = 16384, 2048
_NORM_ELEMENTS = 1 << 27  # 256 MiB a tensor in 16 bits: five times an L2

# Which variants a case is worth: compiling FlexAttention takes longer than everything else of a case.
_FAST = ("fastattn", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn")
_FAST_NORMS = ("fastattn", "eager", "liger", "quack")


def matrix() -> list[tuple[Case, tuple[str, ...]]]:
    """Cases and their variants, the most telling first: what the time does not reach is the least missed."""
    cases: dict[Case, tuple[str, ...]] = {}

    def add(
        seqlen: int, head_dim: int, mask: Mask, *names: str, dtype: torch.dtype = torch.bfloat16, weights: bool = False
    ) -> None:
        batch = 2 if weights else max(1, _TOKENS // seqlen)  # the truth of averaged weights takes every head's scores
        for backward in (False, True):
            heads = _WIDTH // head_dim
            options = {"mask": mask, "weights": weights, "dtype": dtype, "backward": backward, "device": "cuda"}
            cases.setdefault(AttentionCase("attention", batch, heads, seqlen, head_dim, **options), names)

    def add_norms(size: int, *more: str, kinds: Sequence[Kind] = get_args(Kind), **options: Any) -> None:
        options = {"dtype": torch.bfloat16, "device": "cuda", **options}
        for kind in kinds:
            for backward in (False, True):
                case = of_elements(_NORM_ELEMENTS, kind, size, backward=backward, **options)
                cases[case] = (*_FAST_NORMS, *more)

    add(1024, 64, "causal", *_FAST, "sdpa-math", "flex")
    for head_dim in (128, 64):
        add(4096, head_dim, "none", *_FAST)
        add(4096, head_dim, "causal", *_FAST)
    for size in (4096, 16384):
        add_norms(size, "compile")
    for size in (1024, 8192):
        add_norms(size)
    for seqlen in (16384, 1024):
        for head_dim in (128, 64):
            add(seqlen, head_dim, "none", *_FAST)
            add(seqlen, head_dim, "causal", *_FAST)
    add(2048, 64, "none", "fastattn", "naive", weights=True)
    for backward in (False, True):
        options = {"dtype": torch.bfloat16, "backward": backward, "device": "cuda"}
        module = AttentionCase("module", 4, 16, 2048, 64, weights=True, **options)
        cases[module] = ("fastattn", "nn.MultiheadAttention")
        cases[AttentionCase("layer", 4, 16, 2048, 64, **options)] = ("fastattn", "nn.TransformerEncoderLayer")
    for size in (512, 2048, 256, 65536, 64, 32768, 262144, 4097):
        add_norms(size)
    add_norms(4096, kinds=["layer"], dtype=torch.float32)
    add_norms(4096, kinds=["layer"], wide_residual=True)
    add_norms(4096, kinds=["layer"], dropout_p=0.1)
    masks: tuple[Mask, ...] = ("padding", "documents", "sparse", "bias", "window", "boolean", "alibi", "softcap")
    for mask in masks:
        add(4096, 128, mask, *_FAST, "flex")
    add(4096, 256, "causal", *_FAST)
    add(4096, 128, "none", *_FAST, dtype=torch.float16)
    add(4096, 64, "causal", *_FAST, dtype=torch.float16)
    for seqlen in (512, 2048, 8192):
        for head_dim in (128, 64):
            add(seqlen, head_dim, "none", *_FAST)
            add(seqlen, head_dim, "causal", *_FAST)
    return list(cases.items())


def dry_matrix() -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Tiny cases on the CPU, for trying the path without a GPU."""
    for weights in (False, True):
        case = AttentionCase("attention", 1, 1, 16, 16, backward=True, mask="causal", weights=weights)
        yield case, ("fastattn", "naive", "sdpa")
    for backward in (False, True):
        yield NormCase("norm", "layer", 4, 16, backward=backward), _FAST_NORMS


def run_parity(out: Path, seconds: float) -> dict[str, Any]:
    """The parity tests in a process of their own; what became of them."""
    root = Path(__file__).parent.parent
    # torch's own backend has nothing to prove here. The kernels take all of the time, most of it compilation: what
    # has not begun in time is skipped, so that the table of the rest is written.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "parity",
        "-k",
        "triton",
        "tests/ops/test_norm_parity.py",
        "tests/ops",
    ]
    command += ["--budget", str(max(10.0, seconds - 45.0))]
    command += ["--error-table-json", str((out / "parity.json").resolve())]
    try:
        import xdist  # type: ignore[import-untyped]  # noqa: F401

        command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal"]
    except ImportError:
        pass
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    log = out / "parity.log"
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                command,
                cwd=root,
                env={**os.environ, "PYTHONPATH": path},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
            verdict = "passed" if status == 0 else f"failed (pytest's exit status {status})"
        except subprocess.TimeoutExpired:
            verdict = f"not done after {seconds:.0f} s"
    last = (log.read_text(errors="replace").strip().split("\n") or [""])[-1]
    return {"verdict": verdict, "last_line": last, "seconds": round(time.monotonic() - started, 1)}


class Watchdog:
    """Ends the process when a case hangs: a kernel that never returns can be stopped in no other way."""

    def __init__(self, on_bite: Any) -> None:
        self._events: queue.Queue[tuple[str, float] | None] = queue.Queue()
        self._on_bite = on_bite
        threading.Thread(target=self._watch, daemon=True).start()

    def expect(self, name: str, seconds: float) -> None:
        """The next sign of life must come within ``seconds``."""
        self._events.put((name, seconds))

    def stop(self) -> None:
        self._events.put(None)

    def _watch(self) -> None:
        event = self._events.get()
        while event is not None:
            name, seconds = event
            try:
                event = self._events.get(timeout=seconds)
            except queue.Empty:
                self._on_bite(name, seconds)
                os._exit(1)


def run_matrix(
    cases: list[tuple[Case, tuple[str, ...]]], out: Path, *, end: float, facts: dict[str, Any], seconds: float
) -> list[Row]:
    """Run the cases until the time is up, writing the file after each."""
    known, rows, skipped = families(), [], []
    target = out / "benchmarks.json"
    limits = ceilings(case for case, _ in cases)
    if limits:
        print(describe(limits), flush=True)

    def save(**more: Any) -> None:
        write_json(target, rows, facts, skipped=skipped, ceilings=limits, **more)

    watchdog = Watchdog(lambda name, after: save(hung=f"{name} gave no sign of life for {after:.0f} s"))
    for index, (case, names) in enumerate(cases):
        if time.monotonic() > end - 15:
            skipped += [case.name for case, _ in cases[index:]]
            print(f"time is up: {len(cases) - index} cases left out", flush=True)
            break
        family = known[case.family]
        allowed = CASE_SECONDS * (2 if any(family.variant(name).slow for name in names) else 1)
        watchdog.expect(case.name, min(allowed, end + 10 - time.monotonic()))
        done = run_case(family, case, seconds=seconds, copy_rate=limits.get("copy_tb_per_s"), only=names.__contains__)
        rows += done
        for row in done:
            print(_line(row), flush=True)
        save()
    watchdog.stop()
    save()
    return rows


def _line(row: Row) -> str:
    if row.timing is None:
        return f"{row.case.name}  {row.variant}  {row.status}: {row.reason}"
    rate = "" if row.tflops is None else f"  {row.tflops:.0f} TF/s"
    if row.tb_per_s is not None and row.of_floor is not None:
        rate = f"  {row.tb_per_s:.3g} TB/s, {row.of_floor:.2f} of the floor"
    error = "" if row.accuracy is None else f"  error {row.accuracy.error:.1e} of {row.accuracy.budget:.1e}"
    return f"{row.case.name}  {row.variant}  {row.timing.wall_ms.median:.3f} ms{rate}{error}"


def summary(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line a case: this package beside the fastest of the others."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.case.name for row in rows):
        of_case = [row for row in rows if row.case.name == name]
        ours = next((row for row in of_case if row.variant == "fastattn"), None)
        if ours is None:
            continue
        timed = [row for row in of_case if row.timing is not None and row is not ours]
        best = min(timed, key=lambda row: row.timing.wall_ms.median if row.timing else 0.0, default=None)
        if ours.timing is None:
            lines.append((name, f"{ours.status}: {ours.reason}"[:60], *("",) * 7))
            continue
        mine, beside, ratio = ours.timing.wall_ms.median, "", ""
        if best is not None and best.timing is not None:
            beside = f"{best.variant} {best.timing.wall_ms.median:.3f}"
            ratio = f"{mine / best.timing.wall_ms.median:.2f}"
        peaks = [row.peak_mib for row in (ours, best) if row is not None and row.peak_mib is not None]
        rates = (
            "" if ours.tflops is None else f"{ours.tflops:.0f}",
            "" if ours.tb_per_s is None else f"{ours.tb_per_s:.3g}",
            "" if ours.of_floor is None else f"{ours.of_floor:.2f}",
        )
        error = "" if ours.accuracy is None else f"{ours.accuracy.error:.1e}"
        memory = " / ".join(f"{peak:.0f}" for peak in peaks)
        lines.append((name, f"{mine:.3f}", *rates, beside, ratio, memory, error))
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Parity and speed on a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON files go")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU, no parity tests")
    parser.add_argument("--no-parity", action="store_true", help="go straight to the benchmarks")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device; nothing was run", file=sys.stderr)
        return 2

    facts = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(facts), flush=True)
    parity = None
    if not options.dry_run and not options.no_parity:
        parity = run_parity(options.out, PARITY_SECONDS)
        print(f"parity {parity['verdict']} in {parity['seconds']} s: {parity['last_line']}", flush=True)
        facts["parity"] = parity
    cases = [c for c in (dry_matrix() if options.dry_run else matrix()) if options.only in c[0].name]
    rows = run_matrix(cases, options.out, end=started + TOTAL_SECONDS, facts=facts, seconds=0.25)
    header = ("case", "ours ms", "TF/s", "TB/s", "of floor", "best other", "ratio", "MiB ours / other", "error")
    print_table("fastattn beside the fastest of the others", header, summary(rows))
    if parity is not None:
        print(f"parity: {parity['verdict']}: {parity['last_line']}")
    ours_failed = any(row.variant == "fastattn" and row.status != "ok" for row in rows)
    parity_failed = parity is not None and parity["verdict"] != "passed"
    return 1 if ours_failed or parity_failed else 0


if __name__ == "__main__":
    sys.exit(main())
