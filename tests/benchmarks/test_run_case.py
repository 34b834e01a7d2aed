"""A case becomes rows: refused, checked, weighed, timed. No time decides a verdict here."""

import dataclasses
import json
import math
import time

import pytest
import torch

import benchmarks.run_case
import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.families import all_cases, families, quick_cases
from benchmarks.measure import tiles
from benchmarks.measure.accuracy import Gate
from benchmarks.measure.timing import TooSlow, time_on_cpu
from benchmarks.run_case import deadline, run_case
from benchmarks.variants import Refused, Variant

TINY = AttentionCase("module", 2, 2, 5, 4, backward=True, mask="causal", weights=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def run(family, case, **options):
    """Without the variants that compile: those have their turn in test_peers.py."""
    options.setdefault("only", [variant.name for variant in family.variants if not variant.slow])
    return run_case(family, case, seconds=0.0, **options)


@pytest.fixture(scope="module")
def tiny_rows():
    return run(families()["module"], TINY)


def test_families_names_are_unique():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for family in families().values():
        variants = [variant.name for variant in family.variants]
        assert len(set(variants)) == len(variants)
        assert family.peer in variants


def test_families_every_case_has_a_variant_of_ours_that_applies():
    for case in quick_cases():
        assert families()[case.family].variant("fastattn").applies(case) is None, case.name


@pytest.mark.parametrize("family", ["attention", "layer", "module", "sequence"])
def test_variants_agree_with_float64(family):
    case = dataclasses.replace(TINY, family=family, weights=False)
    rows = run(families()[family], case)
    assert {row.status for row in rows} <= {"ok", "refused"}, [(row.variant, row.reason) for row in rows]
    assert all((row.timing is not None) == (row.status == "ok") for row in rows)


def test_tiles_visited_are_counted():
    """A causal call of 8 x 16 tiles: 2 i + 2 tiles of keys for the i-th tile of rows, the last two of them in part."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = tiles.count(AttentionCase("attention", 1, 1, 1024, 64, mask="causal", device=device))
    assert found == {"mask": "causal", "tiles": 128, "whole": 56, "in_part": 16}


def test_refusal_is_one_whatever_it_was_raised_from():
    def build(case, dtype):
        try:
            raise ImportError("undefined symbol")
        except ImportError as error:
            raise Refused("does not load") from error

    (row,) = run(_family_with(build), TINY, only=["other"])
    assert (row.status, row.reason) == ("refused", "does not load")


def _family_with(build):
    family = families()["module"]
    return dataclasses.replace(family, variants=(*family.variants, Variant("other", build)))


def test_gate_stops_a_wrong_variant_before_it_is_timed():
    """A variant that is off by one part in ten thousand, in one gradient only, gets no time."""
    right = families()["module"].variant("fastattn")
    calls = []

    def build(case, dtype):
        step = right.build(case, dtype)

        def wrong():
            calls.append(1)
            *results, last = step()
            return *results, last * 1.0001

        return wrong

    rows = {row.variant: row for row in run(_family_with(build), TINY)}
    assert rows["other"].status == "wrong"
    assert rows["other"].timing is None
    accuracy = rows["other"].accuracy
    assert accuracy is not None
    assert accuracy.error > accuracy.budget
    assert len(calls) == 1
    assert rows["fastattn"].status == "ok"


def test_gate_stops_nan():
    right = families()["module"].variant("fastattn")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(torch.full_like(t, math.nan) for t in step())

    accuracy = Gate(families()["module"], TINY).check(build(TINY, TINY.dtype), Variant("nan", build))
    assert not accuracy.passed


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (Refused("has no kernel for it"), "refused"),
        (TimeoutError("not done"), "timed out"),
        (RuntimeError("boom"), "error"),
    ],
    ids=["cuda-oom", "cpu-oom", "refused", "late", "other"],
)
def test_failure_is_a_row(error, status):
    def build(case, dtype):
        def step():
            raise error

        return step

    rows = {row.variant: row for row in run(_family_with(build), TINY)}
    assert rows["other"].status == status
    assert rows["other"].reason
    assert rows["fastattn"].status == "ok"


def test_variant_that_takes_too_long_to_check_is_a_row():
    def build(case, dtype):
        time.sleep(60)

    began = time.monotonic()
    rows = {row.variant: row for row in run(_family_with(build), TINY, limit=4)}
    assert time.monotonic() - began < 30
    assert (rows["other"].status, rows["other"].reason) == ("timed out", "not done after 4 s")
    assert rows["fastattn"].status == "ok"


def test_variant_that_takes_too_long_to_time_is_a_row(monkeypatch):
    def timed(steps, peer, **options):
        found = time_on_cpu(steps, peer, **options)
        return found | {"fastattn": TooSlow("six rounds take an hour")}

    monkeypatch.setattr("benchmarks.run_case.time_on_cpu", timed)
    rows = {row.variant: row for row in run(families()["module"], TINY)}
    assert (rows["fastattn"].status, rows["fastattn"].reason) == ("timed out", "six rounds take an hour")
    assert rows["fastattn"].accuracy is not None
    assert rows["nn.MultiheadAttention"].status == "ok"


def test_variant_that_hung_is_not_tried_again():
    rows = {row.variant: row for row in run(families()["module"], TINY, hung=["fastattn"])}
    assert rows["fastattn"].status == "timed out"
    assert "sign of life" in rows["fastattn"].reason
    assert rows["nn.MultiheadAttention"].status == "ok"


def test_variant_that_fails_while_it_is_timed_takes_no_other_along():
    right = families()["module"].variant("fastattn")
    calls = []

    def build(case, dtype):
        step = right.build(case, dtype)

        def fails():
            calls.append(1)
            if len(calls) > 6:  # checked, weighed, and its first sample
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step()

        return fails

    rows = {row.variant: row for row in run(_family_with(build), TINY)}
    assert (rows["other"].status, rows["other"].timing) == ("out of memory", None)
    assert rows["fastattn"].timing is not None
    assert rows["fastattn"].timing.best != "other"


def test_case_without_a_truth_is_nobodys_failure():
    def reference(case, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory")

    family = dataclasses.replace(families()["module"], reference=reference)
    rows = run(family, TINY)
    assert {row.status for row in rows} == {"unchecked"}
    assert {row.reason for row in rows} == {"no float64 truth: out of memory: CUDA out of memory"}


def test_refusal_that_breaks_down_is_a_row():
    def applies(case):
        raise ZeroDivisionError("of nought")

    family = families()["module"]
    broken = dataclasses.replace(family.variant("fastattn"), name="other", applies=applies)
    rows = {row.variant: row for row in run(dataclasses.replace(family, variants=(*family.variants, broken)), TINY)}
    assert (rows["other"].status, rows["other"].reason) == ("error", "ZeroDivisionError: of nought")


@pytest.mark.parametrize("text", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling it"])
def test_lack_of_memory_is_known_by_every_name(text):
    def build(case, dtype):
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            raise RuntimeError("backend='inductor' raised:") from error

    rows = {row.variant: row for row in run(_family_with(build), TINY)}
    assert (rows["other"].status, rows["other"].reason) == ("out of memory", text)


def test_deadline_leaves_no_alarm_behind():
    with deadline(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError, match="not done after"), deadline(0.05):
        time.sleep(5)


def test_only_the_variants_asked_for_are_run():
    rows = run(families()["module"], TINY, only=["fastattn", "qkv+sdpa"])
    assert [row.variant for row in rows] == ["fastattn", "qkv+sdpa"]


def test_mask_that_a_peer_needs_made_counts_in_its_peak(monkeypatch):
    """SDPA has no word for a window, so that it reads a mask of 512 x 512 bytes; one that the case gives is free."""
    monkeypatch.setattr(benchmarks.run_case, "peak_mib", lambda step, device: 2.0)
    peaks = {}
    for mask in ("window", "alibi", "boolean"):
        case = AttentionCase("attention", 1, 2, 512, 8, mask=mask)
        rows = run(families()["attention"], case, only=["fastattn", "sdpa"])
        peaks[mask] = {row.variant: row.peak_mib for row in rows}
    assert peaks["window"] == {"fastattn": 2.0, "sdpa": 2.25}
    assert peaks["alibi"] == {"fastattn": 2.0, "sdpa": 4.0}
    assert peaks["boolean"] == {"fastattn": 2.0, "sdpa": 2.0}


def test_row_as_json(tiny_rows):
    """Rates and the floor by hand, from a median that is set."""
    row = next(row for row in tiny_rows if row.variant == "fastattn")
    assert row.timing is not None
    wall = dataclasses.replace(row.timing.wall_ms, median=2.0)
    row = dataclasses.replace(
        row,
        timing=dataclasses.replace(row.timing, wall_ms=wall),
        work=dataclasses.replace(row.work, flops=6e9, moved_bytes=3_000_000),
    )
    plain = row.as_json({"copy_tb_per_s": 0.01, "matmul_tflops": {"float32": 4.0}, "datasheet": None})
    assert json.loads(json.dumps(plain)) == plain
    assert plain["case"] == TINY.name
    assert (plain["dtype"], plain["seqlen"], plain["backward"]) == ("float32", 5, True)
    assert plain["tflops"] == pytest.approx(3.0)
    assert plain["tb_per_s"] == pytest.approx(0.0015)
    assert plain["floor_ms"] == pytest.approx(1.5)  # 6e9 / 4e12 is more than 3e6 / 1e10
    assert plain["of_floor"] == pytest.approx(0.75)
    assert plain["of_datasheet"] is None
    assert plain["ratio"].keys() == {"median", "p20", "p80", "low", "high"}
    assert plain["best"] in ("nn.MultiheadAttention", "eager")
    assert plain["saved_mib"] > 0


def test_rows_have_the_same_keys_whatever_became_of_them(tiny_rows):
    refused = [row for row in tiny_rows if row.status == "refused"]
    assert refused
    assert {tuple(row.as_json({})) for row in tiny_rows} == {tuple(refused[0].as_json({}))}


def test_evaluation_saves_nothing_for_a_backward():
    rows = run(families()["module"], dataclasses.replace(TINY, backward=False))
    assert {row.saved_mib for row in rows} == {None}
