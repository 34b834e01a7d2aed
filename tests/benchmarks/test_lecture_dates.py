"""The dates of S1 and S2: lines and translations are right; the quick experiment shows what the lecture claims."""

import datetime
import json
import random
import re

import pytest
import torch

import fastattn
from benchmarks.lecture import dates
from benchmarks.lecture.dates import EXPERIMENT, Size, ask, learn, looked_at
from benchmarks.lecture.written_dates import (
    FORMS,
    SOURCE_LETTERS,
    STRIDE,
    TARGET_LETTERS,
    as_numbers,
    draw_line,
    draw_lines,
    write,
)
from fastattn.models import Seq2Seq
from fastattn.models.attention_decoder import Decoded

TINY = Size(most=2, steps=5, steps_of_two=2, asked=3, batch=4, hidden=8, attention_dim=4)


@pytest.fixture(autouse=True)
def _one_thread_of_compiled_code():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastattn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("day", "written"),
    [
        (
            datetime.date(2026, 11, 22),
            (
                "22 November 2026",
                "Sunday 22 November 2026",
                "22/11/26",
                "22.11.2026",
                "Nov 22, 2026",
                "November 22nd, 2026",
                "the 22nd of November 2026",
                "Sun, 22 Nov 26",
            ),
        ),
        (
            datetime.date(2003, 5, 1),
            (
                "1 May 2003",
                "Thursday 1 May 2003",
                "1/5/03",
                "01.05.2003",
                "May 1, 2003",
                "May 1st, 2003",
                "the 1st of May 2003",
                "Thu, 1 May 03",
            ),
        ),
    ],
    ids=str,
)
def test_dates_are_written_as_people_do(day, written):
    assert tuple(write(day, form)[0] for form in FORMS) == written


def test_days_have_their_endings():
    said = {day: write(datetime.date(2000, 1, day), "{nth}")[0] for day in range(1, 32)}
    special = {1: "1st", 2: "2nd", 3: "3rd", 21: "21st", 22: "22nd", 23: "23rd", 31: "31st"}
    assert said == {day: special.get(day, f"{day}th") for day in range(1, 32)}


def test_letters_know_their_field():
    text, fields = write(datetime.date(2026, 11, 22), "{weekday} {day} {month} {year}")
    assert len(text) == len(fields)
    assert [text[i] for i, field in enumerate(fields) if field == 2] == [*"22 "]
    assert [text[i] for i, field in enumerate(fields) if field == 1] == [*"November "]
    assert [text[i] for i, field in enumerate(fields) if field == 0] == [*"2026"]


@pytest.mark.parametrize("held_out", [False, True])
def test_every_fifth_day_is_held_out(seed, held_out):
    stream, first = random.Random(seed), datetime.date(1970, 1, 1)
    for _ in range(200):
        _, translated, _ = draw_line(stream, 2, held_out)
        for text in translated.split(" "):
            assert ((datetime.date.fromisoformat(text) - first).days % 5 == 0) == held_out


def test_lines_say_what_their_translation_says(seed):
    """Each field's digits, read back by plain rules from the letters that are said to be of it."""
    months = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
    stream = random.Random(seed)
    for _ in range(200):
        text, translated, fields = draw_line(stream, 3, False)
        assert len(text) == len(fields)
        for number, right in enumerate(translated.split(" ")):
            parts = ["".join(c for c, f in zip(text, fields) if f == 3 * number + field) for field in range(3)]
            year, day = (int(re.sub(r"\D", "", part)) for part in (parts[0], parts[2]))
            month = re.sub(r"[^a-z0-9]", "", parts[1].lower().replace(" of ", ""))
            month = int(month) if month.isdigit() else months.index(month[:3]) + 1
            year += 0 if year > 99 else 2000 if year < 70 else 1900
            assert datetime.date(year, month, day).isoformat() == right


def test_numbers_are_letters(seed):
    """Padded behind the end of the shorter lines, with the number that no letter has; translations need none."""
    lines = draw_lines(random.Random(seed), 20, 2)
    texts, translations, fields = zip(
        *(draw_line(stream, 2, False) for stream in [random.Random(seed)] for _ in range(20))
    )
    assert lines.source.shape == lines.fields.shape == (20, max(map(len, texts)))
    assert lines.target.shape == (20, 2 * STRIDE + 1)
    for row, text in zip(lines.source.tolist(), texts):
        assert "".join(SOURCE_LETTERS[i] for i in row) == text.ljust(len(row), SOURCE_LETTERS[0])
    for row, text in zip(lines.target.tolist(), translations):
        assert "".join(TARGET_LETTERS[i] for i in row) == f"^{text}$"
    assert [row[: len(f)] for row, f in zip(lines.fields.tolist(), fields)] == [*map(list, fields)]
    assert (lines.fields[lines.source == 0] == -1).all()


# ----------------------------------------------------------------------------------------------------------- experiment


def test_what_is_said_is_counted(monkeypatch):
    """Two lines of two dates: one right, the other ended early behind a date that is wrong in one letter."""
    target = as_numbers(["^2026-11-22 1999-04-03$"] * 2, TARGET_LETTERS)
    said = as_numbers(["^2026-11-22 1999-04-03$", "^2026-11-23$$$$$$$$$$$$"], TARGET_LETTERS)
    model = Seq2Seq(len(SOURCE_LETTERS), len(TARGET_LETTERS))
    monkeypatch.setattr(model, "generate", lambda *args, **options: Decoded(said, None, torch.zeros(2)))
    lines = dates.Lines(torch.ones(2, 3, dtype=torch.int64), target, torch.zeros(2, 3))
    right = ask(model, lines)
    assert (right["lines"], right["dates"]) == (0.5, 0.5)
    assert right["letters"] == pytest.approx((22 + 10) / 44)  # of the other nine of a date, and the last end

    # All ended: what was not said is an end
    said = said[1:, :12].expand(2, -1)
    assert ask(model, lines)["letters"] == pytest.approx(10 / 22)


def test_what_is_looked_at_is_counted(monkeypatch):
    """A model that looks at the year for the year, at the day for the month, and at another date for the day."""
    line = draw_lines(random.Random(0), 1, 2)
    weights = torch.zeros(1, line.target.shape[1] - 1, line.source.shape[1])
    for date in range(2):
        for said, field in ((slice(0, 4), 3 * date), (slice(5, 7), 3 * date + 2), (slice(8, 10), 3 * (1 - date) + 2)):
            rows = slice(STRIDE * date + said.start, STRIDE * date + said.stop)
            weights[0, rows, (line.fields[0] == field).nonzero()[0, 0]] = 1.0
    monkeypatch.setattr(Seq2Seq, "forward", lambda *args, **options: (None, weights))
    found = looked_at(Seq2Seq(len(SOURCE_LETTERS), len(TARGET_LETTERS)), line)
    assert found.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_learning_repeats():
    states = [learn(TINY, True, 3, lambda line: None).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = learn(TINY, True, 4, lambda line: None).state_dict()
    assert not torch.equal(other["encoder.weight_ih_l0"], states[0]["encoder.weight_ih_l0"])


def test_both_networks_see_the_same_lines(monkeypatch):
    seen = []
    loss = Seq2Seq.loss
    monkeypatch.setattr(Seq2Seq, "loss", lambda model, *args: seen.append(args[0]) or loss(model, *args))
    for attention in (False, True):
        learn(TINY, attention, 0, lambda line: None)
    assert len(seen) == 10
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:]))


# Each seed takes the half of a minute: further ones run by ``python -m pytest -m resources tests/benchmarks``
@pytest.mark.parametrize("run_seed", [0, *(pytest.param(s, marks=pytest.mark.resources) for s in (1, 2))])
def test_quick_experiment_holds(run_seed, tmp_path):
    """With attention lines of two dates are translated, without they are not; and it looks at the right fields."""
    result = EXPERIMENT.run(True, run_seed, lambda line: None)
    assert [claim for claim in result["claims"] if not claim["holds"]] == []
    assert json.loads(json.dumps(result)) == result
    alignment = result["alignment"]
    assert len(alignment["weights"]) == len(alignment["said"])
    assert {len(row) for row in alignment["weights"]} == {len(alignment["read"])}
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    EXPERIMENT.draw(result).savefig(tmp_path / "dates.svg")
