"""The host's times: what is launched is exact, and is asserted; times are not."""

import json

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.host import run_cases
from benchmarks.host.cases import Place, all_cases
from benchmarks.reporting.host import host_block, host_table
from benchmarks.reporting.text import as_text

needs_compiler = pytest.mark.skipif(run_cases.missing() is not None, reason=str(run_cases.missing()))


@pytest.fixture(scope="module")
def rows():
    """Of the cases with the fewest kernels to compile."""
    names = ["eval plain L64, triton", "add_layer_norm eval"]
    return {row["case"]: row for row in run_cases.run_cases(names, seconds=0.01)}


@needs_compiler
def test_evaluation_is_one_launch(rows):
    assert {name: row["error"] for name, row in rows.items()} == dict.fromkeys(rows)
    assert rows["eval plain L64, triton"]["launches"] == ["_attention_fwd_kernel"]
    assert rows["add_layer_norm eval"]["launches"] == ["_residual_norm_fwd_kernel"]
    assert {row["kernels"] for row in rows.values()} == {1}


@needs_compiler
def test_times_are_beside_those_of_the_peer(rows):
    for row in rows.values():
        assert 0.0 < row["least_us"]["minimum"] < row["ours_us"]["minimum"]
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["python_calls"] > 0


@needs_compiler
def test_table_has_a_line_a_case_and_the_peer_by_name(rows):
    text = as_text(host_table(rows.values()))
    assert "SDPA" in text
    assert "first call  " not in text  # what is in the cache already says nothing of it
    assert all(name in text for name in rows)


def test_process_that_breaks_down_says_why(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "nonsense")
    with pytest.raises(RuntimeError, match="FASTATTN_BACKEND='nonsense': expected one of"):
        run_cases.run_cases(["add_layer_norm eval"], seconds=0.01)


@needs_compiler
def test_profile_names_functions_operators_and_launches(capfd):
    assert command_line.main(["host", "--profile", "--only", "add_layer_norm eval"]) == 0
    text = capfd.readouterr().out
    assert "launches: _residual_norm_fwd_kernel" in text
    assert "add_layer_norm" in text
    assert "aten::empty" in text


@needs_compiler
def test_run_has_them_in_its_document_and_report(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(run_cases, "run_cases", lambda names, **_: list(rows.values()))
    arguments = ["--quick", "--only", "host", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    assert [row["case"] for row in json.loads((tmp_path / "run.json").read_text())["host"]] == list(rows)
    assert "## Host: what a call costs before its kernel runs" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(run_cases, "run_cases", lambda names, **_: [{"case": "one", "error": "why"}])
    assert command_line.main(arguments) == 1
    assert json.loads((tmp_path / "run.json").read_text())["failed"] == {"host": "RuntimeError: one: why"}


def test_run_without_a_compiler_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert command_line.main(["--quick", "--only", "host", "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "run.json").read_text())["environment"]["host"]
    assert said == "there is no C compiler no-such-compiler, which triton needs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_device_that_is_not_there_is_an_error(capsys):
    assert command_line.main(["host", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@needs_compiler
def test_unknown_case_is_an_error(capsys):
    assert command_line.main(["host", "--only", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err


def test_names_are_unique_and_a_few_are_quick():
    names = run_cases.names()
    assert len(set(names)) == len(names)
    assert set(run_cases.names(quick=True)) < set(names)
    assert run_cases.names("padding L512") == ["eval padding L512", "train padding L512"]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_peer_runs_at_every_scale(case):
    """A peer is measured where no kernel of ours is at hand, too; its steps have to run as they are."""
    for scale in ("small", "least"):
        result = case.peer(Place("cpu", torch.float32, scale))()
        assert all(torch.isfinite(t).all() for t in _tensors(result))


def _tensors(result):
    found = result if isinstance(result, tuple) else (result,)
    return [t for t in found if t is not None]


def test_block_names_the_file_that_holds_no_rows(tmp_path):
    path = tmp_path / "host.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"host\.json: expected what `python -m benchmarks host --json` writes"):
        host_block(path)
