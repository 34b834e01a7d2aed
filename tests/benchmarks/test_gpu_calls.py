"""The calls of a run on a GPU, dry on a CPU: what each leaves, that it ends, and what follows of faults."""

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

from benchmarks.families.kernels import trial
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import answer, calls, children, first_launches, one, tools
from benchmarks.jobs import HUNG
from tests.benchmarks.documents import document, row

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl and /proc are Linux's")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folders of both calls, the second after the first, and what they printed."""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}  # the interpreter would take its time over the kernels
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environ = {name: value for name, value in environ.items() if not name.startswith("PYTEST")}
    folder, printed = tmp_path_factory.mktemp("dry"), {}
    for call, more in (("1", []), ("2", ["--after", str(folder / "1")])):
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--call",
            call,
            "--out",
            str(folder / call),
            "--dry-run",
            *more,
        ]
        found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
        assert found.returncode == 0, found.stderr
        printed[call] = found.stdout
    return folder, printed


@pytest.mark.parametrize("call", ["1", "2"])
def test_dry_call_leaves_few_files_with_the_answer_first(dry, call):
    folder, printed = dry
    files = {path.name for path in (folder / call).iterdir()}
    assert files == {"answer.txt", "call.json", "run.json", "log.txt"} | (
        {"first_launches.json"} if call == "1" else set()
    )
    lines = (folder / call / "answer.txt").read_text().splitlines()
    assert re.fullmatch(rf"Call {call}, \d{{4}}-\d\d-\d\d, .*, a dry run", lines[0])
    assert lines[2] == "Right?" and lines[3].startswith("  as far as was seen: 2 first launches")
    assert lines[5] == "Faster than cuDNN?"
    questions = "\n".join(lines).partition(answer.REST)[0]
    assert printed[call].count(questions) == 2 and printed[call].rstrip().endswith(questions.rstrip())


def test_dry_calls_time_the_trial_and_launch_it_before(dry):
    folder, _ = dry
    for call in ("1", "2"):
        found = json.loads((folder / call / "run.json").read_text())
        assert found["state"] == "complete" and found["left_out"] == []
        assert {(r["case"], r["variant"]) for r in found["results"]} == {(c.name, v) for c, vs in trial() for v in vs}
        assert found["settings"]["launched"] == str(folder / "1" / "first_launches.json")
    launches = json.loads((folder / "1" / "first_launches.json").read_text())
    ours = {(r["variant"], r["backward"]) for r in found["results"] if r["variant"].startswith("fastattn")}
    assert {(row["variant"], "-backward-" in row["case"]) for row in launches["launches"]} == ours


def test_dry_call_imports_every_parity_test_and_says_that_none_was_run(dry):
    folder, _ = dry
    parity = json.loads((folder / "1" / "call.json").read_text())["parity"]
    assert parity["verdict"] == "nothing was run"
    assert parity["failed"] == [] and parity["table"]["failed"] == 0
    assert parity["table"]["skipped"] > 500
    log = (folder / "1" / "log.txt").read_text()
    assert "the time given with --budget is spent" in log


# --------------------------------------------------------------------------------------------------------- a call ends


def test_parts_follow_one_another_within_the_calls_time():
    """And what is left over is enough to end in: to kill what hangs, and to write."""
    end = children.KILL_SECONDS + 5.0
    first = (calls.VERSIONS_BY, calls.LAUNCHES_BY["1"], calls.QUESTION_BY, calls.PARITY_BY, gpu.SECONDS["1"] - end)
    after = (calls.VERSIONS_BY, calls.FAULTS_BY, calls.TIMINGS_BY, calls.PROFILE_BY, calls.REST_BY)
    fresh = (calls.VERSIONS_BY, calls.LAUNCHES_BY["2"], calls.TIMINGS_BY)
    sweep = (calls.VERSIONS_BY, calls.LAUNCHES_BY["sweep"], calls.SWEEP_BY, gpu.SECONDS["sweep"] - end)
    for parts in (first, (*after, gpu.SECONDS["2"] - end), fresh, sweep):
        assert list(parts) == sorted(parts)
    assert gpu.SECONDS["1"] <= 270 and gpu.SECONDS["2"] <= 400
    # two machines' starts, of a minute or two each, belong to the quarter of an hour
    assert gpu.SECONDS["1"] + gpu.SECONDS["2"] <= 15 * 60 - 2 * 110


def test_page_has_the_schedule_that_is_kept():
    page = (ROOT / "docs" / "measuring.md").read_text()
    table = page[page.index("| | seconds |") : page.index("A part that ends early leaves its time")]
    first, second, sweep = (line for line in table.splitlines() if "CALL=" in line)
    assert f"at most {gpu.SECONDS['1']:.0f} " in first and f"at most {gpu.SECONDS['2']:.0f} " in second
    assert f"at most {gpu.SECONDS['sweep']:.0f} " in sweep
    found = [re.findall(r"to (\d+)", line.split("|")[3]) for line in (first, second)]
    assert found == [
        [f"{seconds:.0f}" for seconds in parts]
        for parts in (
            (calls.LAUNCHES_BY["1"], calls.QUESTION_BY, calls.PARITY_BY),
            (calls.FAULTS_BY, calls.TIMINGS_BY, calls.PROFILE_BY, calls.REST_BY),
        )
    ]


@pytest.fixture
def call(tmp_path):
    """A call of these options, begun now."""

    def make(name="1", **options):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        found = calls.Call(
            calls.Options(name, tmp_path / "out", dry_run=True, **options), time.monotonic(), tmp_path / "scratch"
        )
        found.facts["versions"] = {"tools": {"ncu": "ncu", "compute-sanitizer": "compute-sanitizer"}}
        return found

    return make


def test_part_that_hangs_deaf_in_a_session_of_its_own_costs_its_time_and_no_more(call, tmp_path, monkeypatch):
    """pytest's process does, with a child; the call goes on, nobody is left, and the answer says so."""
    (tmp_path / "hangs.py").write_text(f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setsid()
    time.sleep(600)
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child}}")
time.sleep(600)
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("PYTEST_PLUGINS", "hangs")
    it, started = call(), time.monotonic()
    it.part("parity", lambda: it.run_parity(6.0))
    assert time.monotonic() - started < 6.0 + children.KILL_SECONDS + 15.0
    assert it.facts["parity"]["verdict"].startswith("not done after")
    assert "parity not done after" in (it.out / "answer.txt").read_text()
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists()


def test_part_that_breaks_down_takes_no_other_along_and_is_wrong(call):
    def broken():
        raise ZeroDivisionError("of nought")

    it = call()
    it.part("it", broken)
    assert "  NO: it broke down: ZeroDivisionError: of nought" in (it.out / "answer.txt").read_text().splitlines()


@pytest.mark.parametrize("most", [1 << 20, 10])
def test_what_call_1_compiled_comes_back_unless_it_is_large(call, monkeypatch, most):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(calls, "_MOST_BYTES", most)
    it = call()
    assert it.pack_cache() == "nothing was compiled in this call"
    (it.scratch / "triton" / "K").mkdir(parents=True)
    (it.scratch / "triton" / "K" / "k.cubin").write_text("k")
    said = it.pack_cache()
    assert (it.out / "cache.tar.xz").exists() == (most > 10)
    assert said.endswith("what was compiled, for call 2" if most > 10 else "and 10 are brought back")


def test_run_that_hangs_goes_on_in_another_process():
    """Twice the watchdog ends the process; each of its successors is told to resume."""
    asked = []

    def child(command, seconds):
        asked.append(command)
        return HUNG if len(asked) < 3 else 0

    assert calls.supervise(["it"], lambda: 100.0, child) == 0
    budget = ["--budget", f"{100 - calls._WAKING_SECONDS:.0f}"]
    assert asked == [["it", *budget], *[["it", *budget, "--resume"]] * 2]


def test_run_gives_up_when_its_time_is_over():
    now = [100.0]

    def child(command, seconds):
        assert seconds == now[0]
        now[0] -= 40.0
        return HUNG

    assert calls.supervise(["never"], lambda: max(0.0, now[0]), child) == HUNG
    assert now[0] == -20.0
    assert calls.supervise(["never"], lambda: 5.0, lambda command, seconds: None) == HUNG


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_call_without_a_gpu_writes_nothing(capfd, tmp_path):
    assert gpu.main(["--call", "1", "--out", str(tmp_path / "out")]) == 2
    assert "no GPU: torch" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--call", "3", "--out", "x"], "--call"),
        (["--call", "1", "--out", "x", "--after", "there"], "--after there: call 2 comes after call 1"),
        (["--call", "1", "--out", "x", "--only", "norm"], "--only norm: call 1 asks one question"),
        (["--call", "2", "--out", "x", "--after", "nowhere"], "--after nowhere: expected the folder that call 1 wrote"),
        (["--call", "2", "--out", "x", "--cache", "nowhere"], "--cache nowhere: expected the file"),
        (["--call", "2", "--out", __file__], "expected a folder"),
    ],
)
def test_bad_options_are_refused_by_name(capsys, arguments, named):
    with pytest.raises(SystemExit) as status:
        gpu.main(arguments)
    assert status.value.code == 2
    assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- parity, faults


@pytest.mark.parametrize(
    ("status", "table", "verdict"),
    [
        (0, {"passed": 3, "failed": 0}, "passed"),
        (0, {"passed": 0, "failed": 0}, "nothing was run"),
        (1, {"passed": 3, "failed": 1}, "failed: 1 tests (pytest's exit status 1)"),
        (2, {"passed": 3, "failed": 0}, "failed: 0 tests (pytest's exit status 2)"),
        (4, {"passed": 0, "failed": 0}, "failed: 0 tests (pytest's exit status 4)"),
        (None, {"passed": 3, "failed": 0}, "not done after 9 s"),
    ],
)
def test_parity_passes_only_where_something_did(status, table, verdict):
    assert calls.parity_verdict(status, table, 9.0) == verdict


def test_outcomes_of_parity_are_read_off_what_pytest_said_of_each():
    """With xdist and without; names have spaces, and the summary at the end says some of it again."""
    said = """
tests/ops/test_it.py::test_it[mask bool-a] PASSED                       [  1%]
tests/ops/test_it.py::test_it[mask bool-b] SKIPPED (the time is up)     [  2%]
tests/ops/test_it.py::test_hangs[a]
[gw1] [ 50%] FAILED tests/ops/test_it.py::test_other[b c]
[gw0] [ 51%] ERROR tests/ops/test_it.py::test_other[d]
[gw0] [ 52%] PASSED tests/ops/test_it.py::test_other[e]
FAILED tests/ops/test_it.py::test_other[b c] - AssertionError: no
SKIPPED [2] tests/conftest.py:64: the time is up
"""
    assert calls.parity_outcomes(said) == {
        "passed": ["tests/ops/test_it.py::test_it[mask bool-a]", "tests/ops/test_it.py::test_other[e]"],
        "failed": ["tests/ops/test_it.py::test_other[b c]", "tests/ops/test_it.py::test_other[d]"],
        "skipped": ["tests/ops/test_it.py::test_it[mask bool-b]"],
    }


def test_parity_runs_in_plain_triton_where_what_the_package_picks_hung(call, monkeypatch):
    asked = []

    def child(self, command, seconds, log):
        log.write_text("")
        asked.append(command)

    monkeypatch.setattr(calls.Call, "child", child)
    for variant in ("fastattn", "fastattn-gluon-n64-s3"):
        it = call()
        it.launched = {"launches": [{"variant": variant, "case": "a", "status": "timed out"}]}
        it.run_parity(60.0)
    assert asked[0][:2] == ["env", "FASTATTN_KERNELS=triton"]
    assert asked[1][0] == sys.executable


def test_torchs_own_samples_are_skipped_where_expecttest_is_missing():
    """As on a machine that was not set up for these tests: the others of the folder are collected all the same."""
    code = f"""
import sys
sys.modules["expecttest"] = None
import pytest
files = ["tests/ops/test_norm_samples.py", "tests/modules/test_multihead_attention_samples.py"]
files += {list(calls.PARITY_TESTS)!r}
sys.exit(pytest.main(["-q", "--collect-only", "-n", "0", *files]))
"""
    # a process of its own, and no worker of the run that this test is part of
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stdout[-2000:]
    assert "torch.testing._internal needs the expecttest package" in found.stdout
    assert "error" not in found.stdout.splitlines()[-1]


def launch_row(variant, case, status):
    return {"variant": variant, "case": case, "status": status, "reason": "so", "seconds": 1.0}


@pytest.fixture
def after(tmp_path):
    """What call 1 left: a wrong launch, a right one, and a test that failed."""
    folder = tmp_path / "after"
    folder.mkdir()
    case = "kernels-b2-h2-l512-d128-forward-bfloat16"
    launches = [launch_row("fastattn-gluon", case, "wrong"), launch_row("fastattn-triton", case, "ok")]
    (folder / "first_launches.json").write_text(json.dumps({"launches": launches, "left_out": []}))
    (folder / "call.json").write_text(json.dumps({"parity": {"failed": ["tests/ops/test_it.py::test_it[a]"]}}))
    return folder


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A program of this name on the path, written in Python."""

    def make(name, code):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def test_faults_of_call_1_are_looked_into_by_every_sanitizer(call, after, tool):
    tool(
        "compute-sanitizer",
        """
print("========= COMPUTE-SANITIZER")
if "memcheck" in sys.argv and "benchmarks.gpu.one" in sys.argv:
    print("========= Invalid __global__ read of size 4 bytes")
    sys.exit(int(sys.argv[sys.argv.index("--error-exitcode") + 1]))
""",
    )
    it = call("2", after=after)
    it.look_into_faults()
    key = "fastattn-gluon: kernels-b2-h2-l512-d128-forward-bfloat16"
    test = "tests/ops/test_it.py::test_it[a]"
    assert [(r["tool"], r["what"], r["verdict"]) for r in it.facts["sanitizer"]["rows"]] == [
        ("memcheck", key, "faults found"),
        ("memcheck", test, "nothing found"),
        *[(t, what, "nothing found") for t in ("racecheck", "synccheck") for what in (key, test)],
    ]
    it.save()
    said = (it.out / "answer.txt").read_text()
    assert f"memcheck: {key}: faults found: Invalid __global__ read of size 4 bytes" in said
    assert key in one.known()


def test_faults_that_nothing_looks_into_are_said(call, after):
    it = call("2", after=after)
    it.facts["versions"]["tools"]["compute-sanitizer"] = None
    it.look_into_faults()
    it.save()
    assert "2 faults were not looked into: compute-sanitizer is not there" in (it.out / "answer.txt").read_text()


def test_sanitizer_begins_nothing_that_it_has_no_time_for(tmp_path):
    rows = tools.sanitize({"a": ["a"]}, tmp_path / "log", lambda *_: 0, lambda: 9.0)
    assert {r["verdict"] for r in rows} == {"no time left"}


def test_call_2_does_not_launch_first_what_call_1_did(call, after, monkeypatch):
    done: list[Any] = []
    monkeypatch.setattr(calls.Call, "launch_first", lambda self: done.append("launches"))
    monkeypatch.setattr(calls.Call, "look_into_faults", lambda self: done.append("faults"))
    monkeypatch.setattr(calls.Call, "time_cases", lambda self, part, until, resume=False: done.append((part, resume)))
    monkeypatch.setattr(calls.Call, "profile", lambda self: done.append("ncu"))
    timed = [("rest", False), "ncu", ("rest", True)]
    it = call("2", after=after)
    calls._second(it)
    assert done == ["faults", *timed]
    assert "NO: first launch of fastattn-gluon" in (it.out / "answer.txt").read_text()
    done.clear()
    calls._second(call("2"))
    assert done == ["launches", *timed]


# ------------------------------------------------------------------------------------------------------------- profiles

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active","sm__warps_active.avg.pct_of_peak_sustained_active","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","","ns","%","%","inst","inst","inst"
"0","_attention_fwd_kernel","(132, 1, 1)","1,234,500","81.5","18.7","0.5","2.25","9"
"""  # noqa: E501


def test_ncu_is_a_line_for_each_kernel():
    (found,) = tools.ncu_rows(NCU)
    assert found["us"] == pytest.approx(1234.5)
    assert (found["tensor pipe %"], found["warps active %"]) == (81.5, 18.7)
    assert found["shared memory %"] is None
    assert found["stalls"] == {"wait": 2.25, "barrier": 0.5}
    assert tools.ncu_sentences([found]) == [
        "ncu: _attention_fwd_kernel: us 1234.5, tensor pipe % 81.5, warps active % 18.7; waits: wait 2.25, barrier 0.50"
    ]
    assert tools.ncu_rows("==ERROR== no permission") == []


def test_what_is_profiled_is_in_the_matrix():
    assert set(tools.PROFILED) <= set(one.known())


def test_profile_keeps_the_figures_and_leaves_out_what_failed(call, tool):
    tool("ncu", f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({NCU!r} + ' '.join(sys.argv))")
    it = call("2")
    it.launched = {"launches": [launch_row("fastattn-gluon", "kernels-b2-h2-l512-d128-forward-bfloat16", "wrong")]}
    it.profile()
    assert [r["kernel"] for r in it.facts["ncu"]] == ["_attention_fwd_kernel"] * 2
    figures = (it.out / "ncu.csv").read_text()
    assert "fastattn-gluon-pair: kernels" in figures and "fastattn-gluon: kernels" not in figures
    assert "--profile-from-start off" in figures


# ----------------------------------------------------------------------------------------------------------- the answer


def facts(**more) -> dict[str, Any]:
    return {"call": "1", "dry_run": False, "versions": {"date": "2026-11-29"}, "parts": {}, **more}


def kernel_rows(ours, cudnn):
    case = "kernels-b2-h16-l8192-d128-forward-bfloat16"
    more = {
        "family": "kernels",
        "batch": 2,
        "heads": 16,
        "seqlen": 8192,
        "head_dim": 128,
        "mask": "none",
        "weights": False,
    }
    more |= {"tflops": 600.0}
    return [row(case, "fastattn-gluon", ours, **more), row(case, "sdpa-cudnn", cudnn, **more)]


@pytest.mark.parametrize(("ours", "said"), [(1.0, "yes, 1.50 times as fast"), (2.0, "no, 0.75 times as fast")])
def test_answer_says_whether_ours_is_faster_than_cudnn(ours, said):
    found = answer.lines(facts(), {}, document(kernel_rows(ours, 1.5)))
    assert found[found.index("Faster than cuDNN?") + 1].startswith(f"  {said}: kernels-b2-h16-l8192")


def test_answer_names_what_is_wrong_first():
    wrong = {"launches": [launch_row("fastattn-gluon", "k", "wrong")], "left_out": []}
    found = answer.lines(facts(parity={"verdict": "failed: 2 tests"}), wrong, document(kernel_rows(1.0, 2.0)))
    at = found.index("Right?")
    assert found[at + 1 : at + 3] == [
        "  NO: first launch of fastattn-gluon: k: wrong: so",
        "  NO: parity failed: 2 tests",
    ]
    nothing = answer.lines(facts(), {}, {})
    assert nothing[nothing.index("Right?") + 1] == "  nothing of ours was seen to be right or wrong"


def test_barred_statuses_are_those_that_are_faults():
    assert "refused" not in first_launches.BARRED and "wrong" in first_launches.BARRED
