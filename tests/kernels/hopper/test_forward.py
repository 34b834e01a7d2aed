"""The Hopper forward against the float64 reference, on every machine that runs Gluon's kernels."""

import dataclasses
import math
import random
from typing import Any, get_args

import pytest
import torch

from fastattn import reference
from fastattn.testing import (
    assert_within_budget,
    attention_inputs,
    attention_mask,
    attention_sinks,
    document_ids,
    key_padding_mask,
    prefix_lengths,
)
from tests import machines
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.forward import launch_attention_fwd as launch_plain
from fastattn_kernels.attention.hopper import forward
from fastattn_kernels.attention.hopper.config import ForwardConfig, Schedule, forward_config
from fastattn_kernels.attention.hopper.mask_bits import pack_mask
from fastattn_kernels.attention.hopper.problem import refusals
from fastattn_kernels.common.masking import LOWEST_BIAS
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import tile_map_for

pytestmark = [
    pytest.mark.hopper,
    pytest.mark.skipif(not machines.RUNS_GLUON, reason=machines.NO_GLUON),
    pytest.mark.usefixtures("poisoned"),
]

B, H, HK, L, S, D = 2, 2, 1, 150, 333, 64
SHARED = ("bias", "sinks", "mask", "key_padding_mask", "query_documents", "key_documents", "prefix", "softcap")
BF16, FP16 = torch.bfloat16, torch.float16


def on_device(device, arguments) -> Any:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


def documents(length, batch=B):
    return document_ids(batch, length, shortest=20, longest=120, seed=length)


def blocks(batch, heads, rows, keys=S):
    """A boolean mask with tiles of all kinds: hidden, seen whole, seen in part; and a row that sees nothing."""
    mask = attention_mask(batch, heads, rows, keys, seed=rows + heads)
    mask[..., 64:256] = False
    mask[..., 256:320] = True
    mask[:, :, rows // 2] = False
    return mask


def bias(batch, heads, rows, keys=S, dtype=BF16):
    return attention_mask(batch, heads, rows, keys, dtype=dtype, seed=rows + heads)


def launch(problem, config=None, order=0) -> Any:
    """Output, LSE and statistics; the output lies in the order of the query's axes, as in the package."""
    assert refusals(problem) == []
    query, value = problem.query, problem.value
    batch, heads, rows, _ = query.shape
    order_of_axes = sorted(range(4), key=lambda axis: -query.stride(axis))
    shape = (batch, heads, rows, value.shape[3])
    out = query.new_empty([shape[axis] for axis in order_of_axes])
    out = out.permute([order_of_axes.index(axis) for axis in range(4)])
    lse, statistics = (
        query.new_empty(size, dtype=torch.float32) for size in ((batch, heads, rows), (batch, heads, 2, rows))
    )
    with machines.order_of_events(order):
        forward.launch_attention_fwd(problem, out, lse, statistics, tile_map_for(problem), config)
    return out, lse, statistics


def expected(problem, dtype) -> Any:
    """The reference's result, computed in ``dtype``."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    arguments: Any = {name: cast(getattr(problem, name)) for name in SHARED}
    arguments |= {name: getattr(problem, name) for name in ("lower", "upper", "shift", "scale")}
    return reference.attention(*(cast(t) for t in (problem.query, problem.key, problem.value)), **arguments)


def check(problem, config=None, order=0):
    """Output and LSE are within their budgets, and the statistics say the same as the LSE."""
    out, lse, statistics = launch(problem, config, order)
    truth, peer = expected(problem, torch.float64), expected(problem, problem.query.dtype)
    assert_within_budget(out, truth=truth.output, peer=peer.output, name="output", backend="hopper")
    # the hardware's tanh, which bfloat16 is content with, is off by 2^-11 of itself
    approximate = 2**-10.987 * problem.softcap if problem.softcap and problem.query.dtype == BF16 else 0.0
    # to base 2 and back again costs four roundings
    empty = truth.lse == -math.inf
    detour = 2**-22 * truth.lse.masked_fill(empty, 0.0).abs().amax().item()
    peer_lse, allowance = expected(problem, torch.float32).lse, approximate + detour
    assert_within_budget(lse, truth=truth.lse, peer=peer_lse, name="lse", backend="hopper", allowance=allowance)
    pivot, inverse_sum = statistics.double().unbind(2)
    assert torch.all(out[empty] == 0)
    assert torch.all(pivot[empty] == 0) and torch.all(inverse_sum[empty] == 0)
    recovered = (pivot - torch.log2(inverse_sum)) * math.log(2)
    torch.testing.assert_close(recovered[~empty], lse.double()[~empty], rtol=1e-6, atol=2e-6)
    # The pivot is the maximum, whose exponential is 1. But it is a rounded product, off by up to 2^-24 of itself, and
    # where multiply-adds fuse, the exponent has the product unrounded; and the exponential of that difference and the
    # reciprocal are off by an ulp each.
    most = 1 + 2**-24 * pivot.abs() + 2 * 2**-23
    assert torch.all((inverse_sum > 0)[~empty] & (inverse_sum <= most)[~empty])


def make(device, arguments, *, batch=B, heads=H, kv_heads=HK, rows=L, keys=S, head_dim=D, dtype=BF16, **shape) -> Any:
    seed, scale = shape.pop("seed", 0), arguments.pop("scale", 1 / math.sqrt(head_dim))
    query, key, value = attention_inputs(
        batch, heads, rows, keys, head_dim, kv_heads=kv_heads, dtype=dtype, device=device, seed=seed, **shape
    )
    return Problem(query, key, value, scale, **on_device(device, arguments))


ALONE: dict[str, Any] = {
    "plain": lambda: {},
    "causal_top_left": lambda: {"upper": 0},
    "causal_bottom_right": lambda: {"upper": S - L},
    "window": lambda: {"lower": -40, "upper": 100},
    "window_after_every_key": lambda: {"lower": S - 20, "upper": S},
    "lower_only": lambda: {"lower": 70},
    "prefix": lambda: {"upper": -5, "prefix": prefix_lengths(B, S, seed=2)},
    "documents": lambda: {"query_documents": documents(L), "key_documents": documents(S)},
    "documents_int64": lambda: {"query_documents": documents(L, 1).long(), "key_documents": documents(S, 1).long()},
    "mask": lambda: {"mask": blocks(B, H, L)},
    "mask_of_heads": lambda: {"mask": blocks(1, H, L)},
    "mask_of_batch": lambda: {"mask": blocks(B, 1, L)},
    "mask_of_keys": lambda: {"mask": blocks(B, 1, 1)},
    "mask_of_rows": lambda: {"mask": attention_mask(1, 1, L, 1, seed=1)},
    "mask_expanded": lambda: {"mask": blocks(1, 1, L).expand(B, H, L, S)},
    "padding": lambda: {"key_padding_mask": key_padding_mask(B, S, seed=3)},
    "bias": lambda: {"bias": bias(B, H, L)},
    "bias_of_heads": lambda: {"bias": bias(1, H, L)},
    "bias_of_batch": lambda: {"bias": bias(B, 1, L)},
    "bias_expanded": lambda: {"bias": bias(1, 1, L).expand(B, H, L, S)},
    "bias_expanded_over_rows": lambda: {"bias": bias(B, 1, 1).expand(B, H, L, S)},
    "bias_expanded_over_keys": lambda: {"bias": bias(B, H, L, 1).expand(B, H, L, S)},
    "bias_float32": lambda: {"bias": bias(1, H, L, dtype=torch.float32)},
    "bias_of_keys": lambda: {"bias": bias(B, 1, 1)},
    "bias_of_keys_float32": lambda: {"bias": bias(1, H, 1, dtype=torch.float32)},
    "bias_aligned": lambda: {"bias": bias(1, 1, L, 336)[..., :S]},
    "softcap": lambda: {"softcap": 3.0},
    "sinks": lambda: {"sinks": attention_sinks(H, seed=4)[None]},
    "sinks_absent": lambda: {"sinks": torch.tensor([[-math.inf, 1.0]]), "upper": -3},
    "scale": lambda: {"scale": 0.7},
    "scale_zero": lambda: {"scale": 0.0, "upper": 3},
}
TOGETHER: dict[str, Any] = {
    "mask_and_padding": lambda: {**ALONE["mask_of_heads"](), **ALONE["padding"]()},
    "causal_mask_and_bias": lambda: {"upper": S - L, "mask": blocks(B, 1, L), "bias": bias(1, H, L)},
    "window_prefix_padding": lambda: {"lower": -30, **ALONE["prefix"](), **ALONE["padding"]()},
    "causal_documents_softcap": lambda: {"upper": 0, "softcap": 3.0, **ALONE["documents"]()},
    "bias_softcap_sinks": lambda: {"softcap": 3.0, "bias": bias(B, 1, L), **ALONE["sinks"]()},
    "bias_of_keys_causal_sinks": lambda: {"upper": 0, "bias": bias(B, 1, 1), **ALONE["sinks"]()},
    "everything": lambda: {
        "lower": -200, "upper": 100, "softcap": 20.0, "bias": bias(1, H, L), **ALONE["mask"](), **ALONE["padding"](),
        **ALONE["documents"](), **ALONE["sinks"](), "prefix": prefix_lengths(B, S, seed=5),
    },
}  # fmt: skip


QUICK = (
    "causal_bottom_right", "window", "documents", "mask", "padding", "bias", "bias_of_keys", "softcap", "sinks",
    "everything",
)  # fmt: skip


@pytest.mark.parametrize("case", quick([*ALONE, *TOGETHER], *QUICK))
def test_hopper_forward_matches_reference(case, device):
    check(make(device, {**ALONE, **TOGETHER}[case]()))


@pytest.mark.parametrize("case", quick(["plain", "softcap", "bias", "everything"], "plain"))
def test_hopper_forward_matches_reference_in_float16(case, device):
    check(make(device, {**ALONE, **TOGETHER}[case](), dtype=FP16))


@pytest.mark.parametrize("sample", quick(range(8), 0, 1))
def test_hopper_forward_matches_reference_at_random(sample, device, request):
    """Any four options at once, in any order of events."""
    rng = random.Random(f"{request.config.seed} {sample}")
    arguments = {}
    for name in rng.sample(sorted(ALONE), 4):
        arguments |= ALONE[name]()
    dtype, head_dim = rng.choice([BF16, FP16]), rng.choice([64, 96])
    check(make(device, arguments, dtype=dtype, head_dim=head_dim, seed=sample), order=rng.randrange(1000))


# rows, keys, and what is special about them
SIZES = {
    "one_pair": (1, 1, {}),
    "one_row": (1, 400, {"upper": 399}),
    "one_key": (200, 1, {}),
    "whole_tiles": (128, 256, {}),
    "one_more": (129, 257, {"upper": 128}),
    "more_rows_than_keys": (300, 130, {"upper": -170}),
    "rows_that_see_nothing_first": (300, 40, {"upper": -260}),
    "no_row_sees_anything": (140, 200, {"upper": -140}),
}


@pytest.mark.parametrize("case", quick(SIZES, "one_pair", "one_more", "rows_that_see_nothing_first"))
def test_hopper_forward_takes_any_length(case, device):
    rows, keys, arguments = SIZES[case]
    check(make(device, dict(arguments), batch=1, rows=rows, keys=keys))


WIDTHS = [(8, 8), (40, 64), (80, 80), (96, 128), (128, 128), (192, 192), (256, 64)]


@pytest.mark.parametrize("widths", quick(WIDTHS, (40, 64), (192, 192)), ids=str)
def test_hopper_forward_takes_any_head_size(widths, device):
    head_dim, value_dim = widths
    check(make(device, {"upper": S - L}, batch=1, kv_heads=2, head_dim=head_dim, value_dim=value_dim))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_hopper_forward_shares_keys_among_heads(group, device):
    check(make(device, {"upper": 50}, batch=2, heads=2 * group, kv_heads=2, rows=100, keys=140))


@pytest.mark.parametrize("layout", ["heads_inside", "packed"])
def test_hopper_forward_takes_strides(layout, device):
    check(make(device, {"upper": S - L}, layout=layout))


@pytest.mark.parametrize(
    "config", [(64, 2, True), (64, 3, False, True), (128, 2, False), (128, 2, True, True)], ids=str
)
@pytest.mark.parametrize("case", ["causal_bottom_right", "bias"])
def test_hopper_forward_takes_configurations(case, config, device):
    check(make(device, ALONE[case]()), ForwardConfig(128, *config))


@pytest.mark.parametrize("schedule", quick(get_args(Schedule), "static", "dynamic"))
@pytest.mark.parametrize("blocks_at_once", quick([1, 3, 64], 3))
def test_hopper_forward_takes_any_schedule(blocks_at_once, schedule, device, monkeypatch):
    """Whether thread blocks take all tiles of rows, several each, or one: the rings of buffers run on."""
    monkeypatch.setattr(forward, "multiprocessors", lambda _: blocks_at_once)
    monkeypatch.setattr(forward, "_ABREAST_BYTES", 2 * 200 * 2 * D * 2)  # two heads of keys, four of queries
    problem = make(device, {"upper": -100}, batch=1, heads=6, kv_heads=3, rows=300, keys=200)
    check(problem, dataclasses.replace(forward_config(problem), schedule=schedule))


@pytest.mark.parametrize("case", ["mask", "bias", "padding", "softcap"])
@pytest.mark.parametrize("order", range(3))
def test_hopper_forward_hands_out_tiles_one_by_one(case, order, device, monkeypatch):
    """Programs whose partitions learn from the producer what is next, in any order of events."""
    monkeypatch.setattr(forward, "multiprocessors", lambda _: 2)
    problem = make(device, {"upper": S - L, **ALONE[case]()}, heads=H, kv_heads=HK, rows=L)
    check(problem, dataclasses.replace(forward_config(problem), schedule="dynamic"), order)


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("tiles_of_keys", [1, 2])
@pytest.mark.parametrize("order", quick(range(4), 0, 1))
def test_hopper_forward_takes_many_tiles_of_rows_with_few_keys(order, tiles_of_keys, schedule, device, monkeypatch):
    """No more tiles of keys than stages: the producer may be a whole tile of rows ahead, and only the barriers between
    two tiles of rows hold it back."""
    monkeypatch.setattr(forward, "multiprocessors", lambda _: 2)
    problem = make(device, {}, batch=1, heads=4, kv_heads=2, rows=250, keys=64 * tiles_of_keys)
    check(problem, ForwardConfig(128, 64, 2, stage_output=True, schedule=schedule), order)


@pytest.mark.skipif(machines.NAME == "gpu", reason="a GPU takes the order that it likes")
@pytest.mark.parametrize("order", quick(range(1, 6), 1, 2, 3))
def test_hopper_forward_does_not_depend_on_who_goes_first(order, device):
    problem = make(device, TOGETHER["causal_mask_and_bias"]())
    one, other = launch(problem), launch(problem, order=order)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("rows_of_bias", quick([L, 1], L))
def test_hopper_forward_keeps_finite_biases_finite(rows_of_bias, device):
    """finfo.min hides keys in much of the world's code, but a row that sees no others is not empty; -inf is."""
    hidden = torch.zeros(B, 1, rows_of_bias, S, dtype=BF16)
    hidden[0, :, :, :300] = torch.finfo(BF16).min
    hidden[1] = torch.finfo(BF16).min
    hidden[1, :, :, 5:9] = -math.inf
    problem = make(device, {"bias": hidden})
    check(make(device, {"bias": hidden[:1]}, batch=1))
    out, _, statistics = launch(problem)
    truth, peer = expected(problem, torch.float64), expected(problem, BF16)
    assert_within_budget(out, truth=truth.output, peer=peer.output, name="output")
    pivot, inverse_sum = statistics[1].unbind(1)
    assert torch.all(pivot == torch.tensor(LOWEST_BIAS.value))
    torch.testing.assert_close(inverse_sum, torch.full_like(inverse_sum, 1 / (S - 4)))


@pytest.mark.parametrize("case", quick(["causal_bottom_right", "mask", "padding", "bias", "everything"], "padding"))
def test_hopper_forward_statistics_are_those_of_the_plain_kernel(case, device):
    problem = make(device, {**ALONE, **TOGETHER}[case](), batch=B, dtype=FP16)
    out, lse, statistics = launch(problem)
    plain_lse, plain_statistics = torch.empty_like(lse), torch.empty_like(statistics)
    launch_plain(problem, torch.empty_like(out), plain_lse, plain_statistics, tile_map_for(problem))
    torch.testing.assert_close(statistics, plain_statistics, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", quick(["value", "key", "query"], "value"))
def test_hopper_forward_lets_nothing_leak_from_behind_masks(where, device):
    """NaN and inf that nobody sees leave no trace; a NaN in a query is its row's own."""
    arguments = {"upper": S - L, "key_padding_mask": key_padding_mask(B, S, seed=3)}
    arguments["key_padding_mask"][:, 200:] = True
    problem = make(device, arguments)
    clean, _, clean_statistics = launch(problem)
    spoilt: Any = getattr(problem, where)
    spoilt[:, :, 140 if where == "query" else 210] = math.nan
    spoilt[:, :, 145 if where == "query" else 250] = math.inf
    out, _, statistics = launch(problem)
    rows = torch.ones(L, dtype=torch.bool, device=out.device)
    if where == "query":
        rows[[140, 145]] = False
        assert torch.all(out[:, :, ~rows].isnan())
    # the careful launch takes tiles of another size: the same but for the order of sums
    torch.testing.assert_close(out[:, :, rows], clean[:, :, rows], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(statistics[..., rows], clean_statistics[..., rows], rtol=1e-5, atol=1e-5)


@pytest.mark.machine
def test_pack_mask_puts_a_threads_keys_into_a_word(device):
    """Bit ``2 i + e`` of word ``4 g + q`` is key ``64 g + 8 i + 2 q + e``."""
    mask = attention_mask(B, H, 5, S, seed=1).to(device)
    for hidden in (False, True):
        words = pack_mask(mask, S, hidden)
        assert words.shape[:3] == mask.shape[:3]
        bits = (words[..., None].int() >> torch.arange(16, device=device)) & 1
        bits = bits.unflatten(3, (-1, 4)).unflatten(5, (8, 2))  # group, thread, i, e
        keys = bits.permute(0, 1, 2, 3, 5, 4, 6).flatten(3).bool()
        assert torch.equal(keys[..., :S], mask != hidden) and not keys[..., S:].any()


REFUSED: dict[str, Any] = {
    "dtype": lambda p: {name: getattr(p, name).float() for name in ("query", "key", "value")},
    "head_dim": lambda p: {name: getattr(p, name).repeat(1, 1, 1, 5) for name in ("query", "key", "value")},
    "dropout_p": lambda p: {"seed": torch.zeros(2, dtype=torch.int64), "dropout_p": 0.1},
    "alibi_slopes": lambda p: {"alibi_slopes": torch.zeros(1, H)},
    "scale": lambda p: {"scale": -1.0},
    "seqlen_q": lambda p: {"key": p.key[:, :, :0], "value": p.value[:, :, :0]},
    "bias": lambda p: {"bias": torch.zeros(1, 1, L, 1)},
    "query": lambda p: {"query": p.query[..., 1:]},
    "key": lambda p: {"key": p.key.mT.contiguous().mT},
    "value": lambda p: {"value": p.value[:1].expand(B, HK, S, D)},
    "bias.dtype": lambda p: {
        "bias": torch.zeros(1, 1, L, S),
        **{name: getattr(p, name).repeat(1, 1, 1, 3) for name in ("query", "key", "value")},
    },
    "value_dim": lambda p: {"value": p.value[..., :20]},
}


@pytest.mark.machine
@pytest.mark.parametrize("case", REFUSED)
def test_hopper_refuses_with_a_reason(case, device):
    problem = make(device, {})
    changed = dataclasses.replace(problem, **on_device(device, REFUSED[case](problem)))
    assert refusals(problem) == []
    reasons = refusals(changed)
    assert len(reasons) == 1 and reasons[0].startswith(case)
