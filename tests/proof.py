"""The proof that compiled kernels are right: ``make proof`` runs tests on machines and writes docs/proof.md's tables.

``python -m tests.proof [WORD ...]`` runs the rows whose name holds one of the words; the others keep what was found
before. A row that has been run with these sources is not run again: ``--again`` does. ``--seconds`` ends the run after
that time: the rows that are left keep what they had, or say that they were not run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tests import compat
from tests.machines.faults import FAULTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "proof.md"
RESULTS = ROOT / "build" / "proof"
LIMIT = 1800  # seconds of one row
OLDEST = compat.PAIRS[0]
LOCKED = (compat.locked("triton"),)

HOPPER, KERNELS, OPS = "tests/kernels/hopper/", "tests/kernels/", "tests/ops/"
NORM = OPS + "test_norm_parity.py"
FAULTS_TESTS = "tests/machines/test_faults.py"
EVERY = "--every"
RUN = ("-k", "not compiles")  # some tests compile for other GPUs
ATTENTION = (OPS + "test_attention_parity.py", "-k", "triton")


class Row(NamedTuple):
    """One selection of tests, which runs on a machine with each of the tritons."""

    name: str
    machine: str
    selection: tuple[str, ...]
    tritons: tuple[str, ...] = (OLDEST.triton or "", *LOCKED)
    plain: bool = False  # plain Triton also where Gluon would be chosen


ROWS = (
    Row("what the machine sees", "ptx", ("tests/machines/test_soft_gpu.py",)),
    Row("seeded faults", "ptx", (FAULTS_TESTS,), LOCKED),
    Row("seeded faults", "ttgir", (FAULTS_TESTS,), LOCKED),
    Row("Gluon kernels, all cases", "ttgir", (HOPPER,), LOCKED),
    Row("forward, Gluon", "ptx", (HOPPER + "test_forward.py",), (OLDEST.triton or "",)),
    # all of them run on ttgir with the locked triton
    Row("forward, Gluon, 1 in 3", "ptx", (HOPPER + "test_forward.py", EVERY, "3"), LOCKED),
    Row("backward, Gluon: pair and one pass", "ptx", (HOPPER + "test_backward.py",)),
    Row("forward and backward, Gluon, end to end", "ptx", (HOPPER + "test_end_to_end.py",)),
    Row("plain kernels, each feature once", "ptx", ("tests/machines/test_parity.py",)),
    Row("plain kernels, each feature once", "ttgir", ("tests/machines/test_parity.py",), LOCKED),
    Row("one pass, plain", "ptx", (KERNELS + "test_attention_one_pass.py", *RUN), plain=True),
    Row("pipelined forward, plain, 1 in 3", "ptx", (KERNELS + "test_attention_pipelined.py", EVERY, "3"), plain=True),
    Row("tile map", "ptx", (KERNELS + "test_attention_tile_map.py",)),
    Row("packed sequences, 1 in 6", "ptx", (KERNELS + "test_attention_packed.py", EVERY, "6")),
    Row("over a cache, 1 in 3", "ptx", (KERNELS + "test_attention_decode.py", EVERY, "3")),
    Row("over a cache, many turns of the loop", "ptx", ("tests/machines/test_decode.py",)),
    Row("over a cache", "ttgir", (KERNELS + "test_attention_decode.py",), LOCKED),
    Row("residual norm", "ptx", (KERNELS + "test_residual_norm.py",)),
    Row("additive attention", "ptx", (KERNELS + "test_additive.py", *RUN)),
    Row("dropout: output, weights, masks", "ptx", (OPS + "test_attention_dropout.py", "-k", "triton"), plain=True),
    Row("dropout, forward against backward", "ptx", (*ATTENTION[:-1], "triton and dropout", EVERY, "8"), plain=True),
    Row("attention's parity, 1 in 30", "ptx", (*ATTENTION, EVERY, "30")),
    Row("attention's parity, 1 in 30, plain", "ptx", (*ATTENTION, EVERY, "30"), plain=True),
    Row("additive attention's parity, 1 in 12", "ptx", (OPS + "test_additive_parity.py", "-k", "triton", EVERY, "12")),
    Row("the norms' parity, 1 in 24", "ptx", (NORM, "-k", "triton and not wide_rows", EVERY, "24")),
    Row("norms of rows in several parts", "ptx", (NORM, "-k", "triton and wide_rows")),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- running


class Task(NamedTuple):
    row: Row
    triton: str
    python: Path

    @property
    def result(self) -> Path:
        """Where what was found lies."""
        name = re.sub(r"\W+", "-", f"{self.row.name} {self.row.machine} {self.triton}")
        return RESULTS / f"{name}.json"


def sources(row: Row) -> str:
    """A fingerprint of what a row depends on: kernels and operators, the machines, its tests and what they share."""
    folders = ("kernels", "fastattn/ops", "fastattn/reference", "tests/machines")
    found = {path for folder in folders for path in (ROOT / folder).rglob("*.[cp]*")}
    found |= {path for folder in ("tests/kernels", "tests/ops") for path in (ROOT / folder).glob("*.py")}
    found = {path for path in found if path.suffix in (".py", ".c") and not path.name.startswith("test_")}
    found |= set((ROOT / HOPPER).glob("*.py")) if HOPPER in row.selection else set()
    found |= {ROOT / word for word in row.selection if word.endswith(".py")}
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(task: Task) -> None:
    """Run the row's tests with one triton, in a process of its own; what became of them, and the CPU time they took."""
    fingerprint = sources(task.row)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((".", "kernels"))}
    environment |= {"FASTATTN_MACHINE": task.row.machine, "TRITON_INTERPRET": "0"}
    environment |= {"FASTATTN_KERNELS": "triton"} if task.row.plain else {}
    log, report = task.result.with_suffix(".txt"), task.result.with_suffix(".xml")
    options = ("-q", "-n", "0", "--tb=short", f"--junitxml={report}")
    command = [str(task.python), "-m", "pytest", *options, *task.row.selection]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = f"not done in {LIMIT} s" if process.returncode < 0 else compat.count(log.read_text(), process.returncode)
    found = {
        "kernels": task.row.name, "machine": task.row.machine, "triton": task.triton, "passed": said,
        "CPU seconds": f"{usage.ru_utime + usage.ru_stime:.0f}", "sources": fingerprint, "faults": faults_in(report),
    }  # fmt: skip
    task.result.write_text(json.dumps(found))
    print(
        f"{task.row.name}, {task.row.machine}, triton {task.triton}: {said}, {found['CPU seconds']} s of a CPU",
        flush=True,
    )


def faults_in(report: Path) -> dict[str, str]:
    """Which seeded faults a row's tests found, as what."""
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).iter("testcase")
    found = {case.get("name", ""): case.find("properties/property[@name='found']") for case in cases}
    return {
        name.partition("[")[2].rstrip("]").replace("_", " "): told.get("value", "")
        for name, told in found.items() if told is not None
    }  # fmt: skip


def known(task: Task) -> dict[str, Any] | None:
    """What an earlier run found."""
    return json.loads(task.result.read_text()) if task.result.exists() else None


def failed(found: dict[str, Any]) -> bool:
    return re.search("failed|error|not done|ended|not run", found["passed"]) is not None


# ------------------------------------------------------------------------------------------------------------- the page

COLUMNS = ("kernels", "machine", "triton", "passed", "CPU seconds")


def table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    lines = [columns, ("---",) * len(columns), *(tuple(row.get(column, "") for column in columns) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def faults_table(tasks: list[Task]) -> str:
    """What each machine said of each seeded fault."""
    rows: dict[str, dict[str, str]] = {name: {"fault": name, "file": fault.file} for name, fault in FAULTS.items()}
    for task in tasks:
        for name, said in (known(task) or {}).get("faults", {}).items():
            rows.setdefault(name, {"fault": name})[task.row.machine] = said
    return table(("fault", "file", "ttgir", "ptx"), list(rows.values()))


def write(tasks: list[Task]) -> str:
    """Put what is known of every row into the page; the table."""
    rows = []
    for task in tasks:
        fingerprint = sources(task.row)
        found = known(task) or {"passed": "not run", "CPU seconds": "", "sources": fingerprint}
        found |= {"kernels": task.row.name, "machine": task.row.machine, "triton": task.triton}
        found["passed"] += "" if found["sources"] == fingerprint else ", with earlier sources"
        rows.append(found)
    made, text = table(COLUMNS, rows), PAGE.read_text()
    for name, lines in (("found", made), ("faults", faults_table(tasks))):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, lines=lines: f"{found[1]}\n{lines}\n{found[2]}", text)
    PAGE.write_text(text)
    return made


def pythons() -> dict[str, Path]:
    """An interpreter for each triton: this one has the locked pair, the oldest pair has an environment of its own."""
    found = {compat.locked("triton"): Path(sys.executable)}
    interpreter = compat.find_python(OLDEST.python)
    folder = compat.ENVIRONMENTS / f"python{OLDEST.python}-torch{OLDEST.torch}-triton{OLDEST.triton}"
    if (folder / "bin" / "python").exists():
        found[OLDEST.triton or ""] = folder / "bin" / "python"
    elif interpreter:
        found[OLDEST.triton or ""] = compat.set_up(OLDEST, interpreter)
    else:
        print(f"triton {OLDEST.triton}: not tried: there is no python{OLDEST.python} on the path")
    return found


def main(arguments: list[str]) -> int:
    """Run what is to be run, two rows at a time; 1 where something failed or was not run."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--triton", metavar="VERSION", help="run the rows of this triton alone")
    parser.add_argument("--again", action="store_true", help="run also what was run with these sources")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no row later than this (default: 3600)")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time (default: 2)")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    interpreters = pythons()
    tasks = [Task(row, t, interpreters[t]) for row in ROWS for t in row.tritons if t in interpreters]
    deadline = time.monotonic() + options.seconds

    def begin(task: Task) -> None:
        before = known(task)
        if before and before["sources"] == sources(task.row) and not options.again and not failed(before):
            print(
                f"{task.row.name}, {task.row.machine}, triton {task.triton}: found before with these sources",
                flush=True,
            )
        elif time.monotonic() < deadline:
            run(task)

    chosen = [task for task in tasks if options.triton in (None, task.triton)]
    chosen = [task for task in chosen if not options.words or any(word in task.row.name for word in options.words)]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(begin, chosen))
    print(write(tasks), end="")
    return int(any((found := known(task)) is None or failed(found) for task in tasks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
