"""The family of decoding: its work by hand, that the variants agree, and what refuses and why."""

import dataclasses

import pytest
import torch

import fastattn
import fastattn.reference
from benchmarks.families import all_cases, decode, families, quick_cases
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

CASE = decode.DecodeCase("decode", 3, 4, 2, 32, 8, page_size=8)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def test_decode_work_is_known():
    work = decode.work(CASE, "fastattn")
    assert work.flops == 4 * 3 * 4 * 32 * 8
    assert work.moved_bytes == 2 * 3 * 2 * 32 * 8 * 4
    assert work.formula == "operations 4 B H S D; bytes 2 B Hk S D"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decode_variants_agree_with_float64(dtype):
    case = dataclasses.replace(CASE, dtype=dtype)
    names = ("fastattn", "fastattn-paged", "sdpa", "sdpa-gathered")
    rows = {row.variant: row for row in run_case(decode.FAMILY, case, seconds=0.0, only=names)}
    assert [rows[name].status for name in names] == ["ok"] * 4, rows


def test_decode_gate_stops_a_step_that_does_not_write():
    """Attention to a cache without the new token: what is in its slot before the first step is NaN."""
    right = decode.FAMILY.variant("fastattn")

    def build(case, dtype):
        tokens = decode._tokens(case, dtype, paged=False)
        return lambda: (fastattn.reference.attention(tokens.query, *tokens.caches).output,)

    family = dataclasses.replace(decode.FAMILY, variants=(right, Variant("off", build)), peer="fastattn")
    rows = {row.variant: row for row in run_case(family, CASE, seconds=0.0)}
    assert rows["fastattn"].status == "ok"
    assert rows["off"].status == "wrong"


def test_decode_says_why_it_refuses():
    applies = {variant.name: variant.applies for variant in decode.FAMILY.variants}
    assert applies["flash-attn"](CASE) is not None
    assert "multiples of 256, and these have 8" in str(applies["flash-attn-paged"](CASE))


def test_decode_is_registered():
    assert families()["decode"] is decode.FAMILY
    assert sum(case.family == "decode" for case in quick_cases()) == 2
    mine = [case for case in all_cases() if isinstance(case, decode.DecodeCase)]
    assert len({case.name for case in mine}) == len(mine) == 9
