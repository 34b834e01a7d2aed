"""The guard of a run on a GPU: no process outlives its limit, its caller or its command, whatever it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import children

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl and /proc are Linux's")

# What hangs in a kernel: deaf to every signal that can be ignored.
_DEAF = "import signal, time\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\n"

# Begins a deaf process in a session of its own, which begins another, and writes their ids.
_STUBBORN = f"""
import os, subprocess, sys, time
{_DEAF}
def write(name):
    with open(os.path.join(sys.argv[1], name + ".part"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(sys.argv[1], name + ".part"), os.path.join(sys.argv[1], name))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        write("grandchild")
        time.sleep(600)
    write("child")
    time.sleep(600)
"""


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def pids(folder, names=("child", "grandchild")):
    """Those that the stubborn processes have written, once they have."""
    end = time.monotonic() + 30
    while time.monotonic() < end and not all((folder / name).exists() for name in names):
        time.sleep(0.02)
    return [int((folder / name).read_text()) for name in names]


def assert_gone(processes):
    end = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        left = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def test_status_is_the_commands():
    assert children.run(python("raise SystemExit(3)"), 30.0) == 3
    assert children.run(python("import os; os.kill(os.getpid(), 9)"), 30.0) == 128 + 9
    assert children.run(["there-is-no-such-program"], 30.0, stderr=subprocess.DEVNULL) == 127


def test_output_and_environment_are_as_asked(tmp_path):
    with (tmp_path / "log").open("w") as log:
        code = "import os; print(os.environ['IT'], os.getcwd())"
        assert children.run(python(code), 30.0, environ={"IT": "it"}, cwd=tmp_path, stdout=log) == 0
    assert (tmp_path / "log").read_text() == f"it {tmp_path}\n"


def test_what_takes_too_long_is_killed_with_its_descendants_in_sessions_of_their_own(tmp_path):
    started = time.monotonic()
    assert children.run(python(f"{_STUBBORN}\ntime.sleep(600)", tmp_path), 4.0) is None
    assert time.monotonic() - started < 4.0 + children.KILL_SECONDS + 10.0
    assert_gone(pids(tmp_path))


def test_what_a_command_leaves_behind_is_killed_at_its_end(tmp_path):
    code = f"{_STUBBORN}\nwhile not os.path.exists(sys.argv[1] + '/grandchild'): time.sleep(0.02)"
    assert children.run(python(code, tmp_path), 30.0) == 0
    assert_gone(pids(tmp_path))


@pytest.mark.parametrize("whom", ["caller", "group"])
def test_death_of_the_caller_is_that_of_all(tmp_path, whom):
    """As when the time of the whole run is up, and it is killed: by SIGKILL, which nobody can pass on."""
    inner = python(f"{_STUBBORN}\nwrite('command')\ntime.sleep(600)", tmp_path)
    code = f"import runpy; runpy.run_path({children.__file__!r})['run']({inner!r}, 600.0)"
    caller = subprocess.Popen(python(code), start_new_session=True)
    try:
        found = pids(tmp_path, ("command", "child", "grandchild"))
    finally:
        (os.kill if whom == "caller" else os.killpg)(caller.pid, signal.SIGKILL)
        caller.wait(timeout=10)
    assert_gone(found)


def test_interrupt_is_passed_on_and_the_command_may_write(tmp_path):
    inner = f"""
import sys, time
try:
    with open({str(tmp_path / "begun")!r}, "w") as file:  # a file that is closed by chance would swallow the interrupt
        file.write("{os.getpid()}")
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "written")!r}, "w").write("yes")
"""
    code = f"""
import runpy
try:
    runpy.run_path({children.__file__!r})["run"]({python(inner)!r}, 600.0)
except KeyboardInterrupt:
    raise SystemExit(7)
"""
    caller = subprocess.Popen(python(code))
    pids(tmp_path, ("begun",))
    time.sleep(0.2)  # until it sleeps
    caller.send_signal(signal.SIGINT)
    assert caller.wait(timeout=30) == 7
    assert (tmp_path / "written").read_text() == "yes"


def test_guards_stand_within_guards(tmp_path):
    """The outer limit ends the inner guard, too, and what that one guards."""
    inner = python(f"{_STUBBORN}\ntime.sleep(600)", tmp_path)
    code = f"import runpy; runpy.run_path({children.__file__!r})['run']({inner!r}, 600.0)"
    assert children.run(python(code), 4.0) is None
    assert_gone(pids(tmp_path))
