"""How figures and tables are written: plain strings, for a terminal and as Markdown."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable, Sequence

from benchmarks.reporting.document import Spread


def number(value: float | None) -> str:
    """Three digits that count, without an exponent where that can be."""
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rate(value: float | None, unit: str) -> str:
    """Of ``value`` in units of 10^12 a second."""
    if value is None:
        return ""
    return f"{number(value)} T{unit}" if value >= 1 else f"{number(1e3 * value)} G{unit}"


def ratio(value: Spread | None) -> str:
    """The median, and in brackets its confidence interval."""
    return "" if value is None else f"{value['median']:.2f} [{value['low']:.2f} {value['high']:.2f}]"


def span(values: Collection[float]) -> str:
    """As in ``0.52 to 0.61``, or one number where they are as good as equal."""
    low, high = (f"{pick(values):.2f}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Plain strings.

    Attributes:
        title: what it shows.
        header: of its columns.
        lines: as many cells each; one that has its first cell only is the heading of those below it.
        note: what is said under the table, one fact a line.
        strong: the numbers of the lines that are set off.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: frozenset[int] = frozenset()


def table_of(
    title: str,
    header: Sequence[str],
    lines: Sequence[tuple[str, ...]],
    notes: Iterable[str] = (),
    strong: Iterable[int] = (),
) -> Table:
    """Without the columns that are empty throughout."""
    shown = [i for i in range(len(header)) if any(line[i] for line in lines)]
    kept = tuple(tuple(line[i] for i in shown) for line in lines)
    return Table(title, tuple(header[i] for i in shown), kept, "\n".join(filter(None, notes)), frozenset(strong))


def show(table: Table) -> None:
    """On a terminal with rich a drawn table, else aligned columns."""
    if sys.stdout.isatty() and _drawn(table):
        return
    print(f"\n{as_text(table)}")


def as_text(table: Table) -> str:
    """Title, aligned columns and notes, in plain lines."""
    widths = _widths(table)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
             for line in (table.header, *table.lines)]  # fmt: skip
    return "\n".join([table.title, *lines, *([table.note] if table.note else [])])


# What a narrow terminal does without, the first first; the report has it all.
_FIRST_TO_GO = ("saved MiB", "rate", "error/budget", "warm ms", "host ms", "graph ms", "cpu ms", "peak MiB", "of floor")


def _widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.header, *table.lines)]


def _fitted(table: Table, width: int) -> Table:
    """As many of the columns as a terminal of this width has room for."""
    gone: list[str] = []
    for name in (None, *_FIRST_TO_GO):
        if name in table.header:
            kept = [i for i, other in enumerate(table.header) if other != name]
            lines = tuple(tuple(line[i] for i in kept) for line in table.lines)
            table = dataclasses.replace(table, header=tuple(table.header[i] for i in kept), lines=lines)
            gone.append(str(name))
        widths = _widths(table)
        if sum(widths) + 2 * len(widths) + 2 <= width:
            break
    if not gone:
        return table
    without = f"in a wider terminal, and in the report: {', '.join(gone)}"
    return dataclasses.replace(table, note="\n".join(filter(None, (table.note, without))))


def _drawn(table: Table) -> bool:
    """Draw by rich, if it is there; cells are never broken, as those that are cannot be compared."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text
    except ImportError:
        return False
    terminal = Console()
    table = _fitted(table, terminal.width)
    widths = _widths(table)
    drawn = Drawn(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in table.header:
        drawn.add_column(Text(name), no_wrap=True)
    for index, line in enumerate(table.lines):
        style = "cyan" if _is_heading(line) else "bold" if index in table.strong else None
        drawn.add_row(*map(Text, line), style=style)
    console = Console(width=max(sum(widths) + 2 * len(widths) + 2, terminal.width))
    console.print(drawn)
    if table.note:
        console.print(table.note, markup=False, highlight=False)
    return True


def as_markdown(table: Table) -> str:
    """Cells and notes, without the title; bold are headings, and the second cell of a line that is set off."""

    def written(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    text = ""
    if table.lines:
        text += written(map(_escaped, table.header)) + written(["---"] * len(table.header))
    for index, line in enumerate(table.lines):
        cells = [_escaped(cell.strip()) for cell in line]
        if index in table.strong:
            cells[1] = f"**{cells[1]}**"
        if _is_heading(line):
            cells[0] = f"**{cells[0]}**"
        text += written(cells)
    if table.note:
        text += ("\n" if text else "") + "".join(f"- {_escaped(fact)}\n" for fact in table.note.split("\n"))
    return text


def _is_heading(line: Sequence[str]) -> bool:
    return len(line) > 1 and not any(line[1:])


def _escaped(text: str) -> str:
    for character in "\\|*<":
        text = text.replace(character, "\\" + character)
    return text
