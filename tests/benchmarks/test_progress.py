"""How far a run is, on a terminal and in a pipe."""

import pytest

from benchmarks import progress
from benchmarks.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_time_left_follows_the_pace(clock):
    """A third of the guess took twice what it should: so will the rest."""
    with Progress(total=30.0) as shown:
        assert shown.left is None
        clock[0] = 20.0
        shown.advance(10.0)
        assert shown.left == pytest.approx(40.0)


def test_progress_in_a_pipe_is_a_line_now_and_then(clock, capsys):
    with Progress(total=40.0) as shown:
        shown.show("a")
        clock[0] = 20.0
        shown.advance(10.0)
        shown.show("b")
        shown.show("c")
    assert capsys.readouterr().err == "25%, 60 s left: b\n"


def test_progress_on_a_terminal_is_a_bar(clock, capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(total=40.0) as shown:
        clock[0] = 20.0
        shown.advance(10.0)
        shown.show("module-b1")
        assert shown._bar is not None
        (task,) = shown._bar.tasks
        assert (task.percentage, task.fields) == (25.0, {"left": "60 s left", "doing": "module-b1"})


def test_progress_on_a_terminal_without_rich_is_lines(clock, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(total=40.0) as shown:
        clock[0] = 20.0
        shown.show("module-b1")
    assert "module-b1" in capsys.readouterr().err
