"""The lecture's command line: what it prints and writes, and what its exit status says; all experiments are known."""

import json

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import torch

from benchmarks.lecture import command_line, experiments
from benchmarks.lecture.experiment import Experiment


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toys(monkeypatch):
    """Two experiments of no time; the second one's claim holds for even seeds."""
    asked = []

    def toy(name):
        def run(quick, seed, say):
            asked.append((name, quick, seed, torch.get_num_threads()))
            say(f"{name} is at work")
            holds = name == "one" or seed % 2 == 0
            rows = [{"network": "small", "right": 0.123456}, {"network": "large", "alike": True}]
            return {"rows": rows, "claims": [{"text": f"{name} is so", "value": 1.0, "bound": 0.5, "holds": holds}]}

        def draw(result):
            from matplotlib.figure import Figure

            figure = Figure()
            figure.subplots().plot([row.get("right", 0) for row in result["rows"]])
            return figure

        return Experiment(name, ("S1",), f"{name} works.", run, draw)

    monkeypatch.setattr(command_line, "experiments", lambda: {name: toy(name) for name in ("one", "two")})
    return asked


def test_experiments_are_complete():
    found = experiments()
    assert {system for experiment in found.values() for system in experiment.systems} >= {
        "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S10",
    }  # fmt: skip
    for name, experiment in found.items():
        assert name == experiment.name
        assert experiment.claim.endswith(".")


def test_all_run_on_one_thread_and_are_printed(toys, capsys):
    assert command_line.main(["--quick"]) == 0
    assert toys == [("one", True, 0, 1), ("two", True, 0, 1)]
    said = capsys.readouterr().out
    for text in (
        "one (S1): one works.",
        "two is at work",
        "network  right  alike",
        "small    0.123",
        "large           yes",
        "two is so  1      0.5    yes",
    ):
        assert text in said


def test_one_is_chosen(toys):
    assert command_line.main(["--only", "two", "--seed", "4"]) == 0
    assert toys == [("two", False, 4, 1)]


def test_claim_that_does_not_hold_is_an_error(toys, capsys):
    assert command_line.main(["--seed", "1"]) == 1
    assert capsys.readouterr().err == "two: does not hold: two is so\n"


def test_unknown_experiment_is_refused(toys, capsys):
    with pytest.raises(SystemExit) as status:
        command_line.main(["--only", "three"])
    assert status.value.code == 2
    assert "'three'" in capsys.readouterr().err


def test_files_are_written_and_repeat(toys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folders = [tmp_path / "a" / "deep", tmp_path / "b"]
    for folder in folders:
        assert command_line.main(["--only", "one", "--seed", "3", "--out", str(folder)]) == 0
    names = ["one.json", "one.png", "one.svg"]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names[1:])
    document, again = (json.loads((folder / "one.json").read_text()) for folder in folders)
    assert 0 <= document.pop("seconds") < 60
    assert 0 <= again.pop("seconds") < 60
    assert document == again
    assert (document["name"], document["systems"], document["seed"], document["quick"]) == ("one", ["S1"], 3, False)
    assert document["rows"][0] == {"network": "small", "right": 0.123456}
