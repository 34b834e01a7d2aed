"""``python -m benchmarks`` as its user meets it, and the run on a GPU that is made of it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from benchmarks import __main__ as command_line
from benchmarks import gpu, plan
from benchmarks.families.kernels import trial
from benchmarks.matrix import matrix
from benchmarks.plan import Settings
from benchmarks.registry import families
from benchmarks.run import HUNG
from tests.benchmarks.documents import document

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
    assert {case.family for case, _ in plan.entries(Settings(quick=True, only="layer"))} == {"layer"}
    assert {job.kind for job in plan.jobs(Settings(quick=True, only="attention"))} == {"ceilings", "attention"}


def test_what_breaks_down_takes_no_other_along(capsys, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("of nought")

    monkeypatch.setattr(plan, "ceilings", broken)
    arguments = ["--quick", "--only", ONE, "--seconds", "0.01", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 1
    assert "ceilings broke down: ZeroDivisionError: of nought" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    assert {r["case"] for r in document["results"]} == {ONE}
    assert {r["of_floor"] for r in document["results"]} == {None}


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m benchmarks --list --quick | head -1"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(gpu._ROOT), str(gpu._ROOT / "kernels")])}
    found = subprocess.run(command, shell=True, cwd=gpu._ROOT, env=environ, capture_output=True, text=True)
    assert found.stdout.startswith("sequence-")
    assert "Traceback" not in found.stderr


def test_ctrl_c_prints_and_writes_what_is_done(capsys, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run_case", interrupt)
    assert command_line.main(["--quick", "--only", ONE, "--out", str(tmp_path)]) == 130
    assert f"interrupted: 1 left out: {ONE}" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    assert (document["state"], document["done"]) == ("interrupted", ["ceilings"])


def test_wrong_result_of_ours_fails_the_run_and_a_peers_does_not(capsys, monkeypatch):
    run_case = plan.run_case

    def spoil(name):
        def spoiled(*arguments, **options):
            rows = run_case(*arguments, **options)
            for row in rows:
                if row.variant == name:
                    object.__setattr__(row, "status", "wrong")
            return rows

        monkeypatch.setattr(plan, "run_case", spoiled)
        return command_line.main(["--quick", "--only", ONE, "--seconds", "0.01"])

    assert spoil("nn.MultiheadAttention") == 0
    assert spoil("fastattn") == 1
    assert f"{ONE}: fastattn: wrong" in capsys.readouterr().err


def test_dtype_and_seed_are_the_cases_own_unless_given():
    own = plan.entries(Settings(quick=True))
    assert {case.dtype for case, _ in own} == {torch.float32, torch.bfloat16}
    given = plan.entries(Settings(quick=True, dtype="float64", seed=3))
    assert {(case.dtype, case.seed) for case, _ in given} == {(torch.float64, 3)}


def test_quick_run_leaves_slow_variants_out():
    slow = {v.name for family in families().values() for v in family.variants if v.slow}
    assert slow
    quick = {name for _, names in plan.entries(Settings(quick=True)) for name in names}
    assert not any(v.slow and v.name in quick for f in families().values() for v in f.variants)
    assert slow <= {name for _, names in plan.entries(Settings(quick=False)) for name in names}


def test_every_family_begins_early():
    """A budget that holds a third of a run has something of each."""
    found = plan.jobs(Settings(quick=True))
    assert found[0].key == "ceilings"
    early = {job.kind for job in found[: len(found) // 3]}
    assert {*families(), "quality"} - {"kernels"} <= early  # those have no case on a CPU
    assert len({job.key for job in found}) == len(found)


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.parametrize("quick", [False, True])
def test_matrix_is_consistent(quick):
    cases = matrix(quick=quick)
    assert len({case.name for case, _ in cases}) == len(cases)
    for case, names in cases:
        assert set(names) <= {variant.name for variant in families()[case.family].variants}
        assert case.device == "cuda"


def test_matrix_has_every_family():
    assert {case.family for case, _ in matrix()} == set(families())


def test_gpu_dry_run_writes_every_part(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter would take its time over the kernels
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["state"] == "complete"
    assert {(r["case"], r["variant"]) for r in document["results"]} == {(c.name, v) for c, vs in trial() for v in vs}
    assert all(r["status"] in ("ok", "refused") for r in document["results"])
    launches = json.loads((tmp_path / "first_launches.json").read_text())
    assert document["first_launches"] == launches
    ours = {(r["variant"], r["backward"]) for r in document["results"] if r["variant"].startswith("fastattn")}
    assert {(row["variant"], "-backward-" in row["case"]) for row in launches["launches"]} == ours
    printed = capfd.readouterr().out
    assert document["results"][0]["case"] in printed
    assert "first launches: " in printed
    assert "kernels: the best of ours beside each peer" in printed
    assert printed.strip().split("\n")[-1].startswith("kernels, backward: in 1 case")


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A GPU run whose parts only say that they were asked for, and with what."""
    asked: list[Any] = []

    def run_first_launches(settings, out, seconds):
        asked.append(("launches", settings.sweep, out, seconds))
        return {"launches": launches, "left_out": []}

    def run_parity(out, seconds, environ):
        asked.append(("parity", environ))
        return {"verdict": "passed", "last_line": "all"}

    def supervise(command, *, end):
        asked.append(("matrix", command[3:]))
        path = Path(command[command.index("--out") + 1]) / "run.json"
        path.write_text(json.dumps(document([])))
        return 0

    launches = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for function in (run_first_launches, run_parity, supervise):
        monkeypatch.setattr(gpu, function.__name__, function)

    def run(*arguments, hung=()):
        launches[:] = [{"variant": v, "case": "a", "status": "timed out", "reason": "", "seconds": 60.0} for v in hung]
        assert gpu.main(["--out", str(tmp_path), *arguments]) == 0
        return asked

    return run


def test_gpu_run_launches_first_and_times_last(on_gpu, tmp_path):
    launched, parity, (_, command) = on_gpu()
    assert launched == ("launches", False, tmp_path, gpu.LAUNCH_SECONDS)
    assert parity == ("parity", {})
    assert command[command.index("--launched") + 1] == str(tmp_path / "first_launches.json")
    assert "--sweep" not in command
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["first_launches"]["launches"] == []
    assert found["parity"]["verdict"] == "passed"
    assert gpu.LAUNCH_SECONDS + gpu.PARITY_SECONDS < gpu.TOTAL_SECONDS / 2
    assert gpu.TOTAL_SECONDS + 30 <= 9.5 * 60


def test_gpu_sweep_is_a_run_of_its_own(on_gpu, tmp_path):
    (launched, (_, command)) = on_gpu("--sweep", "--only", "d128")
    assert launched == ("launches", True, tmp_path / "sweep", gpu.SWEPT_LAUNCH_SECONDS)
    assert "--sweep" in command
    assert command[command.index("--only") + 1] == "d128"
    assert command[command.index("--out") + 1] == str(tmp_path / "sweep")


def test_gpu_parity_runs_in_plain_triton_where_a_pick_hung(on_gpu):
    assert on_gpu(hung=["fastattn"])[1] == ("parity", {"FASTATTN_KERNELS": "triton"})
    assert on_gpu(hung=["fastattn-gluon-n64-s3"])[-2] == ("parity", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_gpu_without_a_gpu_writes_nothing(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_run_that_hangs_goes_on_in_another_process(tmp_path):
    """Twice the watchdog ends the process; each of its successors is told to resume."""
    log = tmp_path / "log"
    code = f"""
import sys
log = open({str(log)!r}, "a+")
log.write(" ".join(sys.argv[1:]) + "\\n")
log.seek(0)
sys.exit({HUNG} if len(log.readlines()) < 3 else 0)
"""
    status = gpu.supervise([sys.executable, "-c", code, "--out", "there"], end=time.monotonic() + 60)
    assert status == 0
    lines = [re.sub("--budget [0-9]+", "--budget N", line) for line in log.read_text().splitlines()]
    assert lines == ["--out there --budget N", *["--out there --budget N --resume"] * 2]


def test_gpu_run_gives_up_at_its_end(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(command, seconds):
        asked.append((command, seconds))
        now[0] += 40.0
        return HUNG

    monkeypatch.setattr(gpu, "_run", run)
    assert gpu.supervise(["never"], end=100.0) == HUNG
    assert asked == [
        (["never", "--budget", "100"], 130.0),
        (["never", "--budget", "60", "--resume"], 90.0),
        (["never", "--budget", "20", "--resume"], 50.0),
    ]


@pytest.mark.skipif(os.name != "posix", reason="sessions are POSIX's")
def test_gpu_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert gpu._run([sys.executable, "-c", code], 2.0) is None
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        if "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()
