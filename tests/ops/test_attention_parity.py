"""Forward and every gradient of attention against the float64 reference: features alone, in pairs, and all together."""

import dataclasses
import random
from typing import Any

import pytest

from fastattn.ops.attention import cutting
from tests.ops.attention_cases import AXES, DTYPES, Case, check
from tests.pairwise import pairwise

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("poisoned")]

RANDOM_CASES = 8
# What a case costs at most, in Triton's interpreter; and one of a single head, so that the largest sizes may meet.
MOST_COST, MOST_COST_OF_ONE = 9, 20

# Every level of every axis, alone: the rest is plain, and there are two batch entries where that tells.
BATCHED = ("mask", "padding", "layout")
# Levels that mean nothing by themselves, and what they need.
NEEDED: dict[str, dict[str, Any]] = {
    "alignment": {"causal": True},
    "prefix": {"causal": True, "batch": 2},
    "documents": {"seqlen_q": 130, "batch": 2},
    "alibi": {"batch": 2},
}
# Masks that hide whole tiles want several; the others, and layouts, are content with one row of tiles.
BLOCKS = ("bool-blocks", "additive-ragged")
# Levels that one head shows as well as two.
ONE_HEAD = ("causal", "alignment", "window", "prefix", "documents", "softcap", "scale", "dropout", "value", "head_dim")
# What float16 does with sizes and visibility, float32 and bfloat16 have shown; the pairs still mix them.
NOT_IN_FP16 = (
    "value", "seqlen_q", "seqlen_k", "head_dim", "layout", "mask",
    "window", "prefix", "documents", "scale", "alignment", "heads",
)  # fmt: skip
# What bfloat16 does with visibility, sizes and strides, float32 has; the pairs mix them.
NOT_IN_BF16 = ("window", "scale", "prefix", "layout", "seqlen_q", "seqlen_k", "heads")


def alone(axis, level, dtype):
    levels: dict[str, Any] = {"dtype": dtype, "batch": 1 + (axis in BATCHED), **NEEDED.get(axis, {})}
    levels |= {"heads": (1, 1)} if axis in ONE_HEAD else {}
    levels |= {"seqlen_q": 50} if axis == "layout" or (axis == "mask" and level not in BLOCKS) else {}
    levels[axis] = level
    return f"{axis} {level}", Case(**levels)


ALONE = [("plain", Case(dtype=dtype)) for dtype in DTYPES] + [
    alone(axis, level, dtype)
    for dtype, left_out in (("fp32", ()), ("fp16", NOT_IN_FP16), ("bf16", NOT_IN_BF16))
    for axis in AXES
    for level in AXES[axis]
    if axis not in ("dtype", *left_out) and level != getattr(Case(), axis)
]


def allowed(levels):
    case = Case(**levels)
    single = case.batch == case.heads[0] == 1
    return case.makes_sense and case.cost <= (MOST_COST_OF_ONE if single else MOST_COST)


PAIRS = [("pairs of features", Case(**levels)) for levels in pairwise(AXES, allowed)]

# What once was wrong, by what it was.
FOUND = {
    # F.scaled_dot_product_attention on CPUs multiplies what is_causal has hidden by the scale: -inf * 0 is NaN.
    "causal_scores_scaled_by_zero": Case(causal=True, scale=0.0, heads=(4, 2), seqlen_q=6, seqlen_k=204, head_dim=53),
    # And by a negative scale: inf.
    "causal_scores_scaled_by_less_than_zero": Case(causal=True, scale=-0.2, batch=2, seqlen_q=4, seqlen_k=4),
}  # fmt: skip


def random_cases(seed):
    """Whole combinations, as large as the cases of pairs and larger."""
    rng = random.Random(seed)
    cases = []
    while len(cases) < RANDOM_CASES:
        case = Case(**{axis: rng.choice(levels) for axis, levels in AXES.items()})
        if case.makes_sense and case.cost <= MOST_COST_OF_ONE:
            cases.append(("random combinations", dataclasses.replace(case, seed=seed)))
    return cases


def pytest_generate_tests(metafunc):
    if "sampled" in metafunc.fixturenames:
        cases = random_cases(metafunc.config.seed)
        metafunc.parametrize("sampled", cases, ids=[f"{i}-{case.id}" for i, (_, case) in enumerate(cases)])


def named(cases):
    return [pytest.param(feature, case, id=case.id) for feature, case in cases]


@pytest.mark.parametrize(("feature", "case"), named(ALONE))
def test_attention_grad_matches_reference(feature, case, backend, device):
    check(feature, case, backend, device)


@pytest.mark.parametrize(("feature", "case"), named(PAIRS))
def test_attention_grad_of_pairs_matches_reference(feature, case, backend, device):
    check(feature, case, backend, device)


@pytest.mark.parametrize(("feature", "case"), named(PAIRS))
def test_attention_in_small_blocks_matches_reference(feature, case, device, monkeypatch):
    """The torch backend cuts large calls into blocks of rows, whose heads have turns; here every call is large."""
    monkeypatch.setattr(cutting, "BLOCK_ELEMENTS", 2048)
    monkeypatch.setattr(cutting, "AT_WORK", 512)
    check(f"{feature}, in small blocks", case, "torch", device)


def test_attention_grad_of_random_combinations_matches_reference(sampled, backend, device):
    feature, case = sampled
    check(feature, case, backend, device)


@pytest.mark.parametrize("name", FOUND)
def test_attention_grad_of_found_cases_matches_reference(name, backend, device):
    check("found cases", FOUND[name], backend, device)
