"""First launches: before anything is timed, each of our kernels runs once on a small problem, under a watchdog.

So a kernel that hangs costs its process and not the run, one that is wrong is known before it is timed, and what is
timed is compiled already: the processes compile side by side into triton's cache, and the small problems of
:func:`benchmarks.families.kernels.small` are compiled as the large ones are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import AttentionCase, Case, KernelCase
from benchmarks.families import kernels
from benchmarks.gpu import cache, pool
from benchmarks.gpu.pool import Report, Task
from benchmarks.measure.accuracy import Gate
from benchmarks.reporting.document import OURS, write_run
from benchmarks.run_case import Status, explained
from benchmarks.variants import Family, Refused

FILE = "first_launches.json"
LIMIT = 60.0  # seconds of one launch, compiling included: more is a hang
_MOST_WORKERS = 16  # each has a context on the GPU, half a gigabyte
_REPEATS = 3  # a race need not show the first time
# What a configuration is not timed after. Not "out of memory", which may be the others' doing
BARRED: tuple[Status, ...] = ("wrong", "error", "timed out")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the launches of one variant for one kind of case.

    Attributes:
        status: of the launches.
        reason: why, where it is not ``ok``.
        error: the worst of them.
        error_budget: what it may be.
        compiled: kernels that had to be compiled.
        from_cache: kernels that triton's cache had.
    """

    status: Status
    reason: str = ""
    error: float | None = None
    error_budget: float | None = None
    compiled: int = 0
    from_cache: int = 0


# --------------------------------------------------------------------------------------------------- in its own process


def launch(variant: str, case: KernelCase) -> Outcome:
    """Build a variant for a small case and hold what it returns, each time, against float64.

    Raises:
        pool.Unusable: an illegal access, after which this process's GPU takes no more work.
    """
    return launch_of(kernels.FAMILY, variant, case)


def launch_of(family: Family[Any], variant: str, case: KernelCase) -> Outcome:
    """:func:`launch` of a variant of this family."""
    with cache.counting() as counts:
        outcome = _judged(family, variant, case)
    return dataclasses.replace(outcome, compiled=counts["compiled"], from_cache=counts["from_cache"])


def _judged(family: Family[Any], variant: str, case: KernelCase) -> Outcome:
    try:
        return _checked(family, variant, case)
    except Refused as refusal:
        return Outcome("refused", str(refusal))
    except Exception as error:
        outcome = Outcome(*explained(error))
        if torch.device(case.device).type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise pool.Unusable(outcome.reason) from lost
        return outcome


def _checked(family: Family[Any], name: str, case: KernelCase) -> Outcome:
    variant = family.variant(name)
    worst = Outcome("ok")
    for shape in filter(None, (case, kernels.ragged(case))):
        if (reason := variant.applies(shape)) is not None:
            raise Refused(reason)
        gate, step = Gate(family, shape), variant.build(shape, shape.dtype)
        for _ in range(_REPEATS):
            found = gate.check(step, variant)
            if not found.passed:
                return Outcome("wrong", f"{found.error:.1e} from float64 at L = {shape.seqlen}", None, found.budget)
            if found.error >= (worst.error or 0.0):
                worst = Outcome("ok", "", found.error, found.budget)
    return worst


# --------------------------------------------------------------------------------------------------------- all of them


def tasks_of(entries: Iterable[tuple[Case, tuple[str, ...]]]) -> list[Task]:
    """A launch for each of our variants and kind of case, in the cases' order.

    What the package picks comes last: it is one of the others, whose binaries then are there.
    """
    kinds = [
        (name, kernels.small(case))
        for case, names in entries
        if isinstance(case, KernelCase)
        for name in names
        if name in kernels.OURS
    ]
    ordered = sorted(dict.fromkeys(kinds), key=lambda kind: kind[0] == OURS)
    return [Task(f"{name}: {case.name}", f"{name} {case.direction}", launch, (name, case)) for name, case in ordered]


def carry_out(
    tasks: list[Task], path: Path, *, budget: float, limit: float = LIMIT, workers: int = 0
) -> dict[str, Any]:
    """Do the launches; what is returned is in the file as it grows.

    Args:
        tasks: as of :func:`tasks_of`: their arguments begin with a variant's name and a case.
        path: of the file.
        budget: seconds for all of them.
        limit: seconds for each.
        workers: processes; 0: as many as there are cores, since what they do for most of the time is compile.
    """
    workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    document: dict[str, Any] = {
        "workers": workers,
        "limit_s": limit,
        "budget_s": budget,
        "launches": [],
        "left_out": [],
    }

    def tell(task: Task, report: Report) -> None:
        variant, case, *_ = task.arguments
        row = {"variant": variant, "case": case.name, **dataclasses.asdict(_outcome(report))}
        document["launches"].append(row | {"seconds": round(report.seconds, 2)})
        write_run(path, document)

    left_out = pool.run(tasks, workers=workers, limit=limit, budget=budget, tell=tell)
    document["left_out"] = [task.key for task in left_out]
    write_run(path, document)
    return document


def _outcome(report: Report) -> Outcome:
    if report.fate == "done":
        return report.result
    return Outcome("timed out" if report.fate in ("hung", "skipped") else "error", report.reason)


def sentences(document: dict[str, Any]) -> list[str]:
    """How many launches became what, and what is known of those that are not timed."""
    launches = document["launches"]
    counts = collections.Counter(row["status"] for row in launches)
    said = [f"first launches: {', '.join(f'{count} {status}' for status, count in counts.items()) or 'none'}"]
    if document["left_out"]:
        said[0] += f"; {len(document['left_out'])} left out, for which the watchdog of the timed run is there"
    compiled, cached = (sum(row.get(kind, 0) for row in launches) for kind in ("compiled", "from_cache"))
    if compiled or cached:
        said.append(f"kernels of the first launches: {compiled} compiled, {cached} from the cache")
    barred: dict[tuple[str, str, str], list[str]] = {}
    for row in launches:
        if row["status"] in BARRED:
            barred.setdefault((row["variant"], row["status"], row["reason"]), []).append(row["case"])
    for (variant, status, reason), cases in barred.items():
        others = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        said.append(f"not timed: {variant} in {cases[0]}{others}: {status}: {reason}")
    return said


# ------------------------------------------------------------------------------------------------- what follows of them

_PICKED = (OURS, "fastattn-gluon", "fastattn-gluon-pair")  # what the package picks, and which kernels that is on Hopper


def barred(path: str, case: Case) -> dict[str, tuple[Status, str]]:
    """The variants that are not to run for a case, with a status and the reason.

    In every family of attention what the package picks would hang where its kernels did, those of the forward in a
    backward too.
    """
    if not path or not isinstance(case, AttentionCase):
        return {}
    rows, own = _read(path), kernels.small(case).name
    hung = [_hang(rows, kernels.small(case, backward=backward).name) for backward in (False, case.backward)]
    found: list[dict[str, Any]] = [{**row, "variant": OURS} for row in hung if row is not None]
    if isinstance(case, KernelCase):
        found += [row for row in rows if row["case"] == own and row["status"] in BARRED]
    return {row["variant"]: (row["status"], f"first launch: {row['reason']}") for row in found}


def hangs(document: dict[str, Any]) -> bool:
    """Did what the package picks hang anywhere?"""
    rows = document["launches"]
    return any(_hang(rows, kind) is not None for kind in {row["case"] for row in rows})


def _hang(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The row that says that what the package picks hangs: its own, or that of its kernels where there is none."""
    known = {row["variant"]: row for row in rows if row["case"] == kind}
    row = next((known[name] for name in _PICKED if name in known), None)
    return row if row is not None and row["status"] == "timed out" else None


@functools.cache
def _read(path: str) -> list[dict[str, Any]]:
    return json.loads(Path(path).read_text())["launches"]
