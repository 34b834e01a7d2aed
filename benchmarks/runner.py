"""Runs a case: refuse, check, time, measure memory; whatever happens becomes a row."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.accuracy import Accuracy, Gate
from benchmarks.cases import Case
from benchmarks.memory import peak_on_cuda
from benchmarks.registry import Family, Step
from benchmarks.timing import Timing, time_on_cpu, time_on_cuda

Status = Literal["ok", "refused", "wrong", "out of memory", "error"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant on one case. Only a row that is ``ok`` has a timing.

    ``copy_rate`` is what :func:`benchmarks.ceilings.copy_rate` found in the same run.
    """

    case: Case
    variant: str
    status: Status
    reason: str = ""
    accuracy: Accuracy | None = None
    timing: Timing | None = None
    peak_mib: float | None = None
    copy_rate: float | None = None

    @property
    def tflops(self) -> float | None:
        return self._rate(self.case.flops)

    @property
    def tb_per_s(self) -> float | None:
        return self._rate(self.case.moved_bytes)

    @property
    def of_floor(self) -> float | None:
        """The time that a copy of as many bytes takes, over the time that was taken."""
        return None if self.tb_per_s is None or not self.copy_rate else self.tb_per_s / self.copy_rate

    def _rate(self, amount: float | None) -> float | None:
        """``amount`` of a step in units of 10^12 a second."""
        return None if amount is None or self.timing is None else amount / self.timing.wall_ms.median / 1e9


def run_case(
    family: Family,
    case: Case,
    *,
    seconds: float,
    copy_rate: float | None = None,
    only: Callable[[str], bool] = lambda variant: True,
    show: Callable[[str], None] = lambda progress: None,
) -> list[Row]:
    """A row for every variant of the family.

    Args:
        family: of the case.
        case: what to solve.
        seconds: to spend on timing, all variants together.
        copy_rate: of the machine in TB/s, for cases that memory bounds.
        only: which variants by name.
        show: is told what is being done.
    """
    cuda = torch.device(case.device).type == "cuda"
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    try:
        gate = Gate(family, case)
    except Exception as error:
        status, reason = _explained(error)
        return [Row(case, v.name, status, f"no float64 truth: {reason}") for v in family.variants if only(v.name)]

    for variant in family.variants:
        if not only(variant.name):
            continue
        reason = variant.applies(case)
        if reason is not None:
            rows[variant.name] = Row(case, variant.name, "refused", reason)
            continue
        show(f"{case.name}: checking {variant.name}")
        try:
            step = variant.build(case, case.dtype)
            accuracy = gate.check(step, variant)
            peak = peak_on_cuda(step) if cuda else None
        except Exception as error:
            rows[variant.name] = Row(case, variant.name, *_explained(error))
        else:
            status: Status = "ok" if accuracy.passed else "wrong"
            rows[variant.name] = Row(case, variant.name, status, "", accuracy, None, peak)
            if accuracy.passed:
                steps[variant.name] = step
        _release(cuda)
    del gate

    if steps:
        show(f"{case.name}: timing {', '.join(steps)}")
        time_steps = time_on_cuda if cuda else time_on_cpu
        try:
            for name, timing in time_steps(steps, family.peer, seconds=seconds).items():
                rows[name] = dataclasses.replace(rows[name], timing=timing)
        except Exception as error:
            status, reason = _explained(error)
            rows |= {name: dataclasses.replace(rows[name], status=status, reason=reason) for name in steps}
    return [dataclasses.replace(row, copy_rate=copy_rate) for row in rows.values()]


def _explained(error: Exception) -> tuple[Status, str]:
    text = str(error).strip().split("\n")[0][:300]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory", text
    return "error", f"{type(error).__name__}: {text}"


def _release(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
