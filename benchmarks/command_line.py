"""A measurement from the command line: what was asked for, the run, what is printed and written of it."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.environment import environment, load
from benchmarks.families import families
from benchmarks.gpu.matrix import Part
from benchmarks.jobs import carry_out, new_document, resumed
from benchmarks.measure.timing import keep_freed_memory
from benchmarks.reporting.document import FAILED, OURS, write_run
from benchmarks.reporting.findings import findings
from benchmarks.reporting.tables import all_tables
from benchmarks.reporting.text import show
from benchmarks.selection import Settings, entries, jobs

# Of a quick run, which has to end within three minutes even on a busy machine that has to be set up first.
QUICK_BUDGET = 115.0
_INTERRUPTED = 130  # as a shell has it
_LARGEST = 10_000_000  # seconds, or threads: more than a clock or a timer takes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check, then time, fastattn beside its peers.",
        epilog="Two more commands have a --help of their own: compare A.json B.json, and report RUN.json.",
    )
    parser.add_argument("--quick", action="store_true", help="the short set of cases")
    parser.add_argument("--list", action="store_true", help="print the cases and their variants, and why one refuses")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="a family, or cases with TEXT in their name: norm, l1024, quality; several between commas",
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="of every case (default: its own)"
    )
    parser.add_argument(
        "--threads", type=_positive(int), default=1, help="torch's threads on a CPU (default: 1, steady when busy)"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), help="of timing a case (default: 0.2 quick or on a GPU, else 2)"
    )
    parser.add_argument(
        "--budget", type=_positive(float), metavar="SECONDS",
        help=f"for the run: what does not fit is left out, and named (default: {QUICK_BUDGET:.0f} quick on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        metavar="SECONDS",
        help="for a variant (default: 20 quick, else 60)",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of inputs and weights (default: 0)")
    parser.add_argument("--eager", action="store_true", help="without the variants that compile first")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="every configuration of our kernels beside the fastest peers; on a CPU a trial of it",
    )
    parser.add_argument(
        "--part",
        choices=get_args(Part),
        default="",
        help="of the cases for a GPU: the question that is asked first, or the rest (default: all)",
    )
    parser.add_argument(
        "--launched", metavar="FILE", type=Path, help="the first launches of a GPU run: what failed there is not run"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the run to FILE")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write run.json there, as it grows, and its report")
    parser.add_argument("--no-report", action="store_true", help="--out gets run.json alone")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value <= _LARGEST:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to {2**31 - 1}")
    return value


def _device(text: str) -> str:
    """A device of a kind that there are cases for."""
    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: expected cpu, cuda or cuda:0, ...") from error
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:0, ...")
    return text


def _settings(options: argparse.Namespace) -> Settings:
    on_cpu = torch.device(options.device).type == "cpu"
    return Settings(
        quick=options.quick,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        seconds=options.seconds or (0.2 if options.quick or not on_cpu else 2.0),
        timeout=options.timeout or (20.0 if options.quick else 60.0),
        seed=options.seed,
        only=options.only,
        budget=options.budget or (QUICK_BUDGET if options.quick and on_cpu else None),
        eager=options.eager,
        sweep=options.sweep,
        part=options.part,
        launched=str(options.launched or ""),
    )


def _list(settings: Settings) -> None:
    can_ask = settings.on_cpu or torch.cuda.is_available()
    for case, names in entries(settings):
        print(case.name)
        for name in names:
            reason = families()[case.family].variant(name).applies(case) if can_ask else None
            print(f"    {name}" + (f"  refuses: {reason}" if reason else ""))
    for job in jobs(settings):
        if job.kind in ("quality", "tiles", "host"):
            print(job.key)


def _print(document: dict[str, Any]) -> None:
    for table in all_tables(document):
        show(table)
    print()
    for sentence in findings(document):
        print(sentence)
    for key, reason in document["failed"].items():
        print(f"{key} broke down: {reason}")
    if left_out := document["left_out"]:
        why = "interrupted" if document["state"] == "interrupted" else "no time left"
        print(f"\n{why}: {len(left_out)} left out: {', '.join(left_out)}")
    counts = f"{len(document['done'])} jobs, {len(document['results'])} rows"
    print(f"\n{counts} in {document['seconds']:.0f} s, load {load():.1f}")


def _prepare(options: argparse.Namespace) -> Path | None:
    """Where the run is written as it grows. What is asked for is tried before it is measured.

    An unfinished run that lies there is kept beside it.

    Raises:
        ValueError: a path is of no use; the message names it.
    """
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that is there")
    if not options.out:
        return None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {options.out}: expected a folder, or a place for one; {error}") from error
    path = options.out / "run.json"
    if path.exists() and not options.resume:
        old = path.with_name("run.json.old")
        path.replace(old)
        print(f"the run that lay in {options.out} is now {old}", file=sys.stderr)
    return path


def _write(options: argparse.Namespace, document: dict[str, Any]) -> list[str]:
    """The run's files, as far as they are asked for; where they are."""
    said = []
    if options.json:
        write_run(options.json, document)
        said.append(f"written to {options.json}")
    if options.out and options.no_report:
        said.append(f"written to {options.out}: run.json")
    elif options.out:
        from benchmarks.reporting.report import report

        files = report(options.out / "run.json", options.out)
        pictures = f" and {sum(f.suffix == '.svg' for f in files)} pictures" if len(files) > 2 else ""
        said.append(f"written to {options.out}: run.json, report.md, results.csv{pictures}")
    return said


def _again(arguments: list[str]) -> str:
    given = [a for a in arguments if a != "--resume"]
    return f"python -m benchmarks {shlex.join(given)} --resume"


def main(arguments: list[str]) -> int:
    """The command line.

    Its exit status is 1 where this package gave a wrong result or failed, 2 where it was asked for what is not there,
    130 where it was interrupted; what peers do is in the tables, and fails nothing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.launched and not options.launched.is_file():
        parser.error(f"--launched {options.launched}: expected the file that a GPU run has written")
    if options.resume and not options.out:
        parser.error("--resume: needs --out DIR, where the run to go on with lies")
    settings = _settings(options)
    todo = jobs(settings)
    if not todo:
        print(f"no case contains {options.only!r}; --list shows them", file=sys.stderr)
        return 2
    if options.list:
        _list(settings)
        return 0
    if not settings.on_cpu:
        index = torch.device(settings.device).index or 0
        if index >= torch.cuda.device_count():
            print(
                f"--device {options.device}: torch sees {torch.cuda.device_count() or 'no'} CUDA device",
                file=sys.stderr,
            )
            return 2
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
    gc.freeze()  # what is imported stays: to look through it after each variant took a third of a quick run

    facts = environment()
    document = new_document(dataclasses.asdict(settings), facts)
    try:
        path = _prepare(options)
        if options.resume and path is not None:
            document = resumed(path, dataclasses.asdict(settings), facts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if settings.on_cpu and load() > (facts["cores"] or 1):
        print("the machine is busy: rows that others disturbed are marked; trust their cpu ratio")
    carry_out(todo, document, path, budget=settings.budget, watch=None if settings.on_cpu else 1.5 * settings.timeout)
    said = _write(options, document)
    _print(document)
    print("\n".join(said))
    if document["left_out"] and options.out:
        print(f"what was left out: {_again(arguments)}")
    if document["state"] == "interrupted":
        return _INTERRUPTED
    failed = [r for r in document["results"] if r["variant"] == OURS and r["status"] in FAILED]
    for row in failed:
        print(f"{row['case']}: {OURS}: {row['status']}: {row['reason']}", file=sys.stderr)
    return 1 if failed or document["failed"] else 0
