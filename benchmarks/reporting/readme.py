"""The measured blocks of README.md and docs: between their marks stands what a committed run says, and nothing else.

<!-- measured: module-ratios from benchmarks/results/cpu/run.json -->
...
<!-- end -->
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.reporting import ranks
from benchmarks.reporting.document import (
    OURS,
    Document,
    Result,
    Spread,
    by_case,
    by_family,
    learned,
    peer_of,
    plain_norms,
    reaches,
    read_run,
    sequence_rows,
    timed_of,
)
from benchmarks.reporting.findings import findings
from benchmarks.reporting.host import host_block
from benchmarks.reporting.tables import tiles_table
from benchmarks.reporting.text import Table, as_markdown, number, ratio

ROOT = Path(__file__).parents[2]

_MARK = re.compile(r"^<!-- *(measured\b.*?|end) *-->$", re.MULTILINE)
_MEASURED = re.compile(r"measured: (\S+) from (\S+)")
_MISSING = "-"
# What a time, or a peak of memory, may be of another's and still be level; and what two peaks differ by for no reason.
_LEVEL, _PEAK_NOISE_MIB = 1.05, 1.0

Block = Callable[[Document], str]


def committed_runs(root: Path) -> list[Path]:
    return sorted(root.glob("benchmarks/results/*/run.json"))


def pages(root: Path) -> list[str]:
    """The files that may have blocks: the README and every page of docs."""
    return ["README.md", *(path.relative_to(root).as_posix() for path in sorted(root.glob("docs/**/*.md")))]


def fill(root: Path) -> list[Path]:
    """Write every block anew; the files that changed.

    Raises:
        ValueError: a mark, a block's name or its run is wrong; the message says where.
    """
    filled = {root / name: _filled(root, name) for name in pages(root)}  # all or none, should a mark be wrong
    changed = {path: text for path, (text, stale) in filled.items() if stale}
    for path, text in changed.items():
        path.write_text(text)
    return list(changed)


def outdated(root: Path) -> list[str]:
    """As ``README.md: module-headline``: the blocks that do not say what their run says. Errors as :func:`fill`."""
    return [f"{name}: {block}" for name in pages(root) for block in _filled(root, name)[1]]


def _filled(root: Path, name: str) -> tuple[str, list[str]]:
    """The file's text with every block made anew, and the names of those that differ from what stands there."""
    try:
        text = (root / name).read_text()
    except OSError as error:
        raise ValueError(f"{name}: expected a file with measured blocks; {error}") from error
    marks = list(_MARK.finditer(text))
    parts, stale, position = [], [], 0
    for begin, end in zip(marks[::2], [*marks[1::2], None]):
        line = f"{name}:{text.count(chr(10), 0, begin.start()) + 1}"
        if begin[1] == "end":
            raise ValueError(f"{line}: an end mark without a block")
        if (asked := _MEASURED.fullmatch(begin[1])) is None:
            raise ValueError(f"{line}: expected <!-- measured: BLOCK from RUN.json -->, found {begin[0]}")
        block, run = asked.groups()
        if end is None or end[1] != "end":
            raise ValueError(f"{line}: the block {block} has no end mark")
        made = f"\n\n{_made(root, line, block, run)}\n"
        parts += [text[position : begin.end()], made]
        position = end.start()
        if text[begin.end() : position] != made:
            stale.append(block)
    return "".join(parts) + text[position:], stale


def _made(root: Path, line: str, name: str, run: str) -> str:
    known = [*BLOCKS, *OF_OTHER_FILES]
    if name not in known:
        raise ValueError(f"{line}: no block is called {name}: there are {', '.join(known)}")
    try:
        other = OF_OTHER_FILES.get(name)
        return other(root / run) if other is not None else BLOCKS[name](read_run(root / run))
    except ValueError as error:
        raise ValueError(f"{line}: {name}: {error}") from error


# ---------------------------------------------------------------------------------------------------- parts of a block

Grid = dict[tuple[str, ...], dict[str, str]]  # by the first cells of a line: its other cells by column


def _table(first: tuple[str, ...], grid: Grid, columns: Iterable[str] = ()) -> str:
    """Markdown; what is missing in a line or column that has anything is a dash, one that has nothing is left out.

    Raises:
        ValueError: the run has nothing at all for it.
    """
    grid = {line: cells for line, cells in grid.items() if any(cells.values())}
    met = dict.fromkeys(column for cells in grid.values() for column, cell in cells.items() if cell)
    shown = [column for column in columns or met if column in met]
    if not shown:
        raise ValueError("the run has no rows for it")
    lines = tuple((*line, *(cells.get(column) or _MISSING for column in shown)) for line, cells in grid.items())
    return as_markdown(Table("", (*first, *shown), lines))


def _rows(document: Document, family: str) -> list[Result]:
    """Timed rows of a family in one dtype, that of most."""
    rows = timed_of(by_family(document).get(family, []))
    if not rows:
        return []
    dtype = statistics.mode(row["dtype"] for row in rows)
    return [row for row in rows if row["dtype"] == dtype]


def _ours(rows: Iterable[Result]) -> list[Result]:
    return [row for row in rows if row["variant"] == OURS]


def _shape(row: Result) -> str:
    return f"B{row['batch']} H{row['heads']} L{row['seqlen']} D{row['head_dim']}"


def _direction(row: Result) -> str:
    return "training" if row["backward"] else "evaluation"


def _both_ways(cells: Mapping[bool, str]) -> str:
    """Evaluation / training."""
    return " / ".join(cells.get(backward) or _MISSING for backward in (False, True)) if cells else ""


def _beside(spread: Spread | None, other: str | None) -> str:
    return f"{ratio(spread)} of {other}" if spread is not None else ""


def _mask(row: Result) -> str:
    return "plain" if row["mask"] == "none" else row["mask"]


# -------------------------------------------------------------------------------------------------------------- blocks


def run_facts(document: Document) -> str:
    """One line, without a date: on what, with what, of what."""
    facts, settings = document["environment"], document["settings"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    where = facts.get("gpu") or f"{facts['processor']} of {facts['cores']} cores, {threads}"
    words = [where, f"torch {facts['torch']}"]
    words += [f"triton {facts['triton']}"] if facts.get("gpu") and facts.get("triton") else []
    words.append(f"commit {(facts.get('commit') or 'unknown')[:10]}{' and changes' if facts.get('modified') else ''}")
    words += [f"{settings['seconds']:g} s a case"]
    return f"{', '.join(words)}; {len(timed_of(document['results']))} rows timed.\n"


def module_ratios(document: Document) -> str:
    grid: Grid = {}
    for row in _ours(_rows(document, "module")):
        cells = grid.setdefault((_shape(row), _direction(row)), {})
        cells[f"{_mask(row)}{', weights' if row['weights'] else ''}"] = ratio(row["ratio"])
    masks = ("plain", "padding", "causal")
    return _table(("shape", "direction"), grid, [*masks, *(f"{mask}, weights" for mask in masks)])


def module_headline(document: Document) -> str:
    """Of each shape the plain cases, without and with averaged weights."""
    grid: Grid = {}
    for row in _ours(_rows(document, "module")):
        if row["mask"] == "none":
            weights = "averaged weights" if row["weights"] else "no weights"
            grid.setdefault((f"{_shape(row)}, {weights}",), {})[_direction(row)] = ratio(row["ratio"])
    return _table(("`nn.MultiheadAttention` -> `fastattn.MultiheadAttention`",), grid, ("evaluation", "training"))


def module_memory(document: Document) -> str:
    """Of the longest plain cases with averaged weights."""
    rows = [r for r in by_family(document).get("module", []) if r["weights"] and r["mask"] == "none" and r["peak_mib"]]
    peer, longest = peer_of(by_family(document).get("module", [])), max((row["seqlen"] for row in rows), default=0)
    grid: Grid = {}
    for variants in by_case(row for row in rows if row["seqlen"] == longest).values():
        ours, other = variants.get(OURS), variants.get(peer or "")
        if ours is None or other is None:
            continue
        for name, what in (("peak_mib", "peak of a step"), ("saved_mib", "kept for the backward")):
            if ours[name] is None or not other[name]:
                continue
            cells = grid.setdefault((f"{_shape(ours)}, {_direction(ours)}", what), {})
            cells |= {f"{OURS}, MiB": number(ours[name]), f"{peer}, MiB": number(other[name])}
            cells["ratio"] = f"{ours[name] / other[name]:.2f}"
    return _table(("averaged weights", "memory"), grid)


def mask_ratios(document: Document) -> str:
    """Attention alone at L >= 1024, without weights, beside the fastest other and, where that is not it, the peer."""
    grid: Grid = {}
    peer = peer_of(by_family(document).get("attention", []))
    for row in _ours(_rows(document, "attention")):
        if row["seqlen"] >= 1024 and not row["weights"]:
            cells = grid.setdefault((_mask(row), _shape(row)), {})
            beside = {row["best"]: row["best_ratio"], peer: row["ratio"]}
            cells[_direction(row)] = "; ".join(
                filter(None, (_beside(spread, other) for other, spread in beside.items()))
            )
    return _table(("mask", "shape"), grid, ("evaluation", "training"))


def _by_length(document: Document, value: Callable[[Result], float | None], unit: str) -> str:
    """A line a variant, a column a length, each evaluation / training."""
    rows, reach = sequence_rows(document), reaches(document)
    found: dict[str, dict[int, dict[bool, str]]] = {r["variant"]: {} for r in by_family(document).get("sequence", [])}
    for row in rows:
        cells = found[row["variant"]].setdefault(row["seqlen"], {})
        if (amount := value(row)) is not None:
            cells[row["backward"]] = number(amount)
    lengths = sorted({row["seqlen"] for row in rows})
    grid: Grid = {
        (f"{name} (reaches {limit} tokens)" if (limit := reach.get(name)) else name,): {
            f"L = {seqlen}": _both_ways(cells) for seqlen, cells in of_one.items()
        }
        for name, of_one in found.items()
    }
    text = _table(("variant",), grid, [f"L = {seqlen}" for seqlen in lengths])
    tokens = {row["batch"] * row["seqlen"] for row in rows}
    of_all = (
        f"{min(tokens)} tokens{' or more' if len(tokens) > 1 else ''} of width {rows[0]['heads'] * rows[0]['head_dim']}"
    )
    return f"{of_all}, causal, {rows[0]['dtype']}; {unit}, evaluation / training:\n\n{text}"


def sequence_times(document: Document) -> str:
    return _by_length(document, lambda row: row["wall_ms"] and row["wall_ms"]["median"], "milliseconds of a step")


def sequence_memory(document: Document) -> str:
    return _by_length(document, lambda row: row["peak_mib"], "peak MiB of a step")


def norm_ratios(document: Document) -> str:
    """To the peer, and in parentheses the share of the floor."""
    grid: Grid = {}
    for row in sorted(_ours(plain_norms(_rows(document, "norm"))), key=lambda row: row["size"]):
        share = "" if row["of_floor"] is None else f" ({row['of_floor']:.2f})"
        column = f"{row['kind']}, {'backward alone' if row['backward'] else 'forward'}"
        grid.setdefault((str(row["size"]),), {})[column] = f"{ratio(row['ratio'])}{share}"
    return _table(("N",), grid)


def layer_ratios(document: Document) -> str:
    grid: Grid = {}
    for row in _ours(_rows(document, "layer")):
        grid.setdefault((_shape(row), _mask(row)), {})[_direction(row)] = ratio(row["ratio"])
    return _table(("shape", "mask"), grid, ("evaluation", "training"))


def varlen_ratios(document: Document) -> str:
    """Packed beside the padded batch, and the fastest other where that is another."""
    grid: Grid = {}
    peer = peer_of(by_family(document).get("varlen", []))
    for row in _ours(_rows(document, "varlen")):
        shape = f"{row['batch']} sequences of 1 to {row['longest']}, H{row['heads']} D{row['head_dim']}"
        beside = {row["best"]: row["best_ratio"], peer: row["ratio"]}
        cells = grid.setdefault((shape, "causal" if row["causal"] else "plain"), {})
        cells[_direction(row)] = "; ".join(filter(None, (_beside(spread, other) for other, spread in beside.items())))
    return _table(("batch", "mask"), grid, ("evaluation", "training"))


def decode_ratios(document: Document) -> str:
    """A step over a contiguous cache and over pages beside torch's kernel on the contiguous one, and what plain torch
    takes for pages."""
    grid: Grid = {}
    names = {OURS: "contiguous", f"{OURS}-paged": "in pages", "sdpa-gathered": "sdpa, pages copied in order"}
    for row in _rows(document, "decode"):
        if row["variant"] in names:
            shape = f"B{row['batch']} H{row['heads']} Hk{row['kv_heads']} S{row['held']} D{row['head_dim']}"
            cells = grid.setdefault((shape, str(row["page_size"])), {})
            cells[f"{names[row['variant']]}, of sdpa"] = ratio(row["ratio"])
    return _table(("cache", "page"), grid)


def hugging_face_ratios(document: Document) -> str:
    """Whole models beside "sdpa", or beside "eager" where "sdpa" cannot: time, and peak memory of a training step."""
    grid: Grid = {}
    rows = _rows(document, "hugging_face")
    peaks = {(row["case"], row["variant"]): row["peak_mib"] for row in rows}
    for row in _ours(rows):
        # Without "sdpa", which the ratio is to, the fastest other is the only other
        peer, beside = (peer_of(rows), row["ratio"]) if row["ratio"] is not None else (row["best"], row["best_ratio"])
        batch = f"B{row['batch']} L{row['seqlen']}, {'padding' if row['padded'] else 'no padding'}"
        cells = grid.setdefault((row["model"], batch, peer or ""), {})
        cells[_direction(row)] = ratio(beside)
        if row["backward"] and row["peak_mib"]:
            both = row["peak_mib"], peaks.get((row["case"], peer))
            cells["peak MiB of training, ours; beside"] = "; ".join(number(peak) or _MISSING for peak in both)
    return _table(("model", "batch", "beside"), grid)


def function_times(document: Document) -> str:
    """Of the longest: a line an example, a column a variant, each evaluation / training."""
    rows = _rows(document, "functions")
    rows = [row for row in rows if row["seqlen"] == max(row["seqlen"] for row in rows)]
    found: dict[tuple[str, str], dict[bool, str]] = {}
    for row in rows:
        cells = found.setdefault((row["example"], row["variant"]), {})
        cells[row["backward"]] = number(row["wall_ms"]["median"])
    grid: Grid = {}
    for (example, variant), cells in found.items():
        grid.setdefault((f"`{example}`",), {})[variant] = _both_ways(cells)
    text = _table(("example",), grid)
    return f"{_shape(rows[0])}, {rows[0]['dtype']}; milliseconds of a step, evaluation / training:\n\n{text}"


def slower(document: Document) -> str:
    """The cases in which the fastest form of ours takes more than 1.05 of the fastest other's time, beyond the
    confidence interval of that ratio, and those in which ours has a peak of memory more than 5 % above the peer's, and
    by more than can be noise; with the number of all cases."""
    lines, cases = [], 0
    for rows in by_family(document).values():
        peer = peer_of(rows)
        for case, variants in by_case(timed_of(rows)).items():
            forms = [row for name, row in variants.items() if name.split("-")[0] == OURS and row["best_ratio"]]
            if not forms:
                continue
            cases += 1
            fastest = min(forms, key=lambda row: row["best_ratio"]["median"])
            if fastest["best_ratio"]["low"] > _LEVEL:
                beside = _beside(fastest["best_ratio"], fastest["best"])
                lines.append((case, "time", beside, number(fastest["wall_ms"]["median"])))
            other = variants.get(peer or "", {}).get("peak_mib")
            peak = min((row["peak_mib"] for row in forms if row["peak_mib"] is not None), default=None)
            if other and peak is not None and peak > max(_LEVEL * other, other + _PEAK_NOISE_MIB):
                lines.append((case, "peak of memory", f"{peak / other:.2f} of {peer}", number(peak)))
    if not cases:
        raise ValueError("the run has no rows for it")
    if not lines:
        return f"None of {cases} cases.\n"
    table = as_markdown(Table("", ("case", "what", "beside the others", "ms or MiB"), tuple(lines)))
    return f"{len({line[0] for line in lines})} of {cases} cases:\n\n{table}"


def errors(document: Document) -> str:
    """Of each family and dtype the largest error as a share of its budget, and in parentheses in how many cases."""
    shares: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for family, rows in by_family(document).items():
        for row in _ours(rows):
            if row.get("error_budget"):
                cells = shares.setdefault((family, row["dtype"]), {})
                cells.setdefault(_direction(row), []).append(row["error"] / row["error_budget"])
    grid: Grid = {
        line: {direction: f"{max(found):.2f} ({len(found)})" for direction, found in cells.items()}
        for line, cells in sorted(shares.items())
    }
    return _table(("family", "dtype"), grid, ("evaluation", "training"))


def quality(document: Document) -> str:
    """Accuracies, and in parentheses after how many steps."""
    grid: Grid = {}
    for task, models in learned(document).items():
        cells = {name: f"{row['accuracy']:.2f} ({row['steps']})" for name, row in models.items()}
        grid[(task, f"{next(iter(models.values()))['chance']:.2f}")] = cells
    return _table(("task", "a guess"), grid)


def tiles(document: Document) -> str:
    table = tiles_table(document)
    if not table.lines:
        raise ValueError("the run has no tiles")
    return as_markdown(table)


def sentences(document: Document) -> str:
    found = findings(document)
    if not found:
        raise ValueError("the run has nothing to find")
    return "".join(f"- {sentence}\n" for sentence in found)


def experiment(path: Path) -> str:
    """What the lecture claims and what was found, and the table of it.

    Raises:
        ValueError: the file holds no experiment; the message names it.
    """
    try:
        found = json.loads(path.read_text())
        claims, rows = found["claims"], found["rows"]
        lines = [(c["text"], _value(c["value"]), _value(c["bound"]), "yes" if c["holds"] else "**no**") for c in claims]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what `python -m benchmarks lecture --out DIR` writes; {error}") from error
    text = as_markdown(Table("", ("claim", "found", "bound", "holds"), tuple(lines)))
    header = tuple(dict.fromkeys(name for row in rows for name in row))
    table = tuple(tuple(_value(row.get(name)) for name in header) for row in rows)
    return f"{text}\n{as_markdown(Table('', header, table))}" if table else text


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# The blocks that are made of no run: of one experiment of the lecture, the host's times, and several processes'.
OF_OTHER_FILES: dict[str, Callable[[Path], str]] = {
    "experiment": experiment,
    "host": host_block,
    "ranks-methods": ranks.block(ranks.methods_table),
    "ranks-balances": ranks.block(ranks.balances_table),
    "ranks-delays": ranks.block(ranks.delays_table),
}
BLOCKS: dict[str, Block] = {
    "run-facts": run_facts,
    "module-ratios": module_ratios,
    "module-headline": module_headline,
    "module-memory": module_memory,
    "mask-ratios": mask_ratios,
    "sequence-times": sequence_times,
    "sequence-memory": sequence_memory,
    "norm-ratios": norm_ratios,
    "layer-ratios": layer_ratios,
    "varlen-ratios": varlen_ratios,
    "decode-ratios": decode_ratios,
    "function-times": function_times,
    "hugging-face-ratios": hugging_face_ratios,
    "slower": slower,
    "errors": errors,
    "quality": quality,
    "tiles": tiles,
    "findings": sentences,
}
