"""A run under way: what a budget, Ctrl-C, a kill and a hang cost, and that a resumption loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import jobs
from benchmarks.jobs import HUNG, Job, carry_out, new_document, resumed, spread_out
from benchmarks.reporting.document import read_run
from benchmarks.run_case import DeviceLost

ROOT = Path(__file__).parents[2]
SETTINGS = {"quick": True, "only": "", "budget": None}
FACTS = {"torch": "2.13.0", "threads": 1, "commit": "abc"}


def row(key):
    names = ("wall_ms", "ratio", "best", "best_ratio", "rounds", "contended", "others", "peak_mib")
    said = {"case": key, "family": "module", "variant": "fastattn", "status": "refused", "reason": "not here"}
    return {**dict.fromkeys(names), **said}


def job(key, *, kind="one", seconds=1.0, before=lambda: None):
    def work(document, hung, tell):
        before()
        tell("fastattn", "checking")
        return {"results": [row(key)], "theory": {key: []}}

    return Job(key, kind, seconds, work)


def document():
    return new_document(dict(SETTINGS), dict(FACTS))


def keys(found):
    return [result["case"] for result in found["results"]]


def test_run_is_on_disk_after_each_job(tmp_path):
    path, found, seen = tmp_path / "run.json", document(), []

    def look():
        on_disk = read_run(path)
        seen.append((on_disk["state"], on_disk["done"], keys(on_disk)))

    carry_out([job("a"), job("b", before=look)], found, path)
    assert seen == [("running", ["a"], ["a"])]
    assert read_run(path) == found
    assert found["state"] == "complete"
    assert keys(found) == list(found["theory"]) == ["a", "b"]


def test_run_without_a_file_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    carry_out([job("a")], document(), None)
    assert not list(tmp_path.iterdir())


def test_run_interrupted_keeps_what_is_done_and_resumes(tmp_path):
    path, tries = tmp_path / "run.json", []

    def interrupt():
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt

    jobs = [job("a"), job("b", before=interrupt), job("c")]
    carry_out(jobs, document(), path)
    first = read_run(path)
    assert (first["state"], keys(first), first["left_out"]) == ("interrupted", ["a"], ["b", "c"])

    again = resumed(path, dict(SETTINGS), dict(FACTS))
    carry_out(jobs, again, path)
    assert (again["state"], keys(again), again["left_out"]) == ("complete", ["a", "b", "c"], [])
    assert len(tries) == 2


def test_job_that_breaks_down_is_named_and_tried_again(tmp_path):
    path, tries = tmp_path / "run.json", []

    def fail():
        tries.append(1)
        if len(tries) == 1:
            raise ZeroDivisionError("of nought")

    jobs = [job("a"), job("b", before=fail), job("c")]
    carry_out(jobs, document(), path)
    first = read_run(path)
    assert (keys(first), first["failed"]) == (["a", "c"], {"b": "ZeroDivisionError: of nought"})
    again = resumed(path, dict(SETTINGS), dict(FACTS))
    carry_out(jobs, again, path)
    assert (keys(again), again["failed"]) == (["a", "c", "b"], {})


def test_run_whose_gpu_is_lost_ends_to_be_resumed(tmp_path):
    def lose():
        raise DeviceLost("fastattn")

    path = tmp_path / "run.json"
    with pytest.raises(SystemExit) as status:
        carry_out([job("a"), job("b", before=lose)], document(), path)
    assert status.value.code == HUNG
    assert read_run(path)["hung"] == {"b": ["fastattn"]}
    assert keys(read_run(path)) == ["a"]


def test_run_leaves_out_what_its_budget_does_not_hold(tmp_path):
    """The large one does not fit; the small one behind it does. A larger budget brings the rest."""
    path, jobs = tmp_path / "run.json", [job("a"), job("large", seconds=50.0), job("small")]
    carry_out(jobs, document(), path, budget=30.0)
    first = read_run(path)
    assert (keys(first), first["left_out"], first["state"]) == (["a", "small"], ["large"], "complete")

    again = resumed(path, {**SETTINGS, "budget": 90.0}, dict(FACTS))
    carry_out(jobs, again, path, budget=90.0)
    assert (keys(again), again["left_out"]) == (["a", "small", "large"], [])


def test_run_knows_a_slow_machine(monkeypatch):
    """Jobs that took ten times their guess: what follows is guessed to take ten times its own."""
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 10.0

    found = document()
    carry_out([job("a", before=slow), job("b", before=slow), job("c", before=slow)], found, None, budget=25.0)
    assert (keys(found), found["left_out"]) == (["a", "b"], ["c"])
    assert found["seconds"] == 20.0


def test_budget_is_of_a_sitting(monkeypatch):
    """So that what is printed for going on goes on."""
    now = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    found = document() | {"seconds": 29.5}
    carry_out([job("a")], found, None, budget=30.0)
    assert (found["left_out"], found["seconds"]) == ([], 29.5)


@pytest.mark.parametrize(
    ("settings", "facts", "named"),
    [
        ({**SETTINGS, "quick": False}, FACTS, "--quick True, and now it is False"),
        (SETTINGS, {**FACTS, "torch": "2.11.0"}, "torch 2.13.0, and now it is 2.11.0"),
        (SETTINGS, {**FACTS, "commit": "abd"}, "commit abc, and now it is abd"),
    ],
    ids=["settings", "torch", "commit"],
)
def test_resume_refuses_another_run(tmp_path, settings, facts, named):
    path = tmp_path / "run.json"
    carry_out([job("a")], document(), path)
    with pytest.raises(ValueError, match="--resume") as error:
        resumed(path, settings, facts)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_resume_without_a_run_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        resumed(tmp_path / "nowhere.json", dict(SETTINGS), dict(FACTS))


def test_jobs_of_every_kind_are_spread_over_the_run():
    jobs = [job(f"a{i}", kind="a") for i in range(4)] + [job(f"b{i}", kind="b") for i in range(2)]
    assert [j.key for j in spread_out(jobs)] == ["a0", "b0", "a1", "a2", "b1", "a3"]


# In a process of its own, since it has to die.
_CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from benchmarks.jobs import Job, carry_out, new_document, resumed
from test_jobs import FACTS, SETTINGS, job, row

def sleeps(document, hung, tell):
    if {part!r} in hung:
        return {{"results": [row("sleeper")]}}
    tell({part!r}, "timing")
    print("asleep", flush=True)
    time.sleep(60)

path = Path(sys.argv[1])
document = resumed(path, dict(SETTINGS), dict(FACTS)) if path.exists() else new_document(SETTINGS, FACTS)
carry_out([job("a"), Job("sleeper", "one", 1.0, sleeps), job("b")], document, path, watch={watch})
"""


def child(path, *, watch, part="variant"):
    code = _CHILD.format(root=str(ROOT), tests=str(Path(__file__).parent), watch=watch, part=part)
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_run_that_is_killed_resumes_and_loses_nothing(tmp_path):
    path = tmp_path / "run.json"
    process = child(path, watch=None)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = resumed(path, dict(SETTINGS), dict(FACTS))
    assert (found["state"], keys(found)) == ("running", ["a"])
    carry_out([job("a", before=lambda: pytest.fail("a was done")), job("b")], found, path)
    assert keys(read_run(path)) == ["a", "b"]


def test_watchdog_ends_a_process_that_hangs_and_the_next_one_goes_on(tmp_path):
    path = tmp_path / "run.json"
    began = time.monotonic()
    process = child(path, watch=0.5)
    process.communicate(timeout=50)
    assert process.returncode == HUNG
    assert time.monotonic() - began < 50
    assert json.loads(path.read_text())["hung"] == {"sleeper": ["variant"]}
    process = child(path, watch=0.5)
    process.communicate(timeout=50)
    assert process.returncode == 0
    assert keys(read_run(path)) == ["a", "sleeper", "b"]


def test_watchdog_that_bit_a_whole_job_has_it_left_out(tmp_path):
    path = tmp_path / "run.json"
    for status in (HUNG, 0):
        process = child(path, watch=0.5, part="")
        process.communicate(timeout=50)
        assert process.returncode == status
    found = read_run(path)
    assert (keys(found), found["left_out"]) == (["a", "b"], ["sleeper"])
