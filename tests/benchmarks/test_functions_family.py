"""The family of functions on scores and masks: its cases, who takes them, and that a wrong gradient has no speed."""

import dataclasses

import pytest
import torch

import fastattn
from benchmarks.cookbook.examples import EXAMPLES
from benchmarks.families import all_cases, families, functions, quick_cases
from benchmarks.families.functions import FunctionCase
from benchmarks.gpu.matrix import matrix
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

CASE = FunctionCase("functions", "t5_bias", 2, 2, 40, 16, backward=True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def rows(case, *names, family=functions.FAMILY):
    return {row.variant: row for row in run_case(family, case, seconds=0.0, only=names)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("example", ["documents", "t5_bias", "head_scale", "speculative_decoding"])
def test_variants_agree_with_float64(example, backward, dtype):
    case = dataclasses.replace(CASE, example=example, backward=backward, dtype=dtype)
    found = rows(case, "fastattn", "fastattn-words", "sdpa", "eager")
    assert {name: row.status for name, row in found.items()} == dict.fromkeys(found, "ok"), found


def test_flex_is_compiled_with_a_block_mask():
    """With a function on scores: in test_peers.py."""
    case = dataclasses.replace(CASE, example="tree", backward=False)
    found = rows(case, "flex")["flex"]
    assert found.status == "ok" or "C++ compiler" in found.reason, found


def test_who_refuses_says_why():
    def reason(name, **changes):
        return functions.FAMILY.variant(name).applies(dataclasses.replace(CASE, **changes))

    assert reason("flex") == "FlexAttention has no backward on a CPU"
    assert reason("sdpa", example="softcap") == "SDPA has no softcap"
    assert reason("sdpa") is None


@pytest.mark.parametrize("result", range(5), ids=["output", "dquery", "dkey", "dvalue", "dtable"])
def test_gate_stops_one_wrong_result(result):
    right = functions.FAMILY.variant("eager")

    def build(case, dtype):
        step = right.build(case, dtype)
        return lambda: tuple(t * 1.0001 if i == result else t for i, t in enumerate(step()))

    family = dataclasses.replace(functions.FAMILY, variants=(right, Variant("off", build)), peer="eager")
    found = rows(CASE, "eager", "off", family=family)
    assert (found["eager"].status, found["off"].status) == ("ok", "wrong")


def test_drafts_are_few_queries_behind_many_keys():
    case = dataclasses.replace(CASE, example="speculative_decoding", seqlen=512)
    (query, key, value), captured = functions.inputs(case, torch.float32)
    assert (query.shape[2], key.shape[2], value.shape[2]) == (64, 512, 512)
    assert captured["parents"].shape == (2, 64)
    assert bool((captured["context_lengths"] + 64 <= 512).all())


def test_work_by_hand():
    case = dataclasses.replace(CASE, example="speculative_decoding", backward=False)
    pairs, elements = 2 * 2 * 20 * 40, 2 * 2 * 60 * 16
    assert functions.work(case, "eager").flops == 4 * 16 * pairs
    assert functions.work(case, "eager").moved_bytes == 4 * 2 * elements
    training = dataclasses.replace(case, backward=True, dtype=torch.bfloat16)
    assert functions.work(training, "eager").flops == 14 * 16 * pairs
    assert functions.work(training, "eager").moved_bytes == 2 * 4 * elements
    assert functions.work(training, "eager").formula == "operations 14 B H L S D; bytes 8 B H (L + S) D"


def test_family_is_registered():
    assert families()["functions"] is functions.FAMILY
    assert sum(case.family == "functions" for case in quick_cases()) == 2
    mine = [case for case in all_cases() if isinstance(case, FunctionCase)]
    names = {example.name for example in EXAMPLES}
    assert {(case.example, case.backward) for case in mine} == {(name, way) for name in names for way in (False, True)}
    assert len({case.name for case in mine}) == len(mine)
    assert sum(case.family == "functions" for case, _ in matrix()) == 3
