"""What functions hide: nothing leaks from there, no tile of it is visited, nothing past the ends is read. And packed
sequences, plans, and gradients of captured tensors by chunks of rows."""

import dataclasses
import math

import pytest
import torch

from fastattn.testing import assert_within_budget, random_tensor
from tests.conftest import INTERPRETING

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.bias_gradient import launch_attention_captured_bwd
from fastattn_kernels.attention.choice import launch_attention_fwd
from fastattn_kernels.attention.hopper.problem import refusals
from fastattn_kernels.attention.tile_tables import INTERPRETED
from fastattn_kernels.common import tile_map
from fastattn_kernels.common.delta import Delta
from fastattn_kernels.common.functions import Modifier, compiled
from fastattn_kernels.common.packed import Packed
from fastattn_kernels.common.plans import planned
from fastattn_kernels.common.problem import Problem
from tests.kernels.functions import FUNCTIONS, MASKS, Drawn, Upstream, attend, expected_of
from tests.kernels.test_attention_functions import Case, draw
from tests.kernels.test_attention_packed import offsets_of
from tests.kernels.test_attention_tile_map import products, states

__all__ = ["products"]  # the fixture

pytestmark = pytest.mark.usefixtures("poisoned")

NAN = math.nan


@pytest.mark.parametrize(
    "case", [Case("hidden"), Case(mask="first keys"), Case("table of differences", "first keys")], ids=str
)
def test_nan_behind_hidden_pairs_does_not_leak(case, device):
    """Keys that some rows or none may see hold NaN: the rows and keys that have nothing to do with these are as before,
    in every gradient."""
    drawn = draw(case._replace(lengths=(67, 75), heads=(1, 1)), device)
    problem = drawn.problem
    key = 72 if case.mask else 20  # seen by nobody, or by some of the first 64 rows
    touched = torch.zeros(67, dtype=torch.bool)
    if not case.mask:
        rows = torch.arange(67)
        touched = ~(((rows * 7 + key * 3) % 5 == 0) | (rows == 3) | (rows >= 64))
    clean = attend(drawn)
    spoilt = problem.key.clone(), problem.value.clone()
    for tensor in spoilt:
        tensor[:, :, key] = NAN
    found = attend(drawn._replace(problem=dataclasses.replace(problem, key=spoilt[0], value=spoilt[1])))
    for name in ("output", "lse", "d_query"):
        assert touched.any() == found[name][:, :, touched].isnan().any(), name
        torch.testing.assert_close(found[name][:, :, ~touched], clean[name][:, :, ~touched], rtol=1e-4, atol=1e-5)
    if case.mask:
        for name in set(found) - {"output", "lse", "d_query"}:
            torch.testing.assert_close(found[name], clean[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("name", MASKS)
def test_functions_have_tile_maps(name, device):
    """Of every granule, whether none, some or all of its pairs are seen; of one head and batch entry where the function
    depends on none."""
    mask = MASKS[name]
    rows, keys = 150, 270
    captured = mask.captured(2, 2, rows, keys)
    query, key = random_tensor(2, 2, rows, 8, seed=1), random_tensor(2, 1, keys, 8, seed=2)
    problem = Problem(query, key, key, 1.0, upper=100, mask_mod=mask.modifier(captured))
    found = tile_map.TileMap(problem).granules
    assert found.shape[:2] == (2 if mask.batches else 1, 2 if mask.heads else 1)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(2)[:, None, None]
    q, k = torch.arange(rows)[:, None], torch.arange(keys)
    seen = mask.eager(b, h, q, k, *captured) & (k <= q + 100) & (b >= 0) & (h >= 0)
    expected = states(seen, tile_map.GRANULE, tile_map.GRANULE)
    assert torch.equal(found.int().expand_as(expected), expected)


@pytest.mark.skipif(not INTERPRETING, reason="products are counted in Triton's interpreter")
@pytest.mark.parametrize("name", ["of the head", pytest.param("documents", marks=pytest.mark.resources)])
def test_kernels_visit_only_tiles_that_functions_leave_visible(name, products, device):
    rows, keys = 150, 270
    drawn = draw(Case(mask=name, lengths=(rows, keys)), device)
    attend(drawn)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(2)[:, None, None]
    q, k = torch.arange(rows)[:, None], torch.arange(keys)
    seen = MASKS[name].eager(b, h, q, k, *drawn.problem.mask_mod.captured).expand(2, 2, rows, keys)
    coarse = states(seen, 64, 64) > 0
    of_granules = coarse.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :rows, :keys]
    of_group = of_granules.any(1, keepdim=True).expand(-1, 2, -1, -1)  # a list for a tile of keys is the group's
    visited = {
        kernel: int((states(listed, INTERPRETED[kernel].block_m, INTERPRETED[kernel].block_n) > 0).sum())
        for kernel, listed in (("forward", of_granules), ("dq", of_granules), ("dkdv", of_group))
    }
    assert sum(products.values()) == 2 * visited["forward"] + 3 * visited["dq"] + 4 * visited["dkdv"]


BOUNDS = """
@triton.jit
def note(batch, head, q, k, captured):
    tl.atomic_max(captured[0].ptr + 0 * q, q)
    tl.atomic_max(captured[0].ptr + 1 + 0 * k, k)
    tl.atomic_min(captured[0].ptr + 2 + 0 * q, q)
    tl.atomic_min(captured[0].ptr + 3 + 0 * k, k)


@triton.jit
def score_mod(score, batch, head, q, k, captured):
    note(batch, head, q, k, captured)
    return score


@triton.jit
def gradient(d, score, batch, head, q, k, captured):
    note(batch, head, q, k, captured)
    return d


@triton.jit
def mask_mod(batch, head, q, k, captured):
    note(batch, head, q, k, captured)
    return q >= 0
"""


@pytest.mark.skipif(not INTERPRETING, reason="a function with side effects is none that the compiler has to keep")
@pytest.mark.parametrize("which", ["score_mod", "mask_mod"])
def test_functions_get_indices_inside_the_sequence(which, device):
    """What overhangs in a tile reads no captured tensor past its end."""
    drawn = draw(Case(lengths=(65, 67)), device)
    extremes = torch.tensor([0, 0, 1000, 1000], dtype=torch.int32)
    gradient = compiled(BOUNDS, "gradient") if which == "score_mod" else None
    modifier = Modifier(compiled(BOUNDS, which), gradient, (extremes,))
    problem = dataclasses.replace(drawn.problem, **{which: modifier})
    attend(drawn._replace(problem=problem))
    assert extremes.tolist() == [64, 66, 0, 0]


def test_gluon_refuses_functions():
    drawn = draw(Case("softcap", "dilated"), "cpu")
    reasons = refusals(drawn.problem)
    assert any("score_mod" in reason for reason in reasons) and any("mask_mod" in reason for reason in reasons)


# ---------------------------------------------------------------------------------------------- gradients by the chunk


@pytest.mark.parametrize("name", ["table of differences", "pairs", "scales"])
def test_captured_gradients_by_chunks_add_up(name, device):
    """Chunks of rows, which need not begin where a tile does, hold the rows' part of the sum; twice the same bits."""
    drawn = draw(Case(name, lengths=(70, 34), dropout=0.1 if name == "pairs" else 0.0), device)
    problem, function = drawn.problem, FUNCTIONS[name]
    output, lse, statistics = forward_of(problem)
    delta = Delta(output, drawn.upstream.d_output, None).tensor
    for number, partial in enumerate(function.partials):
        derivative = compiled(function.text(), f"partial_{number}")
        arguments = problem, drawn.upstream.d_output, statistics, delta, None, derivative, partial.footprint
        whole = launch_attention_captured_bwd(*arguments)
        assert torch.equal(whole, launch_attention_captured_bwd(*arguments))
        chunks = [launch_attention_captured_bwd(*arguments, rows=rows) for rows in ((0, 13), (13, 66), (66, 70))]
        if partial.footprint[2]:
            assert torch.equal(torch.cat(chunks, 2), whole)
        else:
            torch.testing.assert_close(chunks[0] + chunks[1] + chunks[2], whole, rtol=1e-5, atol=1e-5)
    assert lse.isfinite().all()


def forward_of(problem):
    batch, heads, rows, _ = problem.query.shape
    output = torch.empty(batch, heads, rows, problem.value.shape[3], dtype=problem.query.dtype)
    lse, statistics = torch.empty(batch, heads, rows), torch.empty(batch, heads, 2, rows)
    launch_attention_fwd(problem, output, lse, statistics)
    return output, lse, statistics


# ------------------------------------------------------------------------------------------------------------- packed

PACKED = [
    Case("pairs", heads=(4, 2), upper=0),
    Case("scales", "documents", dtype=torch.bfloat16, softcap=2.0, dropout=0.2),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_with_functions_match_formula(case, device):
    """The sequence stands in the place of the batch entry, and indices are counted in it."""
    rows, keys = [66, 0, 5], [70, 20, 5]
    heads, kv_heads = case.heads
    dtype = case.dtype
    cu_rows, cu_keys = offsets_of(rows, device), offsets_of(keys, device)
    query, key, value, d_output = (
        random_tensor(1, length, of, size, seed=seed, dtype=dtype).transpose(1, 2)
        for seed, (length, of, size) in enumerate(
            [
                (sum(rows), heads, case.head_dim), (sum(keys), kv_heads, case.head_dim),
                (sum(keys), kv_heads, case.value_dim), (sum(rows), heads, case.value_dim),
            ]
        )
    )  # fmt: skip
    function, mask = FUNCTIONS[case.function or "softcap"], None if case.mask is None else MASKS[case.mask]
    sizes = len(rows), heads, max(rows), max(keys)
    d_lse = random_tensor(1, heads, sum(rows), seed=9)
    whole = Problem(
        query, key, value, case.scale, upper=case.upper, softcap=case.softcap,
        bias=random_tensor(1, heads, max(rows), 1, seed=8) if case.bias else None,
        score_mod=function.modifier(function.captured(*sizes)),
        mask_mod=None if mask is None else mask.modifier(mask.captured(*sizes)),
        seed=torch.tensor([7, 3]) if case.dropout else None, dropout_p=case.dropout,
        packed=Packed(cu_rows, cu_keys, longest=(max(rows), max(keys))),
    )  # fmt: skip
    found = attend(Drawn(whole, function, mask, Upstream(d_output, d_lse)))
    expected = {}
    for of in (torch.float64, dtype):
        together: dict[str, torch.Tensor] = {}
        for number in range(len(rows)):
            of_rows = slice(int(cu_rows[number]), int(cu_rows[number + 1]))
            of_keys = slice(int(cu_keys[number]), int(cu_keys[number + 1]))
            one = dataclasses.replace(
                whole, query=query[:, :, of_rows], key=key[:, :, of_keys], value=value[:, :, of_keys], packed=None,
                bias=None if whole.bias is None else whole.bias[:, :, : rows[number]],
            )  # fmt: skip
            upstream = Upstream(d_output[:, :, of_rows], d_lse[:, :, of_rows])
            for name, tensor in expected_of(Drawn(one, function, mask, upstream), of, first=number).items():
                if name == "d_bias":
                    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, max(rows) - rows[number]))
                if name.startswith(("d_bias", "d_captured")):
                    together[name] = together[name] + tensor if name in together else tensor
                else:
                    together[name] = torch.cat([together[name], tensor], 2) if name in together else tensor
        expected[of] = together
    for name, tensor in found.items():
        truth, peer = expected[torch.float64][name], expected[dtype][name]
        assert_within_budget(tensor, truth=truth, peer=peer, name=name, feature="packed functions", backend="triton")


# -------------------------------------------------------------------------------------------------------------- plans


def test_planned_calls_with_functions_are_repeated(device):
    """The plan that the second call leaves runs with other tensors, captured ones among them."""
    function = FUNCTIONS["pairs"]
    mask = MASKS["flags of keys"]

    @planned
    def call(query, key, value, score_mod, mask_mod, captured, flags):
        problem = Problem(
            query, key, value, 0.3,
            score_mod=Modifier(score_mod, None, captured), mask_mod=Modifier(mask_mod, None, flags, False, False),
        )  # fmt: skip
        output, lse = torch.empty_like(query), torch.empty(query.shape[:3])
        statistics = torch.empty(*query.shape[:2], 2, query.shape[2])
        launch_attention_fwd(problem, output, lse, statistics, tile_map.tile_map_for(problem))
        return output, lse

    text = mask.modifier(()).function, function.modifier(()).function
    for seed in range(3):
        rows, keys = 66, 70
        query, key, value = (random_tensor(1, 2, length, 16, seed=seed) for length in (rows, keys, keys))
        captured = tuple(tensor + seed for tensor in function.captured(1, 2, rows, keys))
        flags = tuple(tensor.roll(seed) for tensor in mask.captured(1, 2, rows, keys))
        output, lse = call(query, key, value, text[1], text[0], captured, flags)
        problem = Problem(
            query, key, value, 0.3,
            score_mod=Modifier(text[1], None, captured), mask_mod=Modifier(text[0], None, flags, False, False),
        )  # fmt: skip
        drawn = Drawn(problem, function, mask, Upstream(torch.ones_like(output), torch.ones_like(lse)))
        for name, tensor in (("output", output), ("lse", lse)):
            truth, peer = (expected_of(drawn, dtype)[name] for dtype in (torch.float64, torch.float32))
            assert_within_budget(tensor, truth=truth, peer=peer, name=name)
        assert len(call.plans.known()) == (seed > 0)
