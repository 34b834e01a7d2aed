"""What several tritons make of the same kernels: the page, and the command that fails where one does not compile."""

import copy
import sys
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks.laboratory import command_line as laboratory
from benchmarks.laboratory import compile, pairs, table
from tests.benchmarks.test_laboratory import CAREFUL, ROW

OLDER: list[dict[str, Any]] = [
    {**ROW, "triton": "3.6.0", "registers": 250},
    {**CAREFUL, "triton": "3.6.0", "spilled": 104},
]


def test_pairs_stand_side_by_side_and_spills_that_differ_apart():
    again = {**ROW, "case": {"name": "the same binary"}}
    beside = pairs.Pairs([[ROW, CAREFUL, again], [*OLDER, {**OLDER[0], "case": again["case"]}]])
    assert beside.differences == []
    (of_target,) = beside.tables().values()
    assert of_target.header[-2:] == ("3.7.1", "3.6.0")
    assert [(line[2], line[0], *line[-2:]) for line in of_target.lines] == [
        ("cuda:90", "attention_fwd", "240 / 0", "250 / 0"),
        ("cuda:90", "attention_fwd careful", "240 / 96", "240 / 104"),
    ]
    assert of_target.lines[0][1] == "attention bf16 D128 plain"
    assert [line[0] for line in beside.differing().lines] == ["attention_fwd careful"]
    before, where, after = beside.document().partition("## Where spills differ")
    assert "triton 3.7.1 and 3.6.0" in before and where
    assert after.count("attention_fwd careful") == 2


def test_pairs_say_that_nothing_differs():
    text = pairs.Pairs([[ROW], [{**ROW, "triton": "3.6.0"}]]).document()
    assert "## Where spills differ\n\nNowhere.\n" in text


def test_pairs_name_what_only_one_of_them_launches():
    where = "attention bf16 D128 plain, cuda:90"
    assert pairs.Pairs([[ROW, CAREFUL], OLDER[:1]]).differences == [
        f"attention_fwd careful, {where}: launched under triton 3.7.1, not under 3.6.0"
    ]
    assert pairs.Pairs([[ROW], OLDER]).differences == [
        f"attention_fwd careful, {where}: launched under triton 3.6.0, not under 3.7.1"
    ]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Nothing is compiled; what would have been is collected, by the Python that would have."""
    found: dict[str, tuple[list[Any], list[str]]] = {
        sys.executable: ([ROW, CAREFUL], []),
        "/older/python": (OLDER, []),
    }
    monkeypatch.setattr(
        laboratory, "compile_all", lambda jobs, processes, code, python=sys.executable: copy.deepcopy(found[python])
    )
    monkeypatch.setattr(table, "PATH", tmp_path / "page.md")
    monkeypatch.setattr(pairs, "PATH", tmp_path / "pairs.md")
    return found


@pytest.mark.usefixtures("compiled")
def test_laboratory_compiles_with_other_tritons_and_writes_both_pages(capsys):
    assert command_line.main(["laboratory", "--write", "--with", "/older/python"]) == 0
    assert "240 / 104" in capsys.readouterr().out
    assert "240 / 104" in pairs.PATH.read_text()
    assert table.read(table.PATH).triton == "3.7.1"


def test_laboratory_fails_where_another_triton_does_not_compile(compiled, capsys):
    compiled["/older/python"] = (OLDER[:1], ["attention D128 for cuda:90 does not compile: why"])
    assert command_line.main(["laboratory", "--write", "--with", "/older/python"]) == 1
    said = capsys.readouterr().err
    assert "/older/python: attention D128 for cuda:90 does not compile: why" in said
    assert "attention_fwd careful, attention bf16 D128 plain, cuda:90: launched under triton 3.7.1" in said
    assert not pairs.PATH.exists() and not table.PATH.exists()


def test_compiler_that_crashes_is_named_and_the_other_cases_have_rows(tmp_path):
    """A Python that dies by a signal over one case; what it says of the other is a row."""
    python = tmp_path / "python"
    said = '{"rows": [{"kernel": "k"}], "failures": []}'
    python.write_text(f"#!/bin/sh\ncase \"$4\" in *bad*) kill -6 $$;; esac\necho noise\necho '{said}'\n")
    python.chmod(0o755)
    cases = [{"name": "good"}, {"name": "bad"}]
    rows, failures = compile.compile_all([("cuda:90", cases)], 1, None, str(python))
    assert rows == [{"kernel": "k"}]
    assert [failure.splitlines()[0] for failure in failures] == [
        "bad for cuda:90 does not compile: the compiler ended with -6: "
    ]
