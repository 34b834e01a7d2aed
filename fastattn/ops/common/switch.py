"""A default of the whole process that ``with`` blocks change for as long as they last."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Switch(Generic[Value]):
    """A value that ``with`` blocks set. Among the blocks that are still open, the one entered last decides.

    Blocks of several threads, or of generators, may be left in another order than that in which they were entered:
    each takes its own value away and nothing else.

    Attributes:
        value: the current value. A plain attribute and no ContextVar: torch.compile guards on an attribute, and breaks
            the graph at a ContextVar.
    """

    def __init__(self, initial: Value) -> None:
        self.value = initial
        self._entered: list[tuple[int, Value]] = [(0, initial)]  # each with a number of its own
        self._count = 0

    @contextlib.contextmanager
    def set(self, value: Value) -> Generator[None]:
        """Make ``value`` the current one inside a ``with`` block."""
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
        # In a loop, because another thread may enter or leave a block between the comparison and the assignment.
        while self.value is not self._entered[-1][1]:
            self.value = self._entered[-1][1]
