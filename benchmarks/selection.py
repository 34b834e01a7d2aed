"""What a run consists of: its jobs, from what was asked for."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.cases import AttentionCase, Case
from benchmarks.families import all_cases, families, kernels, quick_cases, sequence
from benchmarks.gpu import first_launches
from benchmarks.gpu.matrix import Part, matrix
from benchmarks.host import run_cases as host
from benchmarks.jobs import Job, Tell, spread_out
from benchmarks.measure.ceilings import ceilings
from benchmarks.measure.tiles import counts
from benchmarks.quality.models import Model, deviations, models
from benchmarks.quality.tasks import Task, tasks
from benchmarks.quality.training import train
from benchmarks.run_case import Row, Status, run_case


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was asked for; a run is resumed by the same.

    Attributes:
        quick: the short set of cases, with the variants that need no compilation.
        device: ``cpu`` or ``cuda``, with an index or without.
        dtype: of every case, by name; None: each its own.
        threads: torch's, on a CPU.
        seconds: of timing a case, all its variants together.
        timeout: seconds for a variant's check, and for its least number of rounds.
        seed: of the cases and of what is trained.
        only: families' names, or parts of the jobs' keys, between commas.
        budget: seconds for the run; None: as long as it takes.
        eager: without the variants that compile first.
        sweep: the configurations of our kernels, and nothing else; on a CPU a trial of it.
        part: of the cases for a GPU, as of :func:`benchmarks.gpu.matrix.matrix`.
        launched: the file of the first launches, whose failures are not run; empty: there were none.
    """

    quick: bool
    device: str = "cpu"
    dtype: str | None = None
    threads: int = 1
    seconds: float = 2.0
    timeout: float = 60.0
    seed: int = 0
    only: str = ""
    budget: float | None = None
    eager: bool = False
    sweep: bool = False
    part: Part = ""
    launched: str = ""

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    def asks_for(self, key: str, family: str) -> bool:
        """Whether one of the words of ``only`` is this family, or is no family and a part of the key."""
        return any(word == family if word in families() else word in key for word in self.only.split(","))


def entries(settings: Settings) -> list[tuple[Case, tuple[str, ...]]]:
    """The cases, each with the names of the variants that it is worth."""
    found: Sequence[tuple[Case, tuple[str, ...]]]
    if settings.sweep:
        found = kernels.trial() if settings.on_cpu else kernels.sweep()
    elif settings.on_cpu:
        cases = quick_cases() if settings.quick else all_cases()
        found = [(case, _names(case, slow=not (settings.quick or settings.eager))) for case in cases]
    else:
        found = matrix(quick=settings.quick, part=settings.part)
    changes: dict[str, Any] = {"device": settings.device, "seed": settings.seed}
    if settings.dtype is not None:
        changes["dtype"] = getattr(torch, settings.dtype)
    asked = {dataclasses.replace(case, **changes): names for case, names in found}
    return [(case, names) for case, names in asked.items() if settings.asks_for(case.name, case.family)]


def _names(case: Case, *, slow: bool) -> tuple[str, ...]:
    return tuple(v.name for v in families()[case.family].variants if slow or not v.slow)


def jobs(settings: Settings) -> list[Job]:
    """In the order in which they are done: the ceilings first, then a bit of everything.

    On a GPU, whose time is dear, the cases come by their worth, and what is not about speed after them.
    """
    chosen = entries(settings)
    cases = [_of_case(case, names, settings) for case, names in chosen]
    rest = [*_tiles(settings), *_host(settings), *_theory([case for case, _ in chosen]), *_quality(settings)]
    if settings.sweep or settings.part == "question":
        rest = []
    first = [_of_ceilings(settings, [case for case, _ in chosen])] if chosen else []
    return first + (spread_out([*cases, *rest]) if settings.on_cpu else [*cases, *rest])


def _of_ceilings(settings: Settings, cases: list[Case]) -> Job:
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    return Job(
        "ceilings",
        "ceilings",
        0.5 + 0.5 * len(dtypes),
        lambda document, hung, tell: {"ceilings": ceilings(settings.device, dtypes)},
    )


def _of_case(case: Case, names: tuple[str, ...], settings: Settings) -> Job:
    def work(document: dict[str, Any], hung: list[str], tell: Tell) -> dict[str, Any]:
        barred = first_launches.barred(settings.launched, case) | _hung_elsewhere(document, case)
        rows = run_case(
            families()[case.family],
            case,
            seconds=settings.seconds,
            limit=settings.timeout,
            only=[name for name in names if name not in barred],
            hung=hung,
            show=tell,
        )
        rows += [Row(case, name, *barred[name]) for name in names if name in barred]
        return {"results": [row.as_json(document["ceilings"]) for row in rows]}

    # Checking takes about as long as timing; compiling some seconds more. On CUDA, only there can it be asked
    can_ask = settings.on_cpu or torch.cuda.is_available()
    variants = [v for v in families()[case.family].variants if v.slow and v.name in names]
    slow = sum(v.applies(case) is None for v in variants) if can_ask else len(variants)
    return Job(case.name, case.family, 0.4 + 1.5 * settings.seconds + 6.0 * slow, work)


def _hung_elsewhere(document: dict[str, Any], case: Case) -> dict[str, tuple[Status, str]]:
    """The variants that hung in two cases alike: each more would cost the run a watchdog's patience."""
    direction = getattr(case, "direction", "")
    alike = [key for key in document["hung"] if {case.family, direction} <= {"", *key.split("-")}]
    hangs = collections.Counter(part for key in alike for part in set(document["hung"][key]))
    return {name: ("timed out", f"hung in {count} cases before") for name, count in hangs.items() if count >= 2}


def _tiles(settings: Settings) -> list[Job]:
    def work(document: dict[str, Any], hung: list[str], tell: Tell) -> dict[str, Any]:
        try:
            return {"tiles": counts()}
        except RuntimeError as error:  # triton is not at hand
            return {"environment": {"tiles": str(error)}}

    return [Job("tiles", "tiles", 6.0, work)] if settings.asks_for("tiles", "tiles") else []


def _host(settings: Settings) -> list[Job]:
    """The host's time of calls on kernels for a GPU, which is measured where there is none; in a process of its own."""

    def work(document: dict[str, Any], hung: list[str], tell: Tell) -> dict[str, Any]:
        if (missing := host.missing()) is not None:
            return {"environment": {"host": missing}}
        rows = host.run_cases(host.names(quick=settings.quick), seconds=host.QUICK_SECONDS)
        if failed := [f"{row['case']}: {row['error']}" for row in rows if row["error"]]:
            raise RuntimeError("; ".join(failed))
        return {"host": rows}

    return [Job("host", "host", 10.0, work)] if settings.on_cpu and settings.asks_for("host", "host") else []


def _theory(cases: list[Case]) -> list[Job]:
    """Of the shortest and the longest case of the family ``sequence``."""
    of_family = [c for c in cases if isinstance(c, AttentionCase) and c.family == "sequence" and not c.backward]
    of_family.sort(key=lambda case: case.seqlen)
    found = {case.name: case for case in (*of_family[:1], *of_family[-1:])}

    def work(case: AttentionCase, document: dict[str, Any], hung: list[str], tell: Tell) -> dict[str, Any]:
        return {"theory": {case.name: sequence.theory(case)}}

    return [Job(f"theory of {name}", "theory", 0.1, functools.partial(work, case)) for name, case in found.items()]


def _quality(settings: Settings) -> list[Job]:
    """Every model on every task, and who follows a permutation."""

    def trained(task: Task, model: Model, document: dict[str, Any], hung: list[str], tell: Tell) -> dict[str, Any]:
        curve = train(
            task,
            model,
            seed=settings.seed,
            steps=task.quick_steps if settings.quick else task.steps,
            device=settings.device,
            show=lambda sample: tell("", f"step {sample.step}, accuracy {sample.accuracy:.3f}"),
        )
        return {"quality": [curve.as_json()]}

    found = [
        Job(f"quality: {task.name}, {model.name}", "quality", 3.0 if settings.quick else 20.0,
            functools.partial(trained, task, model))
        for task in tasks()
        for model in models(quick=settings.quick)
    ]  # fmt: skip
    found.append(Job("quality: equivariance", "quality", 0.5, lambda *_: {"quality": deviations(settings.seed)}))
    return [job for job in found if settings.asks_for(job.key, "quality")]
