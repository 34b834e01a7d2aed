"""docs/kernel_resources.md: a row for every kernel, target, configuration; and the guard that holds kernels to it."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.laboratory.compile import ROOT, Row
from benchmarks.laboratory.model import CLOCK_HERTZ
from benchmarks.laboratory.targets import MOST_REGISTERS, SHARED_MEMORY
from benchmarks.reporting.text import Table, as_markdown, table_of

PATH = ROOT / "docs" / "kernel_resources.md"
REGISTERS_OF_GRACE = 8  # how many more a kernel may take before that is a regression: ptxas wavers by a few

_ABOUT = """# What the kernels take

Compiled by triton {version}, read from the binaries: nothing here has run on a GPU. `make resources` writes this page
anew, and `make test` holds a part of it to its rows: at most {grace} more registers, no byte more spilled or shared,
the same tensor-core instruction. `python -m benchmarks laboratory --only TEXT` prints rows, `--sass DIR` the machine
code behind them; `--write --only TEXT` writes the rows of the cases with TEXT anew, behind the others, which stay.

- **case**: dtype, head size (N: of a norm, Dv: of values), and what a tile of scores carries: `plain` is causal,
  `masked` has every mask, `biased` a bias and ALiBi as well, `heavy` softcap, dropout and a gradient of the weights,
  too. A kernel stands under the heaviest load that has its tile. `packed` is three packed sequences, without masks and
  weights. `functions` are a user's: a causal `score`, a `mask`, or both beside a bias and a softcap; `cookbook` are
  those of docs/cookbook.md, as tracing writes them. `decode` is a cache with 4096 slots for each sequence, divided
  between two programs, for one query and 4 heads a head of keys, or for 3 or 32 queries and 8 heads. **tile** is rows x
  keys.
- **registers** of a thread (AMD: VGPRs), **spilled** bytes of a thread, **LDL/STL**: instructions
  that load and store what is spilled, **shared** bytes of a block.
- **blocks**: resident on a multiprocessor, as registers, shared memory and warps allow, and in brackets the warps
  that are.
- **products**: matrix instructions in the code. **MUFU**: exponentials, logarithms and reciprocals. **memory**: LDG /
  STG / LDGSTS / TMA. **barriers**: BAR and mbarrier instructions.
- **loop**: instructions in the innermost loops around products, for tiles seen whole / in part; the careful ones that
  stand behind them in a forward, for what came out with NaN, are left out. What these need may be spilled, outside of
  all loops that every program runs: some forty instructions a program. **exp2 hidden**: the
  share of exponentials issued while a wgmma is in flight. **TF/s**: what the busiest pipe allows, modelled at
  {clock:.2f} GHz, plus or minus 15 %, of products executed: for ranking. **replay**: the same with waits and the
  shared memory's port. **ptxas**: its warnings that wgmma is serialised.
"""


class Key(NamedTuple):
    """What a row is called."""

    target: str
    case: str
    kernel: str


Cells = dict[str, str]
_NO_ROWS: Mapping[Key, Cells] = MappingProxyType({})


def keyed(rows: Iterable[Row]) -> Iterator[tuple[Key, Row]]:
    """Rows with their names: a kernel that a case launches in several ways is numbered."""
    launches: collections.Counter[Key] = collections.Counter()
    for row in rows:
        name = row["kernel"].strip("_").removesuffix("_kernel")
        kernel = "hopper " * row["for_hopper"] + name.removesuffix("_careful") + " careful" * bool(row["careful"])
        key = Key(row["target"], row["case"].get("name", ""), kernel)
        launches[key] += 1
        yield (key._replace(kernel=f"{kernel} {launches[key]}") if launches[key] > 1 else key), row


def cells(key: Key, row: Row) -> Cells:
    """A row as it is printed."""
    counts = collections.Counter(row["counts"])
    tma = counts["UTMALDG"] + counts["UTMASTG"] + counts["UTMAREDG"]
    product = row["product"] or ("FFMA" if row["products"] else "")
    # a tile that is seen whole needs fewer instructions than one that a predicate is evaluated on
    usual = row["loops"][: len(row["loops"]) // 2] if row.get("again") else row["loops"]
    loops = sorted(usual, key=lambda loop: loop["instructions"])
    ends = loops[:: len(loops) - 1] if len(loops) > 1 else loops
    return {
        "kernel": key.kernel,
        "case": key.case,
        "tile": "x".join(map(str, row["sides"])),
        "warps": str(row["warps"]),
        "stages": str(row["stages"]),
        "registers": str(row["registers"]),
        "spilled": str(row["spilled"]),
        "LDL/STL": str(row["local_memory"] or ""),
        "shared": str(row["shared"]),
        "blocks": f"{row['blocks']} ({row['blocks'] * row['warps']})",
        "products": f"{product} {row['tensor_core_products'] or row['products']}" if product else "",
        "MUFU": str(counts["MUFU"]),
        "memory": f"{counts['LDG']}/{counts['STG']}/{counts['LDGSTS']}/{tma}",
        "barriers": str(counts["BAR"] + counts["SYNCS"]),
        "PRMT": str(counts["PRMT"]),
        "loop": "/".join(str(loop["instructions"]) for loop in ends),
        "exp2 hidden": "/".join(f"{loop['overlap']:.2f}" for loop in ends if loop.get("overlap") is not None),
        "TF/s": "/".join(f"{loop['teraflops']:.0f}" for loop in ends if "teraflops" in loop),
        "replay": "/".join(f"{turn['teraflops']:.0f}" for turn in row["replays"]),
        "ptxas": " ".join(row["warnings"]),
    }


def tables(rows: Iterable[Row], kept: Mapping[Key, Cells] = _NO_ROWS) -> dict[str, Table]:
    """For each target the rows, those of the same binary once, behind those that are ``kept`` of a page."""
    found: dict[str, list[Cells]] = {}
    for key, line in kept.items():
        found.setdefault(key.target, []).append(line)
    seen, columns = set(), ()
    for key, row in keyed(rows):
        if (key.target, row["hash"]) not in seen:
            seen.add((key.target, row["hash"]))
            line = cells(key, row)
            found.setdefault(key.target, []).append(line)
            columns = tuple(line)
    return {  # a page has left out the columns that were empty throughout
        target: table_of(target, columns, [tuple(line.get(name, "") for name in columns) for line in lines])
        for target, lines in found.items()
    }


def document(rows: list[Row], kept: Mapping[Key, Cells] = _NO_ROWS) -> str:
    """The page, with rows of the one before that are ``kept``."""
    text = _ABOUT.format(version=rows[0]["triton"], grace=REGISTERS_OF_GRACE, clock=CLOCK_HERTZ / 1e9)
    return text + "".join(f"\n## {target}\n\n{as_markdown(table)}" for target, table in tables(rows, kept).items())


# -------------------------------------------------------------------------------------------------------------- guard


@dataclasses.dataclass(frozen=True)
class Committed:
    """The page as it was committed.

    Attributes:
        triton: the version that compiled it: another one's registers say nothing.
        rows: their cells.
    """

    triton: str
    rows: dict[Key, Cells]


def read(path: Path = PATH) -> Committed:
    """Parse the page."""
    text = path.read_text()
    version = re.search(r"triton (\d+\.\d+\.\d+)", text)
    assert version, f"{path} does not say which triton compiled it"
    rows: dict[Key, Cells] = {}
    for section in text.split("\n## ")[1:]:
        target, *lines = section.splitlines()
        header, _, *body = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        for line in body:
            row = dict(zip((name.strip() for name in header), (cell.strip() for cell in line)))
            rows[Key(target, row["case"], row["kernel"])] = row
    return Committed(version[1], rows)


def rows_without(text: str, triton: str) -> dict[Key, Cells]:
    """The page's rows of cases whose name does not hold the text.

    Raises:
        ValueError: another triton than the one named compiled them.
    """
    committed = read(PATH)
    if committed.triton != triton:
        raise ValueError(f"the rows that would stay are of triton {committed.triton}, not {triton}: write all of them")
    return {key: row for key, row in committed.rows.items() if text not in key.case}


def regressions(rows: list[Row], committed: Committed) -> list[str]:
    """What a kernel takes more than its row says, a sentence each; and where it takes more than there is."""
    complaints = []
    compiled = {key: (row, cells(key, row)) for key, row in keyed(rows)}
    for key, (row, now) in compiled.items():
        where = f"{key.kernel}, {key.case}, {key.target} ({now['tile']}, {now['warps']} warps)"
        limits = {"registers": MOST_REGISTERS[key.target.partition(":")[0]], "shared": SHARED_MEMORY[key.target]}
        complaints += [f"{where}: {row[name]} {name}, of {most}" for name, most in limits.items() if row[name] > most]
        before = committed.rows.get(key)
        if before is not None and row["triton"] == committed.triton:
            complaints += [f"{where}: {change} (before: {before['tile']}, {before['warps']} warps)"
                           for change in _changes(before, now)]  # fmt: skip
    cases = {(key.target, key.case) for key in compiled}
    if rows and rows[0]["triton"] == committed.triton:
        gone = [key for key in committed.rows if (key.target, key.case) in cases and key not in compiled]
        complaints += [
            f"{key.kernel}, {key.case}, {key.target} has a row, but no such kernel was compiled" for key in gone
        ]
    return complaints


def _changes(before: Cells, now: Cells) -> Iterator[str]:
    """What became worse."""
    for name, grace in (("registers", REGISTERS_OF_GRACE), ("spilled", 0), ("shared", 0)):
        if int(now[name]) > int(before[name]) + grace:
            yield f"{name}: was {before[name]}, is {now[name]}"
    product_before, product_now = ((row.get("products") or "none").split()[0] for row in (before, now))
    if product_now != product_before:
        yield f"matrix products: were {product_before}, are {product_now}"
    if now["ptxas"] and now["ptxas"] != before.get("ptxas", ""):
        yield f"ptxas: said {before.get('ptxas') or 'nothing'}, says {now['ptxas']}"
