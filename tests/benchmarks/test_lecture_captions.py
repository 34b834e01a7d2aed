"""The captions of S3: pictures show what their captions say; the quick experiment shows what the lecture claims."""

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import fastattn
from benchmarks.lecture.captions import (
    CELL,
    END,
    EXPERIMENT,
    SHARE,
    SIDE,
    START,
    WORDS,
    Pictures,
    Size,
    behind_the_end,
    draw_pictures,
    learn,
    looked_at,
    right_captions,
)
from benchmarks.lecture.digits import handwriting
from fastattn.models import ImageCaptioner
from fastattn.models.attention_decoder import Decoded

TINY = Size(cells=2, most=2, steps=5, asked=3, batch=4, channels=4)


@pytest.fixture(autouse=True)
def _one_thread_of_compiled_code():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastattn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


def pictures(seed, count=300, cells=3, most=4):
    return draw_pictures(handwriting(held_out=False), count, cells, most, torch.Generator().manual_seed(seed))


def test_pictures_hold_what_their_captions_say(seed):
    """In reading order the digits of the cells, found by their very pixels; all other cells are empty."""
    known = {image.numpy().tobytes(): int(c) for image, c in zip(*handwriting(False))}
    drawn = pictures(seed)
    for image, caption, places in zip(*drawn):
        read, where = [], []
        for cell in range(9):
            row, column = CELL * (cell // 3), CELL * (cell % 3)
            pixels = image[0, row : row + CELL, column : column + CELL]
            if not pixels.any():
                continue
            corners = [(y, x) for y in range(CELL - SIDE + 1) for x in range(CELL - SIDE + 1)]
            found = {known.get(pixels[y : y + SIDE, x : x + SIDE].contiguous().numpy().tobytes()) for y, x in corners}
            (digit,) = found - {None}
            read.append(digit)
            where.append(cell)
        assert caption.tolist() == [START, *read, *[END] * (5 - len(read))]
        assert places.tolist() == where + [-1] * (4 - len(where))
    assert (drawn.places >= 0).sum(1).unique().tolist() == [1, 2, 3, 4]
    assert drawn.places.unique().tolist() == list(range(-1, 9))
    assert drawn.captions.unique().tolist() == list(range(len(WORDS)))


def test_digits_stand_anywhere_in_their_cells(seed):
    """Which have more rows and columns than a digit: there is ink in every one of them, in some picture."""
    ink = pictures(seed, cells=1, most=1).images[:, 0].sum(0) > 0
    assert ink.any(dim=0).all()
    assert ink.any(dim=1).all()


def test_pictures_depend_on_the_seed_alone():
    first, again, other = pictures(1, 5), pictures(1, 5), pictures(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images)


def test_nothing_is_asked_behind_the_end():
    captions = torch.tensor([[START, 3, END, END, END], [START, 1, 2, 3, END]])
    assert behind_the_end(captions).tolist() == [[False, False, False, True, True], [False] * 5]


def test_captions_are_right_to_their_end(monkeypatch):
    captions = torch.tensor([[START, 3, END, END], [START, 3, 4, END], [START, 5, END, END]])
    said = torch.tensor([[START, 3, END], [START, 3, END], [START, 6, END]])
    model = ImageCaptioner(1, len(WORDS), (CELL, CELL))
    monkeypatch.setattr(model, "generate", lambda *args, **options: Decoded(said, None, torch.zeros(3)))
    drawn = Pictures(torch.zeros(3, 1, CELL, CELL), captions, torch.zeros(3, 2))
    assert right_captions(model, drawn).tolist() == [True, False, False]


def test_what_is_looked_at_is_the_cell_of_the_heaviest_weight(monkeypatch):
    """Every position of the grid, one after the other, in pictures of 2 x 2 cells."""
    side = 2 * SHARE
    weights = torch.eye(side * side)[None]
    monkeypatch.setattr(ImageCaptioner, "forward", lambda *args, **options: (None, weights))
    places = torch.zeros(1, side * side, dtype=torch.int64)
    model = ImageCaptioner(1, len(WORDS), (2 * CELL, 2 * CELL))
    cells, maps = looked_at(model, Pictures(torch.zeros(1), torch.zeros(1, 2 + side * side), places))
    assert maps.shape == (1, side * side, side, side)
    expected = torch.arange(4).view(2, 2).repeat_interleave(SHARE, 0).repeat_interleave(SHARE, 1)
    assert torch.equal(cells[0].view(side, side), expected)


def test_learning_repeats():
    states = [learn(TINY, True, 3, lambda line: None).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = learn(TINY, True, 4, lambda line: None).state_dict()
    assert not torch.equal(other["summary.weight"], states[0]["summary.weight"])


# Each seed takes the half of a minute: further ones run by ``python -m pytest -m resources tests/benchmarks``
@pytest.mark.parametrize("run_seed", [0, *(pytest.param(s, marks=pytest.mark.resources) for s in (1, 2))])
def test_quick_experiment_holds(run_seed, tmp_path):
    """With attention captions of three digits are right, without they are not; and each word looks at its digit."""
    result = EXPERIMENT.run(True, run_seed, lambda line: None)
    assert [claim for claim in result["claims"] if not claim["holds"]] == []
    assert json.loads(json.dumps(result)) == result
    for example in result["shown"]:
        assert len(example["words"]) == len(example["weights"])
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    EXPERIMENT.draw(result).savefig(tmp_path / "captions.svg")
    EXPERIMENT.draw(result | {"shown": []}).savefig(tmp_path / "nothing-right.svg")
