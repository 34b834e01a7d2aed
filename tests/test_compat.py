"""The table of `make compat`: how its cells are read from pytest, that the committed one is clean."""

import os
import re
import subprocess
import sys

import pytest

from tests import compat

ROWS = compat.read_table(compat.PAGE.read_text())


@pytest.mark.parametrize(
    ("said", "code", "cell"),
    [
        ("....\nseed 0\n40 passed, 3 warnings in 61.20s (0:01:01)\n", 0, "40"),
        ("2 failed, 40 passed, 1 skipped, 5 deselected in 1.20s", 1, "40, 2 failed, 1 skipped"),
        ("1 passed, 1 error in 1.20s", 1, "1, 1 error"),
        ("3 errors in 0.10s", 2, "0, 3 errors"),
        ("10 passed in 1.20s", -11, "pytest ended with -11"),  # a crash on the way out
        ("Fatal Python error: Segmentation fault", -11, "pytest ended with -11"),
        ("5 deselected in 0.20s", 5, "pytest ended with 5"),
        ("", 1, "pytest ended with 1"),
    ],
)
def test_compat_cell_says_what_pytest_counted(said, code, cell):
    assert compat.count(said, code) == cell


def test_compat_table_keeps_the_rows_of_other_pythons(tmp_path, monkeypatch):
    """3.10 comes after 3.9, and only the row that was tried anew changes."""
    page = tmp_path / "compat.md"
    monkeypatch.setattr(compat, "PAGE", page)
    one, other, anew = ({**dict.fromkeys(compat.COLUMNS, cell), "Python": python} for cell, python in
                        (("1", "3.10"), ("2", "3.9"), ("3", "3.9")))  # fmt: skip
    for row in (one, other, anew):
        made = compat.write(row)
    assert compat.read_table(page.read_text()) == compat.read_table(made) == [anew, one]


def test_compat_finds_a_python_by_what_it_says(tmp_path, monkeypatch):
    """A name on the path may be a shim of a version that is not there, or be another version."""
    version = "{}.{}".format(*sys.version_info[:2])
    for name, does in (("python3.98", "exit 127"), ("python3.99", f'exec {sys.executable} "$@"')):
        shim = tmp_path / name
        shim.write_text(f"#!/bin/sh\n{does}\n")
        shim.chmod(0o755)
    (tmp_path / f"python{version}").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert compat.find_python(version)
    assert [compat.find_python(other) for other in ("3.97", "3.98", "3.99")] == [None] * 3


def test_committed_compat_table_has_no_failures():
    for row in ROWS:
        assert list(row) == list(compat.COLUMNS), "`make compat` writes docs/compat.md anew"
        for selection in compat.SELECTIONS:
            assert re.fullmatch(r"[1-9]\d*(, \d+ skipped)?", row[selection]), row


def test_committed_compat_table_has_the_oldest_the_locked_and_newer_pairs():
    tried = {(row["torch"], row["triton"]) for row in ROWS}
    # the newest that could be had may be one of those that are named
    assert {(pair.torch, pair.triton) for pair in compat.PAIRS if pair.torch} <= tried
    assert [row["Python"] for row in ROWS] == [pair.python for pair in compat.PAIRS]
    assert (compat.locked("torch"), compat.locked("triton")) in tried
    floors = re.findall(r'"(?:torch|triton)>=([\d.]+)', (compat.ROOT / "pyproject.toml").read_text())
    assert [f"{floor}.0" for floor in floors] == list(compat.PAIRS[0][1:])


def test_every_takes_a_slice_of_all_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--collect-only", "tests/test_lock.py"]
    # a process of its own, and no worker of the run that this test is part of
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    counts = []
    for every in ("1", "3"):
        said = subprocess.run(
            [*command, "--every", every], cwd=compat.ROOT, env=environment, capture_output=True, text=True
        ).stdout
        counts.append(len(re.findall(r"^tests/test_lock.py::", said, re.MULTILINE)))
    assert counts[0] > 3
    assert counts[1] == -(-counts[0] // 3)


def test_environments_are_those_of_the_pairs(monkeypatch):
    monkeypatch.setattr(compat, "find_python", lambda version: f"/bin/python{version}" if version != "3.12" else None)
    monkeypatch.setattr(compat, "set_up", lambda pair, interpreter: (pair.triton, interpreter))
    assert compat.environments(["3.10"]) == [("3.6.0", "/bin/python3.10")]
    assert compat.environments(["3.13-2.12.0-3.7.0"]) == [("3.7.0", "/bin/python3.13")]
    with pytest.raises(ValueError, match=r"PAIR='2.7': expected one of 3.10, 3.11"):
        compat.environments(["2.7"])
    with pytest.raises(FileNotFoundError, match=r"python3.12: expected it on the path"):
        compat.environments(["3.12"])


def test_set_up_prints_the_python_of_each_pair(monkeypatch, capsys):
    monkeypatch.setattr(compat, "find_python", "/bin/python{}".format)
    monkeypatch.setattr(compat, "set_up", lambda pair, interpreter: f"{interpreter}:{pair.torch}")
    assert compat.main(["set-up", "3.10", "3.12-2.11.0-3.6.0"]) == 0
    assert capsys.readouterr().out == "/bin/python3.10:2.11.0 /bin/python3.12:2.11.0\n"
