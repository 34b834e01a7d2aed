"""What came back of a GPU call becomes a result, or is refused with the reason."""

import json

import pytest

from benchmarks import __main__ as command_line
from tests.benchmarks.documents import document, row

CASE = "kernels-b2-h16-l8192-d128-forward-bfloat16"
SIZE = {"batch": 2, "heads": 16, "seqlen": 8192, "head_dim": 128, "mask": "none", "weights": False}


@pytest.fixture
def came_back(tmp_path):
    """A folder that a call on a GPU left, with these changes."""

    def make(rows=None, *, call=None, **environment):
        folder = tmp_path / "back"
        folder.mkdir()
        rows = [row(CASE, "fastattn", 1.0, **SIZE), row(CASE, "sdpa", 2.0, **SIZE)] if rows is None else rows
        found = document(rows)
        found["environment"] |= {"gpu": "NVIDIA H200", "interpreted": False, **environment}
        (folder / "run.json").write_text(json.dumps(found))
        facts = {"call": "1", "dry_run": False, "versions": {"date": "2026-11-29"}, **(call or {})}
        (folder / "call.json").write_text(json.dumps(facts))
        for name in ("answer.txt", "log.txt", "ncu.csv"):
            (folder / name).write_text(name)
        return folder

    return make


def take(folder, results):
    return command_line.main(["take", str(folder), "--into", str(results)])


def test_result_is_named_by_device_date_and_call(came_back, tmp_path, capsys):
    results = tmp_path / "results"
    assert take(came_back(), results) == 0
    into = results / "nvidia-h200-2026-11-29-call1"
    names = {path.name for path in into.iterdir()}
    assert {"run.json", "answer.txt", "ncu.csv", "report.md", "results.csv"} <= names
    assert "log.txt" not in names
    assert json.loads((into / "run.json").read_text())["call"]["call"] == "1"
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(f"to commit: git add {into}")


def test_run_that_was_cut_short_is_taken_and_said_to_be(came_back, tmp_path, capsys):
    folder = came_back()
    found = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(found | {"state": "running"}))
    assert take(folder, tmp_path / "results") == 0
    assert "the run is running, and" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": None}, "expected a run on a GPU; this is one on a CPU"),
        ({"call": {"dry_run": True}}, "expected a run on a GPU; this is a dry run"),
        ({"interpreted": True}, "TRITON_INTERPRET was set"),
        ({"rows": []}, "expected timed cases; none of 0 rows has a time"),
    ],
    ids=["cpu", "dry", "interpreted", "nothing timed"],
)
def test_what_is_no_result_is_refused_with_the_reason(came_back, tmp_path, capsys, options, said):
    assert take(came_back(options.pop("rows", None), **options), tmp_path / "results") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("missing", ["run.json", "call.json"])
def test_folder_of_something_else_is_refused(came_back, tmp_path, capsys, missing):
    folder = came_back()
    (folder / missing).unlink()
    assert take(folder, tmp_path / "results") == 2
    said = capsys.readouterr().err
    assert "expected the folder that a call of `make gpu` wrote" in said and missing in said


def test_result_that_is_there_is_kept(came_back, tmp_path, capsys):
    folder = came_back()
    assert take(folder, tmp_path / "results") == 0
    assert take(folder, tmp_path / "results") == 2
    assert "is there already" in capsys.readouterr().err
