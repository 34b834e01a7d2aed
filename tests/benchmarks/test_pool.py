"""The pool of processes under a watchdog: what hangs, dies or raises becomes a report, and the rest goes on."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import pool
from benchmarks.gpu.pool import Task
from tests.benchmarks import stub_tasks as stubs


def run(tasks, *, workers=2, limit=30.0, budget=60.0):
    """``{key: report}``, and the keys of what is left out."""
    reports = {}
    left_out = pool.run(
        tasks, workers=workers, limit=limit, budget=budget, tell=lambda task, report: reports.update({task.key: report})
    )
    return reports, [task.key for task in left_out]


def test_pool_does_the_tasks_in_as_many_processes_as_it_may():
    tasks = [Task(f"right {i}", "right", stubs.right, (i,)) for i in range(4)]
    reports, left_out = run([*tasks, *(Task(f"process {i}", "process", stubs.process) for i in range(4))])
    assert [reports[task.key].result for task in tasks] == [0, 1, 2, 3]
    assert {report.fate for report in reports.values()} == {"done"}
    assert 1 <= len({reports[f"process {i}"].result for i in range(4)}) <= 2
    assert left_out == []


def test_pool_survives_what_hangs_dies_and_raises():
    """One worker: each of them has to be replaced, or to go on, for the last task to be done."""
    bad = [Task(f.__name__, f.__name__, f) for f in (stubs.dies, stubs.sleeps, stubs.raises)]
    started = time.monotonic()
    reports, left_out = run([*bad, Task("right", "right", stubs.right, (7,))], workers=1, limit=1.0)
    assert {key: report.fate for key, report in reports.items()} == {
        "dies": "died",
        "sleeps": "hung",
        "raises": "raised",
        "right": "done",
    }
    assert "exit status -9" in reports["dies"].reason
    assert reports["sleeps"].reason == "gave no sign of life for 1 s: its process was ended"
    assert reports["sleeps"].seconds >= 1.0
    assert reports["raises"].reason == "ZeroDivisionError: of nought"
    assert reports["right"].result == 7
    assert left_out == []
    assert time.monotonic() - started < 30.0


def test_pool_replaces_a_process_that_is_of_no_more_use():
    tasks = [Task("ruins", "ruins", stubs.ruins), Task("process", "process", stubs.process)]
    reports, _ = run(tasks, workers=1)
    assert reports["ruins"].fate == "raised"
    assert not reports["ruins"].reason.endswith(f"in {reports['process'].result}")


def test_task_of_a_process_that_had_died_before_goes_to_another(monkeypatch):
    begin, died = pool._Worker.begin, []

    def begin_too_late(worker, task, limit):
        if not died:
            died.append(task.key)
            worker.end()
        begin(worker, task, limit)

    monkeypatch.setattr(pool._Worker, "begin", begin_too_late)
    reports, left_out = run([Task("right", "right", stubs.right, (7,))], workers=1)
    assert died == ["right"]
    assert reports["right"].result == 7
    assert left_out == []


def test_pool_gives_up_on_a_group_that_keeps_hanging():
    tasks = [Task(f"sleeps {i}", "sleeps", stubs.sleeps) for i in range(4)]
    reports, left_out = run([*tasks, Task("right", "right", stubs.right, (7,))], workers=1, limit=0.3)
    assert [reports[task.key].fate for task in tasks] == ["hung", "hung", "skipped", "skipped"]
    assert reports["right"].fate == "done"
    assert left_out == []


def test_pool_ends_with_its_budget():
    started = time.monotonic()
    reports, left_out = run([Task(key, key, stubs.sleeps) for key in "abc"], limit=600.0, budget=1.0)
    assert reports == {}
    assert sorted(left_out) == ["a", "b", "c"]
    assert time.monotonic() - started < 20.0


def test_pool_does_not_wait_for_each_of_the_processes_that_will_not_die(monkeypatch):
    """Sixteen that a driver holds would cost a run its time, one after the other."""
    monkeypatch.setattr(pool, "_KILL_SECONDS", 1.0)
    monkeypatch.setattr(pool._Worker, "kill", lambda worker: None)
    started = time.monotonic()
    _, left_out = run([Task(key, key, stubs.pauses) for key in "abcd"], workers=4, limit=600.0, budget=0.5)
    assert len(left_out) == 4
    assert time.monotonic() - started < 0.5 + 2 * pool._KILL_SECONDS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_process_of_a_pool_that_is_killed_dies_with_it(tmp_path):
    code = f"""
from benchmarks.gpu import pool
from tests.benchmarks import stub_tasks as stubs
if __name__ == "__main__":
    task = pool.Task("it", "it", stubs.writes_and_sleeps, ({str(tmp_path / "pid")!r},))
    pool.run([task], workers=1, limit=600.0, budget=600.0, tell=print)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, str(script)], env=environ)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.02)
    worker = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait(timeout=10)
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists()


def test_pool_judges_what_it_cuts_off_by_the_time_that_it_had():
    """After half of its limit it has hung; what had just begun is left out, as is what never began."""
    reports = {}
    cut_off: Any = pool._Pool(
        [Task("c", "c", stubs.right)], 60.0, lambda task, report: reports.update({task.key: report})
    )
    cut_off._workers = [
        types.SimpleNamespace(task=Task(key, key, stubs.sleeps), since=time.monotonic() - seconds)
        for key, seconds in (("a", 31.0), ("b", 29.0))
    ]
    assert [task.key for task in cut_off._cut_off()] == ["b", "c"]
    assert reports["a"].fate == "hung"
    assert reports["a"].reason == "no answer after 31 s, when the time was up"


def test_pool_whose_processes_never_start_leaves_all_out(monkeypatch):
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)
    reports, left_out = run([Task("right", "right", stubs.right, (7,))], budget=20.0)
    assert reports == {}
    assert left_out == ["right"]


def test_pool_without_tasks_starts_nothing(monkeypatch):
    monkeypatch.setattr(pool, "_Worker", None)
    assert run([]) == ({}, [])
