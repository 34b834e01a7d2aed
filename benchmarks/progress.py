"""How far a run is and how long it will take: a bar on a terminal that has rich, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_EVERY = 15.0  # seconds between two lines where there is no bar


class Progress:
    """A context. ``total`` is in seconds, by guess; the time left follows from the pace so far."""

    def __init__(self, total: float) -> None:
        self._total, self._done = total, 0.0
        self._began = time.monotonic()
        self._said = self._began
        self._bar, self._task = _bar(total) if sys.stderr.isatty() else (None, None)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def left(self) -> float | None:
        """Seconds, or None before the first job is done."""
        if not self._done:
            return None
        return (time.monotonic() - self._began) * (self._total - self._done) / self._done

    def show(self, doing: str) -> None:
        """This is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, doing=doing)
        elif time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            left = "" if self.left is None else f", {self.left:.0f} s left"
            print(f"{self._done / max(self._total, 1e-9):.0%}{left}: {doing}", file=sys.stderr, flush=True)

    def advance(self, seconds: float) -> None:
        """A job is done that was guessed to take this long."""
        self._done += seconds
        if self._bar is not None:
            self._bar.update(self._task, advance=seconds, left=f"{self.left:.0f} s left")


def _bar(total: float) -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None, None
    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    bar = Bar(*columns, TextColumn("{task.fields[doing]}"), console=Console(stderr=True), transient=True)
    return bar, bar.add_task("", total=total, left="", doing="")
