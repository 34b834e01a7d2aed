"""A user's functions over a key/value cache: queries and keys are counted by slots."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch

from fastattn.testing import assert_within_budget

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.decode.problem import CacheProblem
from tests.kernels import test_attention_decode as decode
from tests.kernels.functions import FUNCTIONS, MASKS

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """Functions, and the call that has them."""

    function: str | None
    mask: str | None
    call: decode.Case

    def __str__(self):
        return f"{self.function}-{self.mask}-{self.call}"


def with_functions(case: Case, problem: CacheProblem) -> Any:
    sizes = 3, problem.query.shape[1], problem.room, problem.room
    function = None if case.function is None else FUNCTIONS[case.function]
    mask = None if case.mask is None else MASKS[case.mask]
    return dataclasses.replace(
        problem,
        score_mod=None if function is None else function.modifier(function.captured(*sizes)),
        mask_mod=None if mask is None else mask.modifier(mask.captured(*sizes)),
    )


def slots_of(cache: torch.Tensor, problem: CacheProblem, sequence: int, length: int) -> torch.Tensor:
    """``[Hk, length, size]``."""
    if problem.block_table is None:
        return cache[sequence, :, :length]
    size = cache.shape[2]
    pages = problem.block_table[sequence, : -(-length // size)].tolist()
    return torch.cat([cache[page] for page in pages] or [cache[0, :, :0]], 1)[:, :length]


def expected_of(case: Case, problem: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE by the formula, from caches that hold the new tokens."""
    outputs, lses = [], []
    length, heads = problem.query.shape[2], problem.query.shape[1]
    for sequence in range(len(problem.query)):
        total = int(problem.cache_seqlens[sequence]) + (0 if problem.key is None else length)
        key, value = (
            slots_of(cache, problem, sequence, total).to(dtype).repeat_interleave(problem.group, 0)
            for cache in (problem.key_cache, problem.value_cache)
        )
        h, k = torch.arange(heads)[:, None, None], torch.arange(total)
        q = total - length + torch.arange(length)[:, None]
        told = q.clamp(min=0)  # of queries in front of the first slot, which see nothing
        seen = torch.ones(heads, length, total, dtype=torch.bool)
        if problem.upper is not None:
            seen = seen & (k <= q + problem.upper)
        if problem.lower is not None:
            seen = seen & (k >= q + problem.lower)
        if problem.cache_leftpad is not None:
            seen = seen & (k >= problem.cache_leftpad[sequence])
        if case.mask is not None:
            seen = seen & MASKS[case.mask].eager(sequence, h, told, k, *problem.mask_mod.captured)
        scores = problem.query[sequence].to(dtype) @ key.mT * problem.scale
        if problem.softcap is not None:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if case.function is not None:
            eager = FUNCTIONS[case.function].eager
            scores = eager(scores, sequence, h, told, k, *problem.score_mod.captured).to(dtype)
        scores = scores.masked_fill(~seen, -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        value = torch.where(seen.any(1)[..., None], value, 0.0)  # what nobody sees may be NaN
        outputs.append(weights @ value)
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outputs), torch.stack(lses)


CASES = [
    Case("table of differences", None, decode.Case(heads=(4, 2))),
    Case("pairs", "dilated", decode.Case(heads=(4, 1), length=3, page_size=16, splits=2)),
    Case("hidden", None, decode.Case(heads=(2, 2), length=2, dtype=torch.bfloat16, splits=3)),
    Case("scales", "flags of keys", decode.Case(heads=(4, 2), softcap=2.0, leftpad=True, page_size=32)),
    Case(None, "documents", decode.Case(heads=(4, 2), length=5, lower=-30, dtype=torch.float16)),
    Case("rows and flags", "of the head", decode.Case(heads=(2, 1), is_new=False, upper=None, length=2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions_over_a_cache_match_formula(case, device, seed):
    problem = with_functions(case, decode.draw(case.call, seed, device).problem)
    output, lse = decode.run(problem, case.call.splits)
    results = zip(
        ("output", "lse"),
        (output, lse),
        expected_of(case, problem, torch.float64),
        expected_of(case, problem, case.call.dtype),
    )
    for name, actual, truth, peer in results:
        assert_within_budget(actual, truth=truth, peer=peer, name=name, feature="functions", backend="triton")
