"""The family of packed sequences: its work by hand, that the variants agree, and what refuses and why."""

import dataclasses

import pytest
import torch

import fastattn
from benchmarks.families import all_cases, families, quick_cases, varlen
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

CASE = varlen.VarlenCase("varlen", 3, 2, 7, 4, backward=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def test_varlen_work_is_known():
    lengths = CASE.lengths().tolist()
    assert len(lengths) == 3 and all(1 <= length <= 7 for length in lengths)
    work = varlen.work(CASE, "fastattn")
    assert work.flops == 14 * 2 * 4 * sum(length**2 for length in lengths)
    assert work.moved_bytes == 8 * sum(lengths) * 2 * 4 * 4
    causal = varlen.work(dataclasses.replace(CASE, causal=True, backward=False), "fastattn")
    assert causal.flops == 4 * 2 * 4 * sum(length * (length + 1) // 2 for length in lengths)
    assert causal.formula == "operations 4 H D sum(l^2 / 2); bytes 4 T H D"


def test_varlen_padding_comes_and_goes():
    packed = torch.randn(int(CASE.lengths().sum()), 2, 4)
    padded = CASE.padded(packed)
    assert padded.shape == (3, 2, 7, 4)
    assert torch.equal(CASE.packed(padded), packed)
    assert padded.count_nonzero() == packed.count_nonzero()


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])
def test_varlen_variants_agree_with_float64(backward, causal):
    case = dataclasses.replace(CASE, backward=backward, causal=causal)
    names = ("fastattn", "sdpa-padded", "sdpa-each")
    rows = {row.variant: row for row in run_case(varlen.FAMILY, case, seconds=0.0, only=names)}
    assert [rows[name].status for name in names] == ["ok"] * 3, rows


@pytest.mark.parametrize("result", range(4), ids=["output", "dquery", "dkey", "dvalue"])
def test_varlen_gate_stops_one_wrong_result(result):
    right = varlen.FAMILY.variant("fastattn")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(t * 1.0001 if i == result else t for i, t in enumerate(step()))

    family = dataclasses.replace(varlen.FAMILY, variants=(right, Variant("off", build)))
    rows = {row.variant: row for row in run_case(family, CASE, seconds=0.0)}
    assert rows["fastattn"].status == "ok"
    assert rows["off"].status == "wrong"


def test_varlen_says_why_it_refuses():
    applies = {variant.name: variant.applies for variant in varlen.FAMILY.variants}
    assert applies["varlen_attn"](CASE) == "torch's varlen_attn runs on a GPU alone"
    assert "on a CPU Inductor fails" in str(applies["flex-documents"](CASE))
    on_gpu = dataclasses.replace(CASE, device="cuda")
    assert applies["varlen_attn"](on_gpu) == "torch's varlen_attn takes 16 bits alone"


def test_varlen_is_registered():
    assert families()["varlen"] is varlen.FAMILY
    assert sum(case.family == "varlen" for case in quick_cases()) == 2
    mine = [case for case in all_cases() if isinstance(case, varlen.VarlenCase)]
    assert len({case.name for case in mine}) == len(mine) == 10
