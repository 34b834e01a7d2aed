"""docs/clients.md: what its tables say, how they are written and read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure.timing import Timing
from tests.clients.cases import Client
from tests.clients.parity import Outcome
from tests.clients.timing import BATCHES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clients.md"

PARITY, TIMES, VERSIONS = "parity", "times", "versions"
COLUMNS = {
    PARITY: ("package", "model", "calls of SDPA", "fused", "not ours", "torch", "kernels"),
    TIMES: ("package", "model", *(f"{what}, batch {batch}" for batch in BATCHES for what in ("inference", "training"))),
}
NOTHING = "-"

Row = tuple[str, ...]


def parity_row(client: Client, on_torch: Outcome, on_kernels: Outcome) -> Row:
    """What was found of a client on both backends, whose calls and modules are the same."""
    assert on_torch[:3] == on_kernels[:3]
    return (
        client.package,
        client.name,
        _counted(on_torch.calls) + " by registry" * client.registry,
        _counted(on_torch.fused),
        "; ".join(f"{count} `{kind}`: {reason}" for kind, (count, reason) in on_torch.left.items()) or NOTHING,
        f"{on_torch.ratio:.2f}",
        f"{on_kernels.ratio:.2f}",
    )


def _counted(classes: dict[str, int]) -> str:
    return ", ".join(f"{count} `{kind}`" for kind, count in classes.items()) or NOTHING


def times_row(client: Client, timings: Iterable[Timing]) -> Row:
    """The times of a client over the original's; the run says where others disturbed it."""
    cells = []
    for timing in timings:
        ratio = timing.ratio
        assert ratio is not None, "the peer was timed, too"
        cells.append(f"{ratio.median:.2f} [{ratio.low:.2f} {ratio.high:.2f}]" + " (contended)" * timing.contended)
    return (client.package, client.name, *cells)


def table(part: str, rows: list[Row]) -> str:
    """The rows as a table of Markdown."""
    columns = COLUMNS[part]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ("---",) * len(columns), *rows))


def write(part: str, text: str) -> None:
    """Put ``text`` between the marks of the part; all else stays."""
    page, found = _between(part).subn(lambda marks: f"{marks[1]}\n{text}\n{marks[3]}", PAGE.read_text())
    assert found == 1, f"{PAGE} has no marks of {part}"
    PAGE.write_text(page)


def read(part: str) -> str:
    """What stands between the marks of the part."""
    found = _between(part).search(PAGE.read_text())
    assert found, f"{PAGE} has no marks of {part}"
    return found[2].strip() + "\n"


def rows(part: str) -> list[dict[str, str]]:
    """The rows of a table on the page."""
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in read(part).splitlines() if line
    )
    return [dict(zip(head, line)) for line in lines]


def _between(part: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {part} -->\n)(.*?)(<!-- /{part} -->)", re.DOTALL)
