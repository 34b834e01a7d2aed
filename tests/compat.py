"""The tests with other versions of Python, torch and triton: ``make compat`` writes docs/compat.md.

``python -m tests.compat [PYTHON ...]`` tries the pairs of these Pythons alone and leaves the other rows as they are;
``python -m tests.compat set-up PAIR ...`` only sets environments up and prints the Python of each; a pair is the Python
of a row, or ``PYTHON-TORCH-TRITON``, the releases of any other.
Each pair has an environment of its own under build/compat; what is there already is used again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "build" / "compat"
PAGE = ROOT / "docs" / "compat.md"
LOCK = (ROOT / "constraints.txt").read_text()
LIMIT = 1800  # seconds of one selection: several times what a core to itself takes
EXTRAS = ("test", "encoder")


class Pair(NamedTuple):
    """Releases that are tried together; None is the newest, of triton the one that torch asks for."""

    python: str
    torch: str | None
    triton: str | None


def locked(name: str) -> str:
    """The version that constraints.txt pins, of a package that has one line there."""
    return re.findall(rf"^{name}==(\S+)", LOCK, re.MULTILINE)[0]


# The oldest that pyproject.toml allows, the pair that `make` installs, and what came after it, each with another
# Python: what a Python breaks shows with any torch, and every environment is gigabytes and a quarter of an hour.
PAIRS = (
    Pair("3.10", "2.11.0", "3.6.0"),
    Pair("3.11", locked("torch"), locked("triton")),
    Pair("3.12", "2.14.1", "3.8.0"),
    Pair("3.13", None, None),
)

# What is run, as arguments of pytest. A slice takes each N-th test of all that there are.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "imports": ("tests/test_imports.py",),
    "modules": ("tests/modules",),
    "integrations": ("tests/integrations",),
    "distributed": ("tests/distributed",),
    "operators, 1 in 20": ("tests/ops", "--every", "20"),
    "kernels interpreted, 1 in 20": ("tests/kernels", "--every", "20", "--ignore=tests/kernels/test_cross_compile.py"),
    "kernels compiled": ("tests/kernels/test_cross_compile.py", "-k", "run_time_rows or plain"),
}
COLUMNS = ("Python", "torch", "triton", *SELECTIONS)

Row = dict[str, str]


# ---------------------------------------------------------------------------------------------------- an environment


def find_python(version: str) -> str | None:
    """The interpreter called ``python3.N`` on the path, if it runs and is that version."""
    command = [f"python{version}", "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except OSError:
        return None
    found, _, executable = said.strip().partition(" ")
    return executable if found == version else None


def set_up(pair: Pair, interpreter: str) -> Path:
    """The Python of an environment that holds the pair, and of everything else what constraints.txt says."""
    folder = ENVIRONMENTS / "-".join((f"python{pair.python}", f"torch{pair.torch or ''}", f"triton{pair.triton or ''}"))
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    install(python, "pip", "-c", str(ROOT / "constraints.txt"))
    wanted = [f"{name}=={version}" if version else name for name, version in zip(pair._fields, pair)][1:]
    install(python, "--upgrade", *wanted)
    # What the pair brought with it stays; everything else has the lock's version.
    listed = json.loads(pip(python, "list", "--format=json"))
    brought = {canonicalize_name(package["name"]): package["version"] for package in listed}
    rest = [line for line in LOCK.splitlines() if line[:1].isalnum() and Requirement(line).name not in brought]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*(f"{name}=={version}" for name, version in brought.items()), *rest]))
    install(python, *tools(), "-c", str(constraints))
    return python


def tools() -> list[str]:
    """The packages that the tests need beside the pair; fastattn itself is run from its sources."""
    requirements = map(Requirement, metadata.requires("fastattn") or ())
    return sorted(
        {
            requirement.name
            for requirement in requirements
            if requirement.marker and any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        }
        - {"torch", "triton"}
    )


def pip(python: Path, *arguments: str) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install(python: Path, *arguments: str) -> None:
    pip(python, "install", "--quiet", "--only-binary", ":all:", *arguments)


# -------------------------------------------------------------------------------------------------------------- a row


def try_out(python: Path, pair: Pair) -> Row:
    """Run every selection; what became of each, with the versions that were there."""
    say = "import torch, triton; print(torch.__version__.partition('+')[0], triton.__version__)"
    versions = subprocess.run([python, "-c", say], check=True, capture_output=True, text=True).stdout.split()
    row = dict(zip(COLUMNS, (pair.python, *versions)))
    for name, selection in SELECTIONS.items():
        row[name] = outcome(python, selection)
        print(f"{pair.python}: {name}: {row[name]}", flush=True)
    return row


def outcome(python: Path, selection: tuple[str, ...]) -> str:
    """How many tests passed, and what else pytest's last line counts; its output is shown where something failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((".", "kernels"))}
    command = [python, "-m", "pytest", "-q", "-n", "0", "--tb=short", *selection]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT} s"
    if run.returncode:
        print(run.stdout, flush=True)
    return count(run.stdout, run.returncode)


def count(said: str, code: int) -> str:
    """``2 failed, 40 passed, 1 skipped, 3 warnings in 1.2s`` as ``40, 2 failed, 1 skipped``."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", last)}
    if not counts or (code and not counts.keys() & {"failed", "error", "errors"}):
        return f"pytest ended with {code}"
    return ", ".join([str(counts.pop("passed", 0)), *(f"{n} {what}" for what, n in counts.items())])


# ---------------------------------------------------------------------------------------------------------- the table

_HEAD = """# Tried with

`make compat` sets up an environment for each row and runs tests there, one thread, without a GPU: kernels in Triton's
interpreter, and compiled for GPUs that are not there. A cell is the number of tests that passed, and of those that did
not. The kernels compiled are the norms', and attention's forward and backward without masks, biases and weights; every
kernel is compiled by `make resources-pairs`.
[constraints.txt](../constraints.txt) has the pair that `make test` uses, with which all tests are run.

"""


def read_table(text: str) -> list[Row]:
    """The rows of the table in ``text``."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, cells)) for cells in rows]


def table(rows: list[Row]) -> str:
    """Markdown, by version of Python."""
    rows = sorted(rows, key=lambda row: [int(part) for part in row["Python"].split(".")])
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(row.get(column, "") for column in COLUMNS) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(row: Row) -> str:
    """Put the row into the page, in place of that of the same Python; the table."""
    old = read_table(PAGE.read_text()) if PAGE.exists() else []
    made = table([row, *(other for other in old if other["Python"] != row["Python"])])
    PAGE.write_text(_HEAD + made)
    return made


def environments(pairs: list[str]) -> list[Path]:
    """The Python of the environment of each pair: of the row with such a Python, or of ``PYTHON-TORCH-TRITON``.

    Raises:
        ValueError: it is neither.
        FileNotFoundError: its Python is not on the path.
    """
    rows = {pair.python: pair for pair in PAIRS}
    found = []
    for text in pairs:
        parts = text.split("-")
        if text not in rows and len(parts) != 3:
            raise ValueError(f"PAIR={text!r}: expected one of {', '.join(rows)}, or PYTHON-TORCH-TRITON")
        pair = rows.get(text) or Pair(*parts)
        interpreter = find_python(pair.python)
        if interpreter is None:
            raise FileNotFoundError(f"python{pair.python}: expected it on the path")
        found.append(set_up(pair, interpreter))
    return found


def main(pythons: list[str]) -> int:
    """Try the pairs of these Pythons, or all; 1 where a test failed."""
    if pythons[:1] == ["set-up"]:
        print(*environments(pythons[1:]))
        return 0
    failed, made = False, ""
    for pair in PAIRS:
        if pythons and pair.python not in pythons:
            continue
        interpreter = find_python(pair.python)
        if interpreter is None:
            print(f"{pair.python}: not tried: there is no python{pair.python} on the path")
            continue
        row = try_out(set_up(pair, interpreter), pair)
        failed |= any(re.search("failed|error|not done|ended", row[name]) for name in SELECTIONS)
        made = write(row)
    print(made, end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
