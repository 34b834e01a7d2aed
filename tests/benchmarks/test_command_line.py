"""``python -m benchmarks`` as its user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from benchmarks import __main__ as command_line
from benchmarks import selection
from benchmarks.command_line import QUICK_BUDGET
from benchmarks.families import families
from benchmarks.gpu.matrix import matrix
from benchmarks.selection import Settings

ROOT = Path(__file__).parents[2]
ONE = "module-b1-h2-l16-d32-eval-causal-float32"


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_list_says_why_a_variant_refuses(capsys):
    assert command_line.main(["--list", "--quick", "--only", "module-b1-h2-l16-d32-eval-weights"]) == 0
    output = capsys.readouterr().out.split("\n")
    assert output[0] == "module-b1-h2-l16-d32-eval-weights-float32"
    assert "    fastattn" in output
    assert "    qkv+sdpa  refuses: returns no weights" in output


def test_list_has_what_is_learned(capsys):
    assert command_line.main(["--list", "--quick", "--only", "quality"]) == 0
    assert "quality: recall 8 pairs, attention" in capsys.readouterr().out


def test_unknown_case_is_an_error(capsys):
    assert command_line.main(["--only", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "tpu"], "'tpu'"),
        (["--device", "meta"], "expected cpu, cuda"),
        (["--seconds", "inf"], "--seconds"),
        (["--timeout", "nan"], "--timeout"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "expected 0 to"),
        (["--seconds", "0"], "--seconds"),
        (["--budget", "-5"], "--budget"),
        (["--threads", "many"], "positive int"),
        (["--dtype", "int8"], "--dtype"),
        (["--resume"], "--out"),
        (["--launched", "nowhere.json"], "--launched nowhere.json: expected"),
    ],
)
def test_bad_options_are_refused_by_name(capsys, arguments, named):
    with pytest.raises(SystemExit) as status:
        command_line.main([*arguments, "--only", ONE])
    assert status.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_device_that_is_not_there_is_an_error(capsys):
    assert command_line.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One case, its JSON and its report."""
    out = tmp_path_factory.mktemp("run")
    with fastattn.use_backend("torch"):
        arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(out), "--json", str(out / "more.json")]
        assert command_line.main(arguments) == 0
    return out


def test_run_writes_its_files(run):
    document = json.loads((run / "run.json").read_text())
    assert json.loads((run / "more.json").read_text()) == document
    assert document["state"] == "complete"
    assert document["environment"]["threads"] == document["settings"]["threads"] == 1
    assert {r["case"] for r in document["results"]} == {ONE}
    assert document["ceilings"]["matmul_tflops"]["float32"] > 0
    assert ONE in (run / "report.md").read_text()
    assert ONE in (run / "results.csv").read_text()


def test_run_prints_tables_and_where_its_files_are(capsys, tmp_path):
    arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "nn.MultiheadAttention" in printed
    assert str(tmp_path) in printed.strip().split("\n")[-1]


def test_run_without_time_names_what_it_left_out_and_resumes(capsys, tmp_path):
    arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(tmp_path)]
    assert command_line.main([*arguments, "--budget", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: ceilings, {ONE}" in printed
    assert "--resume" in printed
    assert command_line.main([*arguments, "--budget", "100", "--resume"]) == 0
    assert {r["case"] for r in json.loads((tmp_path / "run.json").read_text())["results"]} == {ONE}


def test_resume_of_nothing_is_an_error(capsys, tmp_path):
    assert command_line.main(["--quick", "--only", ONE, "--out", str(tmp_path), "--resume"]) == 2
    assert "run.json" in capsys.readouterr().err


def test_run_that_lies_there_is_kept(capsys, tmp_path):
    (tmp_path / "run.json").write_text("precious")
    arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    assert (tmp_path / "run.json.old").read_text() == "precious"
    assert "run.json.old" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_paths_of_no_use_are_refused_before_anything_is_measured(capsys, tmp_path, option):
    path = tmp_path if option == "--json" else tmp_path / "file"
    (tmp_path / "file").write_text("")
    assert command_line.main(["--quick", "--only", ONE, option, str(path)]) == 2
    captured = capsys.readouterr()
    assert f"{option} {path}: expected" in captured.err
    assert "ceilings" not in captured.out


def test_family_by_its_name_is_that_family_alone():
    assert {case.family for case, _ in selection.entries(Settings(quick=True, only="layer"))} == {"layer"}
    assert {job.kind for job in selection.jobs(Settings(quick=True, only="attention"))} == {"ceilings", "attention"}


def test_what_breaks_down_takes_no_other_along(capsys, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("of nought")

    monkeypatch.setattr(selection, "ceilings", broken)
    arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 1
    assert "ceilings broke down: ZeroDivisionError: of nought" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    assert {r["case"] for r in document["results"]} == {ONE}
    assert {r["of_floor"] for r in document["results"]} == {None}


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m benchmarks --list --quick | head -1"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    found = subprocess.run(command, shell=True, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert found.stdout.startswith("sequence-")
    assert "Traceback" not in found.stderr


def test_ctrl_c_prints_and_writes_what_is_done(capsys, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "run_case", interrupt)
    assert command_line.main(["--quick", "--only", ONE, "--out", str(tmp_path)]) == 130
    assert f"interrupted: 1 left out: {ONE}" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    assert (document["state"], document["done"]) == ("interrupted", ["ceilings"])


def test_wrong_result_of_ours_fails_the_run_and_a_peers_does_not(capsys, monkeypatch):
    run_case = selection.run_case

    def spoil(name):
        def spoiled(*arguments, **options):
            rows = run_case(*arguments, **options)
            for row in rows:
                if row.variant == name:
                    object.__setattr__(row, "status", "wrong")
            return rows

        monkeypatch.setattr(selection, "run_case", spoiled)
        return command_line.main(["--quick", "--only", ONE, "--seconds", "0.01"])

    assert spoil("nn.MultiheadAttention") == 0
    assert spoil("fastattn") == 1
    assert f"{ONE}: fastattn: wrong" in capsys.readouterr().err


def test_dtype_and_seed_are_the_cases_own_unless_given():
    own = selection.entries(Settings(quick=True))
    assert {case.dtype for case, _ in own} == {torch.float32, torch.bfloat16}
    given = selection.entries(Settings(quick=True, dtype="float64", seed=3))
    assert {(case.dtype, case.seed) for case, _ in given} == {(torch.float64, 3)}


def test_quick_run_leaves_slow_variants_out():
    slow = {v.name for family in families().values() for v in family.variants if v.slow}
    assert slow
    quick = {name for _, names in selection.entries(Settings(quick=True)) for name in names}
    assert not any(v.slow and v.name in quick for f in families().values() for v in f.variants)
    assert slow <= {name for _, names in selection.entries(Settings(quick=False)) for name in names}


def test_every_family_begins_early():
    """A budget that holds a third of a run has something of each."""
    found = selection.jobs(Settings(quick=True))
    assert found[0].key == "ceilings"
    early = {job.kind for job in found[: len(found) // 3]}
    # Those of kernels have no case on a CPU, and whole models take longer to build than a quick run may
    assert {*families(), "quality"} - {"kernels", "hugging_face"} <= early
    assert len({job.key for job in found}) == len(found)


def test_quick_run_fits_into_its_budget():
    """By guess, and with a tenth to spare: once the last of each kind were left out, and their pictures empty."""
    assert sum(job.seconds for job in selection.jobs(Settings(quick=True, seconds=0.2))) < 0.9 * QUICK_BUDGET


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.parametrize("quick", [False, True])
def test_matrix_is_consistent(quick):
    cases = matrix(quick=quick)
    assert len({case.name for case, _ in cases}) == len(cases)
    for case, names in cases:
        assert set(names) <= {variant.name for variant in families()[case.family].variants}
        assert case.device == "cuda"


def test_matrix_has_every_family():
    """But models of transformers, which is not installed there."""
    assert {case.family for case, _ in matrix()} == set(families()) - {"hugging_face"}
