"""Lines of dates as people write them, their translation, and of each letter which part of which date it is."""

from __future__ import annotations

import datetime
import random
import string
from typing import NamedTuple

import torch
from torch import Tensor

FIRST, LAST = datetime.date(1970, 1, 1), datetime.date(2069, 12, 31)  # so that 69 is 2069, and 70 is 1970
FORMS = (
    "{day} {month} {year}",
    "{weekday} {day} {month} {year}",
    "{day}/{m}/{yy}",
    "{dd}.{mm}.{year}",
    "{mon} {day}, {year}",
    "{month} {nth}, {year}",
    "the {nth} of {month} {year}",
    "{wkd}, {day} {mon} {yy}",
)
# strftime would write them in the language of the machine
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# A translation is as in 2026-11-22, a blank, and the next one
FIELDS = ("year", "month", "day")
_FIELD_OF = {"year": 0, "yy": 0, "month": 1, "mon": 1, "m": 1, "mm": 1, "day": 2, "dd": 2, "nth": 2}
DIGITS = (slice(0, 4), slice(5, 7), slice(8, 10))  # of the fields
STRIDE = len("2026-11-22 ")

START, END, PADDING = "^", "$", "_"
TARGET_LETTERS = START + END + "0123456789- "
_WRITTEN = "".join((*FORMS, *MONTHS, *WEEKDAYS, string.digits, ";stndrdth"))
SOURCE_LETTERS = PADDING + "".join(sorted(set(_WRITTEN) - set("{}")))


def write(date: datetime.date, form: str) -> tuple[str, list[int]]:
    """A date in one of FORMS, and of each letter the field that it belongs to: the last that began, or -1.

    A network that reads from left to right knows a field only at its end, or behind it.
    """
    month, weekday = MONTHS[date.month - 1], WEEKDAYS[date.weekday()]
    ending = "th" if date.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    texts = {"day": f"{date.day}", "dd": f"{date.day:02}", "nth": f"{date.day}{ending}"}
    texts |= {"m": f"{date.month}", "mm": f"{date.month:02}", "month": month, "mon": month[:3]}
    texts |= {"year": f"{date.year}", "yy": f"{date.year % 100:02}", "weekday": weekday, "wkd": weekday[:3]}
    written, fields = "", []
    for literal, name, _, _ in string.Formatter().parse(form):
        written += literal
        fields += [fields[-1] if fields else -1] * len(literal)
        if name is not None:
            written += texts[name]
            fields += [_FIELD_OF.get(name, -1)] * len(texts[name])
    return written, fields


class Lines(NamedTuple):
    """Lines of as many dates each."""

    source: Tensor  # [N, S]: letters as numbers, padded
    target: Tensor  # [N, T]: from START to END, all as long
    fields: Tensor  # [N, S]: 3 * (number of the date in its line) + (number of the field), or -1


def draw_line(stream: random.Random, dates: int, held_out: bool) -> tuple[str, str, list[int]]:
    """Dates in forms that are drawn for each, their translation, their fields. Every fifth day is held out."""
    written, right, fields = [], [], []
    for i in range(dates):
        day = 5 * stream.randrange((LAST - FIRST).days // 5) + (0 if held_out else stream.randrange(1, 5))
        date = FIRST + datetime.timedelta(days=day)
        text, of_letters = write(date, stream.choice(FORMS))
        written.append(text)
        right.append(date.isoformat())
        fields += [-1, -1] * (i > 0) + [field if field < 0 else 3 * i + field for field in of_letters]
    return "; ".join(written), " ".join(right), fields


def as_numbers(texts: list[str], letters: str) -> Tensor:
    """``[N, longest]``, padded with the number of the first of ``letters``."""
    number = {letter: i for i, letter in enumerate(letters)}
    return _padded([[number[letter] for letter in text] for text in texts], 0)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def draw_lines(stream: random.Random, count: int, dates: int, held_out: bool = False) -> Lines:
    lines = [draw_line(stream, dates, held_out) for _ in range(count)]
    sources, targets, fields = zip(*lines)
    return Lines(
        as_numbers([*sources], SOURCE_LETTERS),
        as_numbers([START + target + END for target in targets], TARGET_LETTERS),
        _padded([*fields], -1),
    )
