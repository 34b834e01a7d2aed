"""The tables of docs/transformers.md: ``make families`` runs the families and writes them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fastattn
from fastattn.integrations.transformers import register
from tests.integrations.transformers.families import FAMILIES, NOT_REACHED, Family
from tests.integrations.transformers.harness import (
    Ratios,
    assert_results_within_budget,
    drawn,
    eager,
    fuse,
    is_norm,
    model_with,
)

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
COLUMNS = ("family", "model", "calls", "carries", "error, outputs", "error, gradients", "generates", "norms", "remark")
MEASURED = COLUMNS[4:6]

Row = dict[str, str]


def row(family: Family, errors: Ratios | None = None) -> Row:
    """What is said of a family; ``errors`` as they were measured."""
    model = model_with(family.name, "eager")
    norms = sum(is_norm(module) for module in model.modules())
    ours = sum(kind is not fastattn.MultiheadAttention for kind in fuse(model, family).replaced.values())
    cells = (
        family.name,
        f"{family.model}, {family.kind}",
        str(family.calls),
        ", ".join((*(["padding"] if family.pads[1:] else []), *family.carries)),
        *(f"{error:.2f}" if errors else "" for error in errors or ("", "")),
        f"as {family.peer}" if family.generates else "",
        f"{ours} of {norms}",
        family.remark,
    )
    return dict(zip(COLUMNS, cells))


def worst_errors(family: Family) -> Ratios:
    """The largest ratios over the kinds of padding, each held to its budget."""
    found = []
    for padding in family.pads:
        truth, peer = eager(family.name, padding, torch.float64), eager(family.name, padding)
        actual = drawn(family.name, padding, "fastattn")
        found.append(assert_results_within_budget(actual, truth=truth, peer=peer, feature=family.name))
    return Ratios(*map(max, zip(*found)))


def not_reached() -> list[Row]:
    """What becomes of families that compute attention themselves."""
    return [{"family": family.name, "model": family.model, "with the name": family.remark} for family in NOT_REACHED]


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(page: str, name: str) -> list[Row]:
    """The rows of one of the tables in a page."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    assert found
    lines = [line[2:-2].split(" | ") for line in found[1].splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def written(page: str, name: str, rows: list[Row]) -> str:
    """The page with another table."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table(rows)}\n{found[2]}", page)


def main() -> None:
    """Run all families and write the page."""
    with register(), fastattn.use_backend("torch"):
        rows = [row(family, worst_errors(family)) for family in FAMILIES]
    page = written(written(PAGE.read_text(), "families", rows), "not reached", not_reached())
    PAGE.write_text(page)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
