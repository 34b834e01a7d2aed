"""What NVIDIA's tools say of our kernels: ncu, in a line for each, and compute-sanitizer, of those that were wrong."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Run = Callable[[list[str], float, Path], int | None]  # a command, its seconds, and where its output goes

SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_SECONDS = 60.0  # of one look
_LEAST_SECONDS = 10.0  # that must be left for another to be begun
FAULTY = 9  # compute-sanitizer's exit status where it found something
_STALLS = 3  # how many of the reasons to wait are worth a line

# What is profiled: the kernels of each kind, the most telling first, by key of benchmarks.gpu.one.
PROFILED = (
    "fastattn-gluon: kernels-b2-h16-l8192-d128-forward-bfloat16",
    "fastattn-gluon-pair: kernels-b2-h16-l8192-d128-backward-bfloat16",
    "fastattn-gluon-one-pass: kernels-b2-h16-l8192-d128-backward-bfloat16",
    "sdpa-cudnn: kernels-b2-h16-l8192-d128-forward-bfloat16",
    "sdpa-cudnn: kernels-b2-h16-l8192-d128-backward-bfloat16",
    "fastattn-gluon: kernels-b2-h16-l8192-d128-forward-causal-bfloat16",
    "fastattn-gluon: kernels-b2-h32-l8192-d64-forward-bfloat16",
    "fastattn-gluon: kernels-b2-h16-l8192-d128-forward-bias-bfloat16",
    "fastattn-triton: kernels-b2-h16-l8192-d128-forward-bfloat16",
    "fastattn-triton-pair: kernels-b2-h16-l8192-d128-backward-bfloat16",
    "fastattn: norm-layer-m32768-n4096-forward-bfloat16",
    "fastattn: norm-layer-m32768-n4096-backward-bfloat16",
    "fastattn: norm-rms-m8192-n16384-backward-bfloat16",
)  # fmt: skip

# The columns of a line, by what the names of ncu's metrics look like; the largest of several counts.
_COLUMNS = {
    "us": re.compile(r"gpu__time_duration\.sum"),
    "tensor pipe %": re.compile(r"sm__(inst_executed_)?pipe_tensor.*pct_of_peak_sustained_active"),
    "shared memory %": re.compile(r"l1tex__data_(pipe|bank).*pct_of_peak_sustained_elapsed|l1tex__throughput.*pct.*"),
    "L2 %": re.compile(r"lts__throughput.*pct.*"),
    "memory %": re.compile(r"(gpu__dram_throughput|dram__throughput).*pct.*"),
    "warps active %": re.compile(r"sm__warps_active\.avg\.pct_of_peak_sustained_active"),
}
_TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
_STALL = re.compile(
    r"smsp__average_warps?_?(?:latency_)?_?issue_stalled_((?!\w*_not_issued)\w+?)(?:_per_issue_active)?\.ratio"
)


# ----------------------------------------------------------------------------------------------------------------- ncu


def profile(python: str, keys: Iterable[str], seconds: float, table: Path, run: Run) -> list[Row]:
    """Profile the steps in one process; a line for each kernel that they launch, empty where ncu wrote nothing.

    Args:
        python: the interpreter.
        keys: of :mod:`benchmarks.gpu.one`.
        seconds: for all of them.
        table: the file that gets every figure, as ncu's CSV.
        run: starts a process.
    """
    options = ["--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    said = table.with_suffix(".part")
    command = ["ncu", *options, "--log-file", str(said), python, "-m", "benchmarks.gpu.one", *keys]
    run(command, seconds, table.with_suffix(".log"))
    if not said.exists():
        return []
    said.replace(table)
    return ncu_rows(table.read_text(errors="replace"))


def ncu_rows(text: str) -> list[Row]:
    """A row for each kernel of ``ncu --csv --page raw``: its name, the columns above, and why its warps wait."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, *rest = csv.reader(lines[start:])
    units, *rows = rest or [[]]
    return [_line(dict(zip(header, row)), dict(zip(header, units))) for row in rows if len(row) == len(header)]


def _line(row: dict[str, str], units: dict[str, str]) -> Row:
    line: Row = {"kernel": row.get("Kernel Name", ""), "grid": row.get("Grid Size", "")}
    for column, pattern in _COLUMNS.items():
        values = [
            value * (_TO_MICROSECONDS.get(units.get(name, ""), 1.0) if column == "us" else 1.0)
            for name, text in row.items()
            if pattern.fullmatch(name) and (value := _number(text)) is not None
        ]
        line[column] = max(values, default=None)
    stalls = {match[1]: value for name, text in row.items()
              if (match := _STALL.fullmatch(name)) and (value := _number(text)) is not None}  # fmt: skip
    line["stalls"] = dict(sorted(stalls.items(), key=lambda pair: -pair[1])[:_STALLS])
    return line


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def ncu_sentences(rows: list[Row]) -> list[str]:
    """A sentence a kernel."""
    said = []
    for row in rows:
        figures = [f"{name} {row[name]:.1f}" for name in _COLUMNS if row[name] is not None]
        waits = ", ".join(f"{name} {value:.2f}" for name, value in row["stalls"].items())
        said.append(f"ncu: {row['kernel'][:60]}: {', '.join(figures)}" + (f"; waits: {waits}" if waits else ""))
    return said


# --------------------------------------------------------------------------------------------------- compute-sanitizer


def sanitize(commands: dict[str, list[str]], log: Path, run: Run, left: Callable[[], float]) -> list[Row]:
    """What compute-sanitizer says of each command, one of its tools after another.

    Args:
        commands: by name; what failed before.
        log: where their output goes.
        run: starts a process.
        left: how many seconds there are.
    """
    rows: list[Row] = []
    for tool in SANITIZERS:
        for name, command in commands.items():
            if left() < _LEAST_SECONDS:
                rows.append({"what": name, "tool": tool, "verdict": "no time left", "said": []})
                continue
            options = ["--tool", tool, "--error-exitcode", str(FAULTY), "--print-limit", "20"]
            # every tensor has an allocation of its own, so that what lies beyond it is nobody's
            program = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer"]
            limit = min(SANITIZER_SECONDS, left())
            status = run([*program, *options, *command], limit, log)
            verdict = {0: "nothing found", FAULTY: "faults found", None: f"not done in {limit:.0f} s"}
            said = log.read_text(errors="replace").splitlines() if log.exists() else []
            said = [line for line in said if line.startswith("=========")][:20]
            rows.append(
                {"what": name, "tool": tool, "verdict": verdict.get(status, f"ended with {status}"), "said": said}
            )
    return rows


def sanitizer_sentences(rows: list[Row]) -> list[str]:
    """A sentence for each look, with the first thing that was said."""
    said = []
    for row in rows:
        first = next((line.strip("= ") for line in row["said"] if "COMPUTE-SANITIZER" not in line), "")
        said.append(f"{row['tool']}: {row['what']}: {row['verdict']}" + (f": {first}" if first else ""))
    return said
