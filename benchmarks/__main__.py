"""``python -m benchmarks``: check, then time, this package beside torch.

python -m benchmarks --quick --out DIR           what `make bench` runs: a CPU, under three minutes
python -m benchmarks --list
python -m benchmarks --only module-b8 --json results.json
python -m benchmarks compare A.json B.json       did anything become slower? (the exit status says so, too)
python -m benchmarks report RUN.json             the run as Markdown, CSV and pictures
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import sequence
from benchmarks.cases import AttentionCase, Case
from benchmarks.ceilings import ceilings, describe
from benchmarks.environment import environment, load
from benchmarks.memory import peaks_on_cpu
from benchmarks.module import MEMORY_CASES
from benchmarks.quality import report as quality
from benchmarks.registry import Variant, all_cases, families, quick_cases
from benchmarks.report import HEADER, cells, print_table, write_json
from benchmarks.runner import Row, run_case
from benchmarks.tiles import SEQLEN, counts
from benchmarks.timing import keep_freed_memory

# The quick set on a busy machine: what is not reached by then is named and left out.
_QUICK_SECONDS = 110.0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Check, then time, fastattn beside torch."
    )
    parser.add_argument("--quick", action="store_true", help="the short set of cases")
    parser.add_argument("--list", action="store_true", help="print the cases and their variants, and why one refuses")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="of every case (default: its own)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads on a CPU (default: 1, steady when busy)"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="of timing a case (default: 0.3 quick, else 2)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything to FILE")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write run.json there, and its report with pictures")
    return parser.parse_args(arguments)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    cases = quick_cases() if arguments.quick else all_cases()
    cases = [dataclasses.replace(c, device=arguments.device) for c in cases]
    if arguments.dtype is not None:
        cases = [dataclasses.replace(c, dtype=getattr(torch, arguments.dtype)) for c in cases]
    return [c for c in dict.fromkeys(cases) if arguments.only in c.name]


def _variants(case: Case, *, quick: bool) -> list[Variant[Any]]:
    return [v for v in families()[case.family].variants if not (quick and v.slow)]


def _list(cases: list[Case], *, quick: bool) -> None:
    for case in cases:
        print(case.name)
        for variant in _variants(case, quick=quick):
            reason = variant.applies(case)
            print(f"    {variant.name}" + (f"  refuses: {reason}" if reason else ""))


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{progress[:110]}", end="", file=sys.stderr, flush=True)


def _memory_rows() -> list[Row]:
    """Averaged weights at L = S = 2048, 8 heads: the peak of each module in a process of its own."""
    pairs = [(c, v.name) for c in MEMORY_CASES for v in families()[c.family].variants if v.applies(c) is None]
    _say(f"peak memory of {len(pairs)} processes")
    peaks = peaks_on_cpu(pairs)
    return [
        Row(case, name, "error" if peak is None else "ok", "" if peak is not None else "no answer", peak_mib=peak)
        for (case, name), peak in zip(pairs, peaks)
    ]


def _print_memory(rows: list[Row]) -> None:
    peaks = {(row.case.name, row.variant): row.peak_mib for row in rows}
    lines = []
    for row in rows:
        peer = peaks.get((row.case.name, families()[row.case.family].peer))
        of_peer = "" if not peer or row.peak_mib is None else f"{row.peak_mib / peer:.2f}"
        lines.append((row.case.name, row.variant, row.reason or f"{row.peak_mib:.0f}", of_peer))
    print_table("peak memory of one step, MiB", ("case", "variant", "MiB", "of the peer's"), lines)


def _tiles() -> list[dict[str, Any]]:
    """What :func:`counts` finds, or nothing, and why, where triton is not at hand."""
    _say("counting the tiles that masks leave")
    try:
        return counts()
    except RuntimeError as error:
        print(error)
        return []


def _print_tiles(rows: list[dict[str, Any]]) -> None:
    lines = [
        (row["mask"], *(str(row[name]) for name in ("tiles", "whole", "in_part")),
         f"{(row['whole'] + row['in_part']) / row['tiles']:.2f}")
        for row in rows
    ]  # fmt: skip
    header = ("mask", "tiles", "visited whole", "visited in part", "of all")
    print_table(f"tiles of scores that the kernels visit, L = S = {SEQLEN}", header, lines)


def _of_sequences(cases: list[Case]) -> list[AttentionCase]:
    """The shortest and the longest case of the family ``sequence``."""
    of_family = [c for c in cases if isinstance(c, AttentionCase) and c.family == "sequence" and not c.backward]
    of_family.sort(key=lambda case: case.seqlen)
    return list(dict.fromkeys([*of_family[:1], *of_family[-1:]]))


def _theory(cases: list[Case]) -> dict[str, Any]:
    return {case.name: sequence.theory(case) for case in _of_sequences(cases)}


def _quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the ways of processing sequences can learn."""
    started = time.monotonic()
    return quality.run(
        options.quick, 0, lambda what: _say(f"{what} ({time.monotonic() - started:.0f} s)"), options.device
    )


def _write(options: argparse.Namespace, rows: list[Row], facts: dict[str, Any], **more: Any) -> None:
    """The run's files, as far as they are asked for; the last line says where they are."""
    if options.json:
        write_json(options.json, rows, facts, **more)
        print(f"written to {options.json}")
    if options.out:
        run = options.out / "run.json"
        write_json(run, rows, facts, **more)
        try:
            from benchmarks import pictures
        except ModuleNotFoundError as error:  # matplotlib is in the extra `bench` only
            print(f"no report beside {run}: {error}")
            return
        pictures.report(run, options.out)
        print(f"written to {options.out}: run.json, report.md, results.csv, pictures")


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is 1 where a result is wrong or a step failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from benchmarks import compare

        return compare.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from benchmarks import pictures

        return pictures.main(arguments[1:])
    options = _arguments(arguments)
    cases = _cases(options)
    learns = not options.only or options.only == "quality"
    if not cases and not learns:
        print(f"no case contains {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        _list(cases, quick=options.quick)
        return 0
    on_cpu = torch.device(options.device).type == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print(f"--device {options.device}: torch sees no CUDA device", file=sys.stderr)
        return 2
    if on_cpu:
        torch.set_num_threads(options.threads)
        keep_freed_memory()
    facts = environment()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if on_cpu and load() > (facts["cores"] or 1):
        print("the machine is busy: trust the cpu ratio more than the ratio")

    seconds = options.seconds or (0.3 if options.quick else 2.0)
    known, rows, started = families(), [], time.monotonic()
    memory = _memory_rows() if on_cpu and not options.only else []
    tiles = [] if options.only else _tiles()
    limits = ceilings(cases)
    left_out: list[str] = []
    for index, case in enumerate(cases):
        elapsed = time.monotonic() - started
        if options.quick and elapsed > _QUICK_SECONDS:
            left_out = [case.name for case in cases[index:]]
            break
        left = elapsed / index * (len(cases) - index) if index else 0.0
        _say(f"{index + 1}/{len(cases)}, {left:.0f} s left: {case.name}")
        only = {variant.name for variant in _variants(case, quick=options.quick)}
        rows += run_case(
            known[case.family],
            case,
            seconds=seconds,
            copy_rate=limits.get("copy_tb_per_s"),
            only=only.__contains__,
            show=_say,
        )
    _say("")

    for family in dict.fromkeys(row.case.family for row in rows):
        # What refuses by its nature is in --list: here it would only be noise
        shown = [row for row in rows if row.case.family == family and row.status != "refused"]
        print_table(f"{family}, ratio to {known[family].peer}", HEADER, [cells(row) for row in shown])
    if memory:
        _print_memory(memory)
    if tiles:
        _print_tiles(tiles)
    if limits:
        print(f"\n{describe(limits)}")
    for case in _of_sequences(cases):
        sequence.print_theory(case)
    learned = _quality(options) if learns else []
    _say("")
    if learned:
        quality.print_rows(learned)
    if left_out:
        print(f"\nthe machine is too busy: {len(left_out)} cases left out: {', '.join(left_out)}")
    print(f"\n{len(rows)} rows in {time.monotonic() - started:.0f} s, load {load():.1f}")
    more = {"left_out": left_out, "tiles": tiles, "ceilings": limits, "quality": learned}
    _write(options, [*rows, *memory], facts, theory=_theory(cases), **more)
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
