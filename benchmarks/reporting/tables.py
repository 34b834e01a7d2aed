"""A run as tables: each is defined once, from the run's document, for the terminal as for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.reporting.document import (
    EQUIVARIANCE,
    OURS,
    TIE,
    Document,
    Result,
    by_case,
    by_family,
    learned,
    peer_of,
    rival_of,
    short_names,
    timed_of,
)
from benchmarks.reporting.host import host_table
from benchmarks.reporting.kernels import kernel_tables
from benchmarks.reporting.text import Table, number, rate, ratio, table_of

_SAME_CLOCK = 0.05  # a processor time nearer to the wall clock's than this says nothing new
_LARGEST = 6  # cases of a family, in the table of memory

Lines = list[tuple[str, ...]]


# ------------------------------------------------------------------------------------------------------------ families


def _median(value: dict[str, float] | None) -> str:
    return "" if value is None else number(value["median"])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _time(row: Result) -> str:
    wall = row["wall_ms"]
    if wall is None:
        return row["status"]
    mark = "*" if row["contended"] else ""
    return f"{number(wall['median'])}{mark} [{number(wall['p20'])} {number(wall['p80'])}]"


def _other_clock(row: Result) -> bool:
    """Does the processor's time say what the wall clock's does not?"""
    wall, process = row["wall_ms"], row["process_ms"]
    if wall is None or process is None:
        return False
    return row["contended"] or abs(process["median"] / wall["median"] - 1) > _SAME_CLOCK


def _error(row: Result) -> str:
    if row["error"] is None:
        return ""
    return f"{row['error']:.0e}/{row['error_budget']:.0e}".replace("e-0", "e-")


def _rate(row: Result, ceilings: dict[str, Any]) -> str:
    """Bytes where moving them makes the floor, else operations."""
    copy_rate = ceilings.get("copy_tb_per_s")
    bytes_bind = row["tflops"] is None
    if row["tb_per_s"] is not None and not bytes_bind and copy_rate and row["floor_ms"]:
        bytes_bind = row["moved_bytes"] / copy_rate / 1e9 > 0.999 * row["floor_ms"]
    return rate(row["tb_per_s"], "B/s") if bytes_bind else rate(row["tflops"], "F/s")


def family_table(document: Document, family: str) -> Table:
    """What of a family was not refused, under each case its variants; the fastest one is set off."""
    rows = by_family(document).get(family, [])
    shown = [row for row in rows if row["status"] != "refused"]
    names, shared = short_names(dict.fromkeys(row["case"] for row in shown))
    peer, ceilings = peer_of(rows), document.get("ceilings") or {}

    def beside_best(row: Result) -> bool:  # where that is the peer, the ratio is there already
        return peer not in (row["variant"], row["best"])

    columns: tuple[tuple[str, Callable[[Result], str]], ...] = (
        ("ms [p20 p80]", _time),
        ("cpu ms", lambda row: _median(row["process_ms"]) if _other_clock(row) else ""),
        ("ratio [95 %]", lambda row: ratio(row["ratio"])),
        ("cpu ratio", lambda row: ratio(row["process_ratio"]) if _other_clock(row) else ""),
        ("best other", lambda row: (row["best"] or "") if beside_best(row) else ""),
        ("ratio to it", lambda row: ratio(row["best_ratio"]) if beside_best(row) else ""),
        ("error/budget", _error),
        ("rate", lambda row: _rate(row, ceilings)),
        ("of floor", lambda row: _share(row["of_floor"])),
        ("of datasheet", lambda row: _share(row["of_datasheet"])),
        ("peak MiB", lambda row: number(row["peak_mib"])),
        ("saved MiB", lambda row: number(row["saved_mib"])),
        ("warm ms", lambda row: _median(row["warm_ms"])),
        ("graph ms", lambda row: _median(row["graph_ms"])),
        ("host ms", lambda row: _median(row["host_ms"])),
    )
    lines: Lines = []
    strong = []
    for case, variants in by_case(shown).items():
        fastest = min(timed_of(variants.values()), key=lambda row: row["wall_ms"]["median"], default=None)
        lines.append((names[case], *[""] * len(columns)))
        for row in variants.values():
            if row is fastest:
                strong.append(len(lines))
            lines.append((f"  {row['variant']}", *(cell(row) for _, cell in columns)))
    title = f"{family}: {shared.removeprefix(f'{family}-')}" if shared not in ("", family) else family
    title += f", ratio to {peer}" if peer else ""
    return table_of(title, ("case, variant", *(name for name, _ in columns)), lines, _notes(rows), strong)


def _contention(rows: Iterable[Result]) -> str:
    contended = [row for row in rows if row["contended"]]
    if not contended:
        return ""
    cores = max(row["others"] or 0.0 for row in contended)
    kept = f"kept up to {cores:.1f} cores busy" if cores else "wanted its core"
    return f"* others {kept} meanwhile: trust the cpu ratio"


def _notes(rows: list[Result]) -> list[str]:
    notes = [_contention(rows)]
    failed: dict[str, int] = {}
    for row in rows:
        if row["status"] not in ("ok", "refused"):
            fact = f"{row['variant']}: {row['status']}" + (f": {row['reason']}" if row["reason"] else "")
            failed[fact] = failed.get(fact, 0) + 1
    notes += [fact + (f" ({count} cases)" if count > 1 else "") for fact, count in failed.items()]
    if refused := sum(row["status"] == "refused" for row in rows):
        notes.append(f"{refused} {'rows were' if refused > 1 else 'row was'} refused: results.csv and --list say why")
    return notes + _formulas(rows)


def _formulas(rows: list[Result]) -> list[str]:
    """Each formula of a floor, with what tells its rows from the others: parts of the cases' names, and variants."""
    users: dict[str, list[Result]] = {}
    for row in rows:
        if row["formula"]:
            users.setdefault(row["formula"], []).append(row)
    every = dict.fromkeys(row["variant"] for of_one in users.values() for row in of_one)
    _, everywhere = short_names(row["case"] for row in rows)
    notes = []
    for formula, of_one in users.items():
        _, shared = short_names(row["case"] for row in of_one)
        which = ["-".join(part for part in shared.split("-") if part not in everywhere.split("-"))]
        variants = dict.fromkeys(row["variant"] for row in of_one)
        which += [", ".join(variants)] if variants != every else []
        told = "; ".join(filter(None, which))
        notes.append(f"floor{f' of {told}' if told else ''}: {formula}")
    return notes


# ----------------------------------------------------------------------------------------------------- ours and others


def summary(document: Document) -> Table:
    """One line a case: ours beside the fastest of the others, or beside the peer where functions differ."""
    lines: Lines = []
    every = [row for row in document["results"] if row["variant"] == OURS and row["status"] != "refused"]
    names, shared = short_names(row["case"] for row in every)
    notes = [_contention(every)]
    for rows in by_family(document).values():
        peer = peer_of(rows)
        for case, variants in by_case(rows).items():
            ours = variants.get(OURS)
            if ours is None or ours["status"] == "refused":
                continue
            if ours["status"] != "ok":
                notes.append(f"{names[case]}: {ours['status']}: {ours['reason']}")
            other, quotient = rival_of(ours, peer) or ("", None)
            pair = [row for row in (ours, variants.get(other)) if row is not None]
            peaks = " / ".join(filter(None, (number(row["peak_mib"]) for row in pair)))
            rates = _rate(ours, document.get("ceilings") or {}), _share(ours["of_floor"])
            lines.append((names[case], _time(ours), *rates, other, ratio(quotient), peaks))
    header = ("case", "ms [p20 p80]", "rate", "of floor", "other", "ratio to it [95 %]", "MiB ours / its")
    title = f"{OURS} beside the fastest of the others, in the family sequence beside the peer"
    return table_of(f"{title}; all: {shared}" if shared else title, header, lines, notes)


def memory_table(document: Document) -> Table:
    """The largest cases of each family: what a step needs, and what a training step keeps for its backward."""
    lines: Lines = []
    for rows in by_family(document).values():
        peer = peer_of(rows)
        pairs = []
        for case, variants in by_case(rows).items():
            ours = variants.get(OURS)
            other = variants.get(peer or (ours["best"] if ours else None) or "")
            if ours and other and ours["peak_mib"] and other["peak_mib"]:
                pairs.append((case, ours, other))
        pairs.sort(key=lambda pair: -pair[2]["peak_mib"])
        for case, ours, other in pairs[:_LARGEST]:
            figures: list[str] = []
            for name in ("peak_mib", "saved_mib"):
                own, its = ours[name], other[name]
                figures += [number(own), number(its), _share(own / its if own is not None and its else None)]
            lines.append((case, other["variant"], *figures))
    header = ("case", "other", "peak MiB", "its peak", "ours / its", "saved MiB", "its saved", "saved / its")
    title = f"memory: {OURS} beside the peer, the largest {_LARGEST} cases of a family"
    return table_of(title, header, lines)


# -------------------------------------------------------------------------------------------------------- other tables


def environment_table(document: Document) -> Table:
    facts = [(name, "none" if value is None else str(value)) for name, value in document["environment"].items()]
    return table_of("environment", ("what", "value"), facts)


def ceilings_table(document: Document) -> Table:
    ceilings = document.get("ceilings") or {}
    sheet = ceilings.get("datasheet") or {}
    lines: Lines = []
    if copy := ceilings.get("copy_tb_per_s"):
        lines.append(("copy, bytes read and written", rate(copy, "B/s"), rate(sheet.get("tb_per_s"), "B/s")))
    for dtype, value in (ceilings.get("matmul_tflops") or {}).items():
        of_sheet = (sheet.get("matmul_tflops") or {}).get(dtype)
        lines.append((f"matrix product, {dtype}", rate(value, "F/s"), rate(of_sheet, "F/s")))
    note = "floor under a time: its operations at the rate of the product, or its bytes at that of the copy, if longer"
    return table_of(
        "ceilings, measured in the same run", ("what", "measured", "datasheet"), lines, [note] if lines else []
    )


def tiles_table(document: Document) -> Table:
    lines: Lines = []
    for row in document.get("tiles") or []:
        of_all = (row["whole"] + row["in_part"]) / row["tiles"]
        lines.append((row["mask"], str(row["tiles"]), str(row["whole"]), str(row["in_part"]), f"{of_all:.2f}"))
    header = ("mask", "tiles", "visited whole", "visited in part", "of all")
    return table_of("tiles of scores that the kernels visit", header, lines)


def theory_tables(document: Document) -> list[Table]:
    """What can be said of the ways of processing a sequence without a stopwatch."""
    tables = []
    header = (
        "variant",
        "parameters",
        "kFLOP/token",
        "steps",
        "longest path",
        "reach",
        "a layer's",
        "its steps",
        "path",
    )
    for case, variants in (document.get("theory") or {}).items():
        lines = [
            (
                line["variant"],
                f"{line['parameters']:,}",
                f"{line['flops_per_token'] / 1e3:,.0f}",
                str(line["sequential_steps"]),
                "none" if line["longest_path"] is None else str(line["longest_path"]),
                str(line["reach"]),
                f"O({line['complexity_per_layer']})",
                f"O({line['sequential_per_layer']})",
                f"O({line['path_in_symbols']})",
            )
            for line in variants
        ]
        tables.append(table_of(f"{case}, without a stopwatch; O(...): arXiv:1706.03762, table 1", header, lines))
    return tables


def quality_tables(document: Document) -> list[Table]:
    """What the ways of processing sequences learn, what it took, and which do not care about the order."""
    tasks = learned(document)
    trained = [row for models in tasks.values() for row in models.values()]
    names = list(dict.fromkeys(row["model"] for row in trained))
    accuracies: Lines = []
    for task, models in tasks.items():
        best = max(row["accuracy"] for row in models.values())
        winners = ", ".join(name for name, row in models.items() if row["accuracy"] > best - TIE)
        chance = f"{next(iter(models.values()))['chance']:.3f}"
        found = [f"{models[name]['accuracy']:.3f}" if name in models else "" for name in names]
        accuracies.append((task, chance, *found, winners))
    costs = [
        (row["task"], row["model"], f"{row['parameters'] / 1e3:.1f}k", str(row["steps"]), f"{row['seconds']:.1f}")
        for row in trained
    ]
    deviations = [
        (row["model"], f"{row['deviation']:.1e}")
        for row in document.get("quality") or []
        if row["task"] == EQUIVARIANCE
    ]
    took = "what it took, at the same width, parameters, sequences and step budget; who has solved it stops"
    untrained = "untrained: does the result follow a permutation of the inputs?"
    tables = [
        table_of("accuracy on sequences not trained on", ("task", "chance", *names, "best"), accuracies),
        table_of(took, ("task", "model", "parameters", "steps", "seconds"), costs),
        table_of(untrained, ("layers", "deviation"), deviations),
    ]
    return [table for table in tables if table.lines]


def host_tables(document: Document) -> list[Table]:
    """What calls cost the host, if the run has that."""
    return [host_table(rows)] if (rows := document.get("host")) else []


def all_tables(document: Document) -> list[Table]:
    """Those that the run has anything for, in the order in which they are read."""
    tables = [ceilings_table(document)]
    tables += [family_table(document, family) for family in by_family(document)]
    tables += [memory_table(document), tiles_table(document), *theory_tables(document), *quality_tables(document)]
    tables += [*kernel_tables(document), *host_tables(document)]
    return [table for table in tables if table.lines or table.note]
