"""docs/kernel_resources_pairs.md: registers and spills of the same kernels as several tritons compile them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.laboratory.compile import ROOT, Row
from benchmarks.laboratory.table import Key, keyed
from benchmarks.reporting.text import Table, as_markdown

PATH = ROOT / "docs" / "kernel_resources_pairs.md"

_ABOUT = """# What the kernels take under other tritons

Every row of [kernel_resources.md](kernel_resources.md), compiled by triton {versions}: **registers / spilled bytes** of
a thread, read from the binaries; nothing here has run on a GPU. `make resources-pairs` writes this page anew, and fails
where one of them does not compile a kernel. The first is the one that `make` installs, for which tiles, warps and
stages were chosen; the others get the same ones.
"""


class Pairs:
    """The rows of several tritons, the first of which says what there is to compare.

    Attributes:
        versions: of triton.
        differences: what one of them launches and another does not, a sentence each.
    """

    def __init__(self, rows: Sequence[list[Row]]) -> None:
        self.versions = [of_one[0]["triton"] for of_one in rows]
        self._rows = [dict(keyed(of_one)) for of_one in rows]
        first = self._rows[0]
        self.differences = [
            f"{key.kernel}, {key.case}, {key.target}: launched under triton {version}, not under {other}"
            for rows_of, version in zip(self._rows[1:], self.versions[1:])
            for keys, version, other in (
                (first.keys() - rows_of.keys(), self.versions[0], version),
                (rows_of.keys() - first.keys(), version, self.versions[0]),
            )
            for key in sorted(keys)
        ]

    def tables(self) -> dict[str, Table]:
        """For each target its kernels, those that are one binary of the first triton once."""
        once = {(key.target, row["hash"]): key for key, row in reversed(self._rows[0].items())}
        found: dict[str, list[Key]] = {}
        for key, row in self._rows[0].items():
            if once[key.target, row["hash"]] == key:
                found.setdefault(key.target, []).append(key)
        return {target: self._table(target, keys) for target, keys in found.items()}

    def differing(self) -> Table:
        """The kernels that do not spill the same under all of them."""
        keys = [key for key in self._rows[0] if len({rows[key]["spilled"] for rows in self._rows if key in rows}) > 1]
        return self._table("kernels whose spills differ", keys)

    def document(self) -> str:
        """The page."""
        *others, last = self.versions
        text = _ABOUT.format(versions=f"{', '.join(others)} and {last}") + "\n## Where spills differ\n\n"
        differing = self.differing()
        text += as_markdown(differing) if differing.lines else "Nowhere.\n"
        return text + "".join(f"\n## {target}\n\n{as_markdown(table)}" for target, table in self.tables().items())

    def _table(self, title: str, keys: list[Key]) -> Table:
        lines = tuple((*key[::-1], _tile(self._rows[0][key]), *self._cells(key)) for key in keys)
        return Table(title, ("kernel", "case", "target", "tile, warps, stages", *self.versions), lines)

    def _cells(self, key: Key) -> list[str]:
        rows = [rows.get(key) for rows in self._rows]
        return ["" if row is None else f"{row['registers']} / {row['spilled']}" for row in rows]


def _tile(row: Row) -> str:
    return ", ".join(filter(None, ("x".join(map(str, row["sides"])), str(row["warps"]), str(row["stages"]))))
