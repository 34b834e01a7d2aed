"""The digits of S8: scenes are what they say; the quick experiment shows what the lecture claims."""

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import fastattn
from benchmarks.lecture import digits
from benchmarks.lecture.digits import (
    CELL,
    EXPERIMENT,
    HEIGHT,
    SIDE,
    WIDTH,
    Scenes,
    accuracy,
    draw_scenes,
    handwriting,
    looked_at,
)
from fastattn.models.cnn import ConvNet


@pytest.fixture(autouse=True)
def _one_thread_of_compiled_code():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastattn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


def scenes(seed, count=300, **options):
    return draw_scenes(handwriting(held_out=False), count, torch.Generator().manual_seed(seed), **options)


def test_handwriting_is_learned_from_or_held_out():
    learned, held_out = handwriting(False), handwriting(True)
    assert len(learned.classes) + len(held_out.classes) == 1797
    assert learned.images.shape[1:] == (SIDE, SIDE)
    assert (learned.images.min(), learned.images.max()) == (0, 1)
    assert set(held_out.classes.tolist()) == set(learned.classes.tolist()) == set(range(10))


def test_scenes_hold_the_digits_that_they_name(seed):
    """At the places that they name; and the label is the one that the pointer means."""
    drawn = scenes(seed)
    known = {image.numpy().tobytes(): int(c) for image, c in zip(*handwriting(False))}
    for image, label, places, classes in zip(*drawn):
        for (row, column), digit in zip(places.tolist(), classes.tolist()):
            found = image[0, row : row + SIDE, column : column + SIDE].contiguous()
            assert known[found.numpy().tobytes()] == digit
        assert int(classes[0]) in (1, 2)
        assert label == classes[1 if classes[0] == 1 else 2]
        assert places[1, 0] + SIDE <= places[2, 0], "the upper one is above the lower one"
    assert drawn.labels.unique().tolist() == list(range(10))
    assert drawn.digits[:, 0].float().mean().item() == pytest.approx(1.5, abs=0.15)


def test_no_window_spans_both_ends(seed):
    """The gap is wider than the 18 pixels that a ConvNet without attention sees at once; and there is clutter in it."""
    drawn = scenes(seed)
    gap = drawn.places[:, 1:, 1].min() - (drawn.places[:, 0, 1].max() + SIDE)
    assert gap >= 18
    empty = scenes(seed, clutter=0)
    between = slice(2 + SIDE, WIDTH - SIDE - 2)
    assert not empty.images[..., between].any()
    assert (drawn.images[..., between].sum((1, 2, 3)) > 0).all()


def test_scenes_depend_on_the_seed_alone():
    first, again, other = scenes(1, 5), scenes(1, 5), scenes(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images)


def test_what_is_covered_and_looked_at(monkeypatch):
    """A pointer in the middle of the left covers the cells it reaches into; weights on them are counted, by digit."""
    places = torch.tensor([[[5, 0], [0, 38], [11, 40]]])
    covered = digits._covered_cells(places)[0]
    assert covered.shape == (3, HEIGHT // CELL, WIDTH // CELL)
    assert covered[0].nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (0, 1)]
    assert covered[1].nonzero().tolist() == [[r, c] for r in (0, 1) for c in (9, 10, 11)]

    weights = torch.zeros(1, 5, 12, 5, 12)
    weights[0, :, :, 0, 9] = 0.75  # on the upper one
    weights[0, :, :, 4, 11] = 0.25  # on the lower one
    model = ConvNet(1, 10)
    monkeypatch.setattr(model, "attention_map", lambda images: weights)
    scene = Scenes(torch.zeros(1, 1, HEIGHT, WIDTH), torch.tensor([3]), places, torch.tensor([[1, 3, 4]]))
    maps, on_digit = looked_at(model, scene)
    assert on_digit.tolist() == [[0.0, 0.75, 0.25]]
    assert maps[0, 0, 9] == 0.75


def test_who_knows_both_digits_and_not_which_is_right_as_often_as_said(seed):
    """The bar that no sum of what windows find can pass: one digit of the two, at random or always the same one."""
    drawn = scenes(seed, 4000)
    assert (drawn.digits[:, 1] == drawn.labels).double().mean().item() == pytest.approx(digits.CHANCE, abs=0.03)


# Each seed takes the half of a minute: further ones run by ``python -m pytest -m resources tests/benchmarks``
@pytest.mark.parametrize("run_seed", [0, *(pytest.param(s, marks=pytest.mark.resources) for s in (1, 2))])
def test_quick_experiment_holds(run_seed, tmp_path):
    """With attention the network chooses, without it cannot; and the pointer looks at the digit that it means."""
    result = EXPERIMENT.run(True, run_seed, lambda line: None)
    assert [claim for claim in result["claims"] if not claim["holds"]] == []
    assert json.loads(json.dumps(result)) == result
    assert {row["network"] for row in result["rows"]} == set(result["curves"])
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    EXPERIMENT.draw(result).savefig(tmp_path / "digits.svg")


def test_learning_repeats():
    held_out = scenes(7, 50)
    curves = [digits.learn("attention", 3, 5, held_out, lambda line: None)[1] for _ in range(2)]
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0]] == [0, 1, 2, 3]
    model, _ = digits.learn("attention", 0, 5, held_out, lambda line: None)
    assert accuracy(model, held_out) == curves[0][0]["accuracy"]
