"""What a call does, part after part; each has a time by which it is over, and leaves its share in a file at once.

Nothing here touches the GPU itself: every part that does is a child under a guard, or a worker of a pool that ends
those that hang. The files in the call's folder, of which the first two are made anew after each part:

- ``answer.txt``: is it right, is it faster than cuDNN, and everything else in sentences.
- ``call.json``: versions, cache, parity, profiles and faults, as plain values.
- ``run.json``: what was timed, as of ``python -m benchmarks``; it grows case by case.
- ``first_launches.json``: what became of each kernel's first launches; it grows launch by launch.
- ``log.txt``: what the children said.
- of call 1 ``cache.tar.xz``, kernels that were compiled there; of call 2 ``ncu.csv``, every figure that ncu took.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import answer, cache, children, first_launches, tools
from benchmarks.gpu.options import ROOT, Options
from benchmarks.jobs import HUNG
from benchmarks.reporting.document import read_run, write_run
from benchmarks.selection import Settings, entries

# Seconds after a call's begin by which a part is over; what ends earlier leaves its time to the next.
VERSIONS_BY = 45.0
LAUNCHES_BY = {"1": 150.0, "2": 110.0, "sweep": 230.0}
QUESTION_BY, PARITY_BY = 205.0, 252.0  # of call 1
FAULTS_BY, TIMINGS_BY, PROFILE_BY, REST_BY = 220.0, 305.0, 370.0, 385.0  # of call 2
SWEEP_BY = 525.0

_WATCH_SECONDS = {"1": 20.0, "2": 30.0, "sweep": 45.0}  # a variant that takes longer than this hangs
_SLOWEST_TEST = 35.0  # seconds that a parity test may take once it is begun, and pytest to start
_WAKING_SECONDS = 15.0  # of a process, until it has begun with what its budget is for
_SANITIZED = 6  # faults that are looked into, of each kind; each costs every tool up to a minute
_MOST_BYTES = 15 << 20  # of a file that is to be brought back
PARITY_OPTIONS = ("-m", "parity or hopper", "-k", "triton or gluon or hopper")
PARITY_TESTS = (
    "tests/kernels/hopper/test_forward.py",
    "tests/kernels/hopper/test_backward.py",
    "tests/ops/test_attention_parity.py",
    "tests/ops/test_norm_parity.py",
    "tests/ops/test_additive_parity.py",
    "tests/ops/test_varlen_parity.py",
    "tests/ops/test_kvcache.py",
)
_FILES = ("answer.txt", "call.json", "run.json", first_launches.FILE, "log.txt", "cache.tar.xz", "ncu.csv")


class Call:
    """A call under way.

    Attributes:
        options: what was asked for.
        out: its folder.
        facts: what is written to ``call.json``.
        launched: the document of the first launches; empty where there were none.
    """

    def __init__(self, options: Options, begun: float, scratch: Path) -> None:
        self.options, self.out, self.scratch = options, options.out, scratch
        self._begun = begun
        self.facts: dict[str, Any] = {"call": options.call, "dry_run": options.dry_run, "parts": {}}
        self.launched: dict[str, Any] = {}
        self._cached: set[str] = set()

    def left(self, until: float) -> float:
        """Seconds, down to none, until so many are over since the call began."""
        return max(0.0, self._begun + until - time.monotonic())

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part; one that breaks down takes no other along. The answer is written anew."""
        started = time.monotonic()
        print(f"{started - self._begun:5.0f} s: {name}", flush=True)
        try:
            work()
            broken = None
        except Exception as error:
            broken = f"{type(error).__name__}: {error}"
        self.facts["parts"][name] = {"seconds": round(time.monotonic() - started, 1), "broke_down": broken}
        self.save()

    def save(self) -> None:
        if "cache" in self.facts:
            self.facts["cache"]["compiled_here"] = cache.count(self.scratch / "triton", self._compiled_here())
        write_run(self.out / "call.json", self.facts)
        document = self.document()
        (self.out / "answer.txt").write_text("\n".join(answer.lines(self.facts, self.launched, document)) + "\n")

    def document(self) -> dict[str, Any]:
        """What was timed; empty where nothing was yet."""
        path = self.out / "run.json"
        return read_run(path) if path.exists() else {}

    def child(self, command: list[str], seconds: float, log: Path | None = None) -> int | None:
        """A command's exit status; None: it took longer and was ended. What it says goes into the log."""
        with (log or self.out / "log.txt").open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            return children.run(command, max(1.0, seconds), cwd=ROOT, stdout=stream, stderr=stream)

    def unpack_cache(self) -> None:
        """Compiled kernels from the archive, and from what call 1 had to compile itself."""
        folder = self.scratch / "triton"
        os.environ["TRITON_CACHE_DIR"] = str(folder)
        archives = [self.options.archive, self.options.after and self.options.after / "cache.tar.xz"]
        found: list[dict[str, Any]] = []
        self.facts["cache"] = {"archives": found}
        try:
            for archive in archives:
                if archive is not None and archive.is_file():
                    manifest = cache.unpack(archive, folder)
                    said = cache.differences(self.facts["versions"]["compiler"], manifest)
                    found.append({"archive": archive.name, **manifest, "differs": said})
        finally:
            self._cached = cache.entries(folder)

    def launch_first(self) -> None:
        """Every kernel that is to be timed, once; of call 2 those of the whole matrix, too."""
        settings = Settings(quick=False, device="cuda", only=self.options.only, sweep=self.options.call == "sweep")
        if self.options.dry_run:
            settings = Settings(quick=True, sweep=True)
        tasks, path = first_launches.tasks_of(entries(settings)), self.out / first_launches.FILE
        self.launched = first_launches.carry_out(tasks, path, budget=self.left(LAUNCHES_BY[self.options.call]))

    def _compiled_here(self) -> set[str]:
        return cache.entries(self.scratch / "triton") - self._cached

    def pack_cache(self) -> str:
        """What was compiled here, for call 2, unless it is too large to be brought back; what became of it."""
        folder, archive = self.scratch / "triton", self.out / "cache.tar.xz"
        new = self._compiled_here()
        if not any(cache.count(folder, new).values()):
            return "nothing was compiled in this call"
        cache.pack(folder, archive, new, preset=1)
        if (size := archive.stat().st_size) > _MOST_BYTES:
            archive.unlink()
            return f"what was compiled is left out: {size} bytes, and {_MOST_BYTES} are brought back"
        return f"{archive}: what was compiled, for call 2"

    # --------------------------------------------------------------------------------------------------------- timings

    def time_cases(self, part: str, until: float, *, resume: bool = False) -> None:
        """A part of the matrix, or the sweep, in a process of its own; where a kernel hangs, another goes on behind."""
        seconds = _WATCH_SECONDS[self.options.call]
        chosen = ["--device", "cuda", "--only", self.options.only, "--timeout", str(seconds)]
        chosen += ["--sweep"] if self.options.call == "sweep" else ["--part", part]
        if self.options.dry_run:  # tiny cases, which the kernels themselves refuse
            chosen = ["--device", "cpu", "--quick", "--sweep", "--seconds", "0.01"]
        launched = self.out / first_launches.FILE
        if not launched.exists() and self.options.after is not None:
            launched = self.options.after / first_launches.FILE
        chosen += ["--launched", str(launched)] if launched.exists() else []
        command = [sys.executable, "-m", "benchmarks", *chosen, "--out", str(self.out), "--no-report"]
        status = supervise(command, lambda: self.left(until), self.child, resume=resume)
        self.facts["timings"] = {"status": status}

    # ---------------------------------------------------------------------------------------------------------- parity

    def run_parity(self, until: float) -> None:
        """The parity tests and the Hopper kernels' own; where what the package picks hung, in plain Triton."""
        if importlib.util.find_spec("pytest") is None:
            self.facts["parity"] = {"verdict": "not run: pytest is not installed"}
            return
        seconds, table, log = self.left(until), self.scratch / "parity.json", self.scratch / "parity.log"
        budget = 0.001 if self.options.dry_run else max(5.0, seconds - _SLOWEST_TEST)
        # torch's own backend has nothing to prove here. The kernels take all of the time, most of it compilation: what
        # has not begun in time is skipped, so that the table of the rest is written.
        command = [sys.executable, "-m", "pytest", "-v", *PARITY_OPTIONS, *PARITY_TESTS]
        command += ["--budget", f"{budget}", "--error-table-json", str(table)]
        if importlib.util.find_spec("xdist") is not None and not self.options.dry_run:
            command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal"]
        hung = bool(self.launched) and first_launches.hangs(self.launched)
        if hung:
            command = ["env", "FASTATTN_KERNELS=triton", *command, "--deselect", "tests/kernels/hopper"]
        status = self.child(command, seconds, log)
        said = log.read_text(errors="replace")
        with (self.out / "log.txt").open("a") as stream:
            stream.write(said)
        outcomes = parity_outcomes(said)
        counted = {kind: len(names) for kind, names in outcomes.items()}
        counted = json.loads(table.read_text()) if table.exists() else counted
        self.facts["parity"] = {
            "verdict": parity_verdict(status, counted, seconds),
            "failed": outcomes["failed"],
            "in_plain_triton": hung,
            "table": counted,
        }

    # ---------------------------------------------------------------------------------------------- faults and profiles

    def look_into_faults(self) -> None:
        """compute-sanitizer's tools over what was wrong in call 1."""
        commands = self._faults()
        if not commands or self.facts["versions"]["tools"]["compute-sanitizer"] is None:
            self.facts["sanitizer"] = {"faults": list(commands), "rows": []}
            return
        log = self.scratch / "sanitizer.log"
        rows = tools.sanitize(commands, log, self._afresh, lambda: self.left(FAULTS_BY))
        self.facts["sanitizer"] = {"faults": list(commands), "rows": rows}

    def _faults(self) -> dict[str, list[str]]:
        """By name, a command that repeats what was wrong: launches first, then tests."""
        after = self.options.after
        if after is None:
            return {}
        one, test = [sys.executable, "-m", "benchmarks.gpu.one"], [sys.executable, "-m", "pytest", "-x", "-q"]
        launched, call = after / first_launches.FILE, json.loads((after / "call.json").read_text())
        rows = json.loads(launched.read_text())["launches"] if launched.is_file() else []
        keys = [f"{row['variant']}: {row['case']}" for row in rows if row["status"] in first_launches.BARRED]
        tests = (call.get("parity") or {}).get("failed", [])
        commands = {key: [*one, key] for key in keys[:_SANITIZED]}
        return commands | {name: [*test, name] for name in tests[: _SANITIZED // 2]}

    def _afresh(self, command: list[str], seconds: float, log: Path) -> int | None:
        """As :meth:`child`, with what this command says alone in its log, and in the call's."""
        log.unlink(missing_ok=True)
        status = self.child(command, seconds, log)
        with (self.out / "log.txt").open("a") as stream:
            stream.write(log.read_text(errors="replace"))
        return status

    def profile(self) -> None:
        """A line of ncu for each kind of kernels, but for those that failed."""
        self.facts["ncu"] = []
        if self.facts["versions"]["tools"]["ncu"] is None:
            return
        rows = self.launched.get("launches", [])
        failed = {f"{row['variant']}: kernels" for row in rows if row["status"] in first_launches.BARRED}
        keys = [key for key in tools.PROFILED if key.partition("-b")[0] not in failed]
        table, raw = self.scratch / "ncu.csv", []
        for half in (keys[:6], keys[6:]):  # ncu writes at its end: a kill costs one half
            if self.left(PROFILE_BY) > 10.0:
                table.unlink(missing_ok=True)
                self.facts["ncu"] += tools.profile(sys.executable, half, self.left(PROFILE_BY), table, self._afresh)
                raw += [table.read_text(errors="replace")] if table.exists() else []
        if raw:
            (self.out / "ncu.csv").write_text("\n".join(raw))


def parity_outcomes(said: str) -> dict[str, list[str]]:
    """The tests that passed, failed and were skipped, by what ``pytest -v`` said of each, with xdist or without: of
    one that was ended there is no table."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    kinds = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    word = "|".join(kinds)
    side_by_side = re.compile(rf"\[gw\d+\] .*?({word}) (tests/.+?)\s*")
    alone = re.compile(rf"(tests/.+?) ({word})( .*)?")
    for line in said.splitlines():
        if match := side_by_side.fullmatch(line):
            kind, name = match[1], match[2]
        elif match := alone.fullmatch(line):
            name, kind = match[1], match[2]
        else:
            continue
        found[kinds[kind]].append(name)
    return found


def parity_verdict(status: int | None, table: dict[str, Any], seconds: float) -> str:
    """In a word, which counts as passed only where something was."""
    if status is None:
        return f"not done after {seconds:.0f} s"
    if table["failed"] or status:
        return f"failed: {table['failed']} tests (pytest's exit status {status})"
    return "passed" if table["passed"] else "nothing was run"


def supervise(
    command: list[str],
    left: Callable[[], float],
    child: Callable[[list[str], float], int | None],
    *,
    resume: bool = False,
) -> int:
    """Run the command, and again with ``--resume`` as long as it ends because the GPU gave no answer.

    Args:
        command: whose last process's exit status is returned; it is told its ``--budget``.
        left: seconds until it has to be over.
        child: runs a command.
        resume: whether the first goes on with an earlier run, too.
    """
    more = ["--resume"] if resume else []
    while (seconds := left()) > 1.0:
        # The run keeps its budget itself, which begins when torch is there and the GPU is awake
        status = child([*command, "--budget", f"{max(1.0, seconds - _WAKING_SECONDS):.0f}", *more], seconds)
        if status != HUNG:
            return HUNG if status is None else status
        more = ["--resume"]
    return HUNG


# ------------------------------------------------------------------------------------------------------------ the calls


def carry_out(options: Options, begun: float) -> int:
    """Do a call; its exit status."""
    with tempfile.TemporaryDirectory(prefix="fastattn-gpu-") as scratch:
        call = Call(options, begun, Path(scratch))
        versions = _versions(Path(scratch), call.left(VERSIONS_BY))
        if not options.dry_run and not versions.get("has_gpu"):
            reason = versions.get("reason", f"torch {versions.get('environment', {}).get('torch')} sees no CUDA device")
            print(f"no GPU: {reason}; nothing was run", file=sys.stderr)
            return 2
        call.facts["versions"] = versions
        options.out.mkdir(parents=True, exist_ok=True)
        for name in _FILES:  # of an earlier time: what is there at the end is of this one
            (options.out / name).unlink(missing_ok=True)
            (options.out / f"{name}.part").unlink(missing_ok=True)
        call.save()
        call.part("unpacking compiled kernels", call.unpack_cache)
        {"1": _first, "2": _second, "sweep": _sweep}[options.call](call)
        status = 1 if answer.wrong(call.facts, call.launched, call.document()) else 0
        said = (options.out / "answer.txt").read_text()
        print(said, flush=True)
        if options.call == "1":  # last of all: the folder has six files at most, one half written among them
            print(f"{call.pack_cache()}\n")
        # the questions once more at the end, where a terminal and those who cut off the beginning have them
        print(said.partition(answer.REST)[0], flush=True)
        return status


def _first(call: Call) -> None:
    call.part("first launches", call.launch_first)
    call.part("the question: L = 8192, head size 128", lambda: call.time_cases("question", QUESTION_BY))
    call.part("parity", lambda: call.run_parity(PARITY_BY))


def _second(call: Call) -> None:
    if call.options.after is None:
        call.part("first launches", call.launch_first)
    else:
        launched = call.options.after / first_launches.FILE
        call.launched = json.loads(launched.read_text()) if launched.is_file() else {}
        call.part("faults of call 1", call.look_into_faults)
    call.part("the rest of the matrix", lambda: call.time_cases("rest", TIMINGS_BY))
    call.part("ncu", call.profile)
    call.part("what was left out", lambda: call.time_cases("rest", REST_BY, resume=True))


def _sweep(call: Call) -> None:
    call.part("first launches", call.launch_first)
    call.part("every configuration", lambda: call.time_cases("", SWEEP_BY))


def _versions(scratch: Path, seconds: float) -> dict[str, Any]:
    """What :mod:`benchmarks.gpu.versions` says in a process of its own, or the reason why it says nothing."""
    path = scratch / "versions.json"
    with path.open("w") as stream:
        status = children.run([sys.executable, "-m", "benchmarks.gpu.versions"], seconds, cwd=ROOT, stdout=stream)
    try:
        return json.loads(path.read_text().strip().splitlines()[-1])
    except (ValueError, IndexError):
        what = f"not done after {seconds:.0f} s" if status is None else f"exit status {status}"
        return {"has_gpu": False, "reason": f"asking for the versions failed: {what}"}
