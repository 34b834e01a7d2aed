"""A default of the whole process that ``with`` blocks change while somebody is inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Switch(Generic[Value]):
    """What rules is the value of the block that was entered last, of those that somebody is still inside.

    Blocks of several threads, or of generators, may be left in another order than that in which they were entered:
    each takes its own value away and nothing else.

    Attributes:
        value: what rules. An attribute of a module's global and no ContextVar, as torch.compile guards on the first
            and breaks the graph at the second.
    """

    def __init__(self, initial: Value) -> None:
        self.value = initial
        self._entered: list[tuple[int, Value]] = [(0, initial)]  # each with a number of its own
        self._count = 0

    @contextlib.contextmanager
    def set(self, value: Value) -> Generator[None]:
        """Make ``value`` the one that rules, inside a ``with`` block."""
        self._count += 1
        entry = (self._count, value)
        self._entered.append(entry)
        self._follow()
        try:
            yield
        finally:
            self._entered.remove(entry)
            self._follow()

    def _follow(self) -> None:
        # until it is so: another thread may enter or leave between the two steps
        while self.value is not self._entered[-1][1]:
            self.value = self._entered[-1][1]
