"""The family of additive attention: its work by hand, the gate, what refuses and why."""

import dataclasses

import pytest
import torch

import fastattn
from benchmarks.families import additive, all_cases, families, quick_cases
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

CASE = additive.AdditiveCase("additive", 2, 6, 5, backward=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def test_additive_work_is_known():
    """Six tensors of [2, 6, 5] in a training step's way in and out beside output and its gradient, by hand."""
    work = additive.work(CASE, "eager")
    assert work.flops == 18 * 2 * 6 * 6 * 5
    assert work.moved_bytes == 8 * 4 * 2 * 6 * 5
    forward = additive.work(dataclasses.replace(CASE, backward=False, dtype=torch.bfloat16), "fastattn")
    assert forward.flops == 6 * 2 * 6 * 6 * 5
    assert forward.moved_bytes == 4 * 2 * 2 * 6 * 5
    assert forward.formula == "operations 6 B L S A, a tangent as one; bytes 4 B (L + S) A"
    step = additive.work(dataclasses.replace(CASE, step=True), "fastattn")
    assert step.flops == 18 * 2 * 6 * 5
    assert step.moved_bytes == 4 * 4 * 2 * (1 + 6) * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])
def test_additive_variants_agree_with_float64(backward, dtype):
    case = dataclasses.replace(CASE, backward=backward, dtype=dtype, step=backward)
    rows = {row.variant: row for row in run_case(additive.FAMILY, case, seconds=0.0, only=("fastattn", "eager"))}
    assert [rows[name].status for name in ("fastattn", "eager")] == ["ok", "ok"], rows


@pytest.mark.parametrize("result", range(5), ids=["output", "dquery", "dkey", "dvalue", "dweight"])
def test_additive_gate_stops_one_wrong_result(result):
    right = additive.FAMILY.variant("eager")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(t * 1.0001 if i == result else t for i, t in enumerate(step()))

    family = dataclasses.replace(additive.FAMILY, variants=(right, Variant("off", build)))
    rows = {row.variant: row for row in run_case(family, CASE, seconds=0.0)}
    assert rows["eager"].status == "ok"
    assert rows["off"].status == "wrong"


def test_additive_eager_says_why_it_refuses():
    applies = additive.FAMILY.variant("eager").applies
    assert applies(CASE) is None
    long = dataclasses.replace(CASE, seqlen=4096, size=256)
    assert applies(long) == "makes all 8589934592 tangents: on cpu only up to 134217728 are taken"
    assert applies(dataclasses.replace(long, batch=1, seqlen=1024, device="cuda")) is None


def test_additive_is_registered():
    assert families()["additive"] is additive.FAMILY
    assert sum(case.family == "additive" for case in quick_cases()) == 2
    mine = [case for case in all_cases() if isinstance(case, additive.AdditiveCase)]
    assert {(case.seqlen, case.size) for case in mine} >= {(n, a) for n in (64, 512) for a in (64, 256)}
    assert {case.backward for case in mine} == {case.backward for case in mine if case.step} == {False, True}
    assert len({case.name for case in mine}) == len(mine)
    assert all(applies is None for applies in map(additive.FAMILY.variant("eager").applies, mine))
