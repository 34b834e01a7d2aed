"""Runs a case: refuse, check, weigh, time; whatever happens becomes a row."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
import signal
import threading
from collections.abc import Callable, Collection, Generator
from typing import Any, Literal

import torch

from benchmarks.cases import Case
from benchmarks.measure.accuracy import Accuracy, Gate
from benchmarks.measure.ceilings import floor_ms, of_datasheet
from benchmarks.measure.memory import peak_mib, saved_tensors
from benchmarks.measure.timing import Timing, TooSlow, time_on_cpu, time_on_cuda
from benchmarks.variants import Family, Refused, Step, Variant, Work

Status = Literal["ok", "refused", "wrong", "out of memory", "timed out", "error", "unchecked"]

NO_WORK = Work()  # of a row that was not timed

Show = Callable[[str, str], None]  # told which variant is at work, and what is done with it


class DeviceLost(Exception):
    """After this variant the GPU takes no more work from this process."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant on one case. Only a row that is ``ok`` has a timing.

    Attributes:
        case: what was solved.
        variant: by what.
        status: what became of it.
        reason: why, where the status is not ``ok``.
        accuracy: against float64.
        timing: what it took.
        peak_mib: of one step, beside what the case gives.
        saved_mib: what a training step keeps for its backward, beside inputs and parameters.
        work: what a step has to do at least.
    """

    case: Case
    variant: str
    status: Status
    reason: str = ""
    accuracy: Accuracy | None = None
    timing: Timing | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    work: Work = NO_WORK

    def as_json(self, ceilings: dict[str, Any]) -> dict[str, Any]:
        """Plain values: the case's own fields, and what the run's ceilings make of the time."""
        timing = dataclasses.asdict(self.timing) if self.timing else dict.fromkeys(_TIMES) | {"contended": False}
        median = self.timing.wall_ms.median if self.timing else None
        floor = floor_ms(self.work, self.case.dtype_name, ceilings)

        def rate(amount: float | None) -> float | None:  # in units of 10^12 a second
            return amount / median / 1e9 if amount is not None and median else None

        row = {
            "case": self.case.name,
            **{field.name: getattr(self.case, field.name) for field in dataclasses.fields(self.case)},
            "variant": self.variant,
            "status": self.status,
            "reason": self.reason,
            "error": _finite(self.accuracy.error if self.accuracy else None),
            "error_budget": self.accuracy and self.accuracy.budget,
            **timing,
            **dataclasses.asdict(self.work),
            "tflops": rate(self.work.flops),
            "tb_per_s": rate(self.work.moved_bytes),
            "floor_ms": floor,
            "of_floor": floor / median if floor is not None and median else None,
            "of_datasheet": of_datasheet(self.work, self.case.dtype_name, median, ceilings) if median else None,
            "peak_mib": self.peak_mib,
            "saved_mib": self.saved_mib,
        }
        return _plain(row)


_TIMES = [field.name for field in dataclasses.fields(Timing)]


def _finite(value: float | None) -> float | None:
    """JSON has no NaN; the reason says that it was one."""
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """What JSON has words for; numbers to six digits, more than any stopwatch gives."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_case(
    family: Family,
    case: Case,
    *,
    seconds: float,
    limit: float = float("inf"),
    only: Collection[str] | None = None,
    hung: Collection[str] = (),
    show: Show = lambda variant, doing: None,
) -> list[Row]:
    """A row for every variant of the family.

    Args:
        family: of the case.
        case: what to solve.
        seconds: to spend on timing, all variants together.
        limit: seconds that a variant's check, and its least number of timed rounds, may take.
        only: variants by name; default: all.
        hung: variants that gave no sign of life in an earlier try of this case, and are not tried again.
        show: is told what is being done.
    """
    variants = [v for v in family.variants if only is None or v.name in only]
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    show("", "float64 truth")
    try:
        with deadline(limit):
            gate = Gate(family, case)
    except Exception as error:
        reason = f"no float64 truth: {': '.join(explained(error))}"
        return [Row(case, v.name, "unchecked", reason) for v in variants]

    on_cuda = torch.device(case.device).type == "cuda"
    for variant in variants:
        show(variant.name, "checking")
        if variant.name in hung:
            rows[variant.name] = Row(case, variant.name, "timed out", "gave no sign of life: its process was ended")
            continue
        try:
            if (reason := variant.applies(case)) is not None:
                raise Refused(reason)
            with deadline(limit):
                rows[variant.name], step = _checked(family, case, variant, gate)
        except Exception as error:
            rows[variant.name] = Row(case, variant.name, *explained(error))
            if on_cuda and not isinstance(error, Refused):
                _still_there(variant.name)
        else:
            if rows[variant.name].status == "ok":
                steps[variant.name] = step
        if on_cuda:
            _release_cuda()
    del gate
    gc.collect()

    if steps:
        rows |= _timed(family, case, steps, rows, seconds, limit, show)
    return list(rows.values())


def _checked(family: Family, case: Case, variant: Variant, gate: Gate) -> tuple[Row, Step]:
    """Accuracy, peak memory and what is saved for the backward; a wrong result needs no more than the first."""
    step = variant.build(case, case.dtype)
    accuracy = gate.check(step, variant)
    if not accuracy.passed:
        return Row(case, variant.name, "wrong", f"{accuracy.error:.1e} from float64", accuracy), step
    row = Row(case, variant.name, "ok", accuracy=accuracy, work=family.work(case, variant.name))
    peak = peak_mib(step, case.device)
    peak = peak if peak is None else peak + variant.holds(case)
    return dataclasses.replace(row, peak_mib=peak, saved_mib=_saved_mib(case, variant)), step


def _saved_mib(case: Case, variant: Variant) -> float | None:
    """By a step of its own: a graph that is made under these hooks calls them each time that it is gone through."""
    if not case.backward or (variant.slow and torch.device(case.device).type == "cuda"):  # it would compile again
        return None
    with saved_tensors() as saved:
        variant.build(case, case.dtype)()
    return saved.mib


def _timed(
    family: Family, case: Case, steps: dict[str, Step], rows: dict[str, Row], seconds: float, limit: float, show: Show
) -> dict[str, Row]:
    """The rows of the steps with their times."""
    options: dict[str, Any] = {"seconds": seconds, "same": family.reference is not None, "limit": limit}
    options["turn"] = lambda name: show(name, "timing")
    if torch.device(case.device).type == "cuda":
        timings = time_on_cuda(steps, family.peer, replays=family.replays(case), **options)
    else:
        timings = time_on_cpu(steps, family.peer, **options)
    timed = {}
    for name, timing in timings.items():
        if isinstance(timing, TooSlow):
            timed[name] = dataclasses.replace(rows[name], status="timed out", reason=timing.reason)
        elif isinstance(timing, Exception):
            status, reason = explained(timing)
            timed[name] = dataclasses.replace(rows[name], status=status, reason=reason)
        else:
            timed[name] = dataclasses.replace(rows[name], timing=timing)
    return timed


@contextlib.contextmanager
def deadline(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the main thread after so many seconds, between two operations of torch.

    One that never returns, as a kernel on a GPU may, is for :class:`benchmarks.jobs.Watchdog`.
    """
    timer = getattr(signal, "setitimer", None)
    if timer is None or seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    timer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        timer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


_NO_MEMORY = re.compile("out of memory|allocate memory|ALLOC_FAILED")


def explained(error: BaseException) -> tuple[Status, str]:
    """What became of a variant, by the innermost of errors that wrap one another, and its first words."""
    while not isinstance(error, Refused):
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if inner is None:
            break
        error = inner
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Refused):
        return "refused", text
    if isinstance(error, TimeoutError):
        return "timed out", text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _NO_MEMORY.search(str(error)):
        return "out of memory", text
    return "error", f"{type(error).__name__}: {text}"


def _still_there(variant: str) -> None:
    """An illegal access is the last thing that a process's GPU does: all that comes after would fail for it.

    Raises:
        DeviceLost: it is so.
    """
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(variant) from error


def _release_cuda() -> None:
    """So that what one variant left in reference cycles is not another one's lack of memory."""
    gc.collect()
    torch.cuda.empty_cache()
