"""The Hopper backward: every option against float64, in the pair of passes and in one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.reference import attention, visibility
from fastattn.testing import (
    assert_within_budget,
    attention_inputs,
    attention_mask,
    attention_sinks,
    document_ids,
    key_padding_mask,
    random_tensor,
)

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.hopper.backward import launch_attention_bwd, refusals
from fastattn_kernels.attention.hopper.backward_problem import bias_arguments, rules_of_keys, rules_of_rows
from fastattn_kernels.attention.hopper.config import backward_config
from fastattn_kernels.attention.hopper.forward import launch_attention_fwd
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.masking import LOWEST_BIAS
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap
from tests import machines
from tests.machines import DEVICE
from tests.machines.marks import quick

pytestmark = [
    pytest.mark.hopper,
    pytest.mark.skipif(not machines.RUNS_GLUON, reason=machines.NO_GLUON),
]

LOG2_E = math.log2(math.e)
_RULES = ("mask", "key_padding_mask", "query_documents", "key_documents", "prefix", "lower", "upper")


def make_problem(
    seqlen_q: int, seqlen_k: int, head_dim: int = 64, *, batch: int = 1, heads: int = 1, kv_heads: int | None = None,
    value_dim: int | None = None, dtype: torch.dtype = torch.bfloat16, layout: Any = "dense", seed: int = 0,
    scale: float | None = None, **options: Any,
) -> Problem:  # fmt: skip
    tensors = attention_inputs(
        batch, heads, seqlen_q, seqlen_k, head_dim, kv_heads=kv_heads, value_dim=value_dim, dtype=dtype, layout=layout,
        seed=seed,
    )  # fmt: skip
    query, key, value = (tensor.to(DEVICE) for tensor in tensors)
    options = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return Problem(query, key, value, head_dim**-0.5 if scale is None else scale, **options)


def statistics_of(problem: Problem) -> torch.Tensor:
    """What the forward leaves for the backward, from scores in float64."""
    query, key = problem.query.double(), problem.key.double()
    heads, seqlen_q = query.shape[1:3]
    seqlen_k = key.shape[2]
    scores = query @ key.repeat_interleave(heads // key.shape[1], 1).transpose(2, 3) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores * LOG2_E
    if problem.bias is not None:
        bias = problem.bias.double() * LOG2_E
        scores = scores + torch.where(bias == -math.inf, bias, bias.clamp(min=LOWEST_BIAS.value))
    seen = visibility(seqlen_q, seqlen_k, device=DEVICE, **{name: getattr(problem, name) for name in _RULES})
    scores = scores.masked_fill(~seen, -math.inf)
    row_max = scores.amax(3)
    if problem.sinks is not None:
        row_max = torch.maximum(row_max, problem.sinks[:, :, None].double() * LOG2_E)
    pivot = torch.where(row_max == -math.inf, 0.0, row_max)
    total = torch.exp2(scores - pivot[..., None]).sum(3)
    if problem.sinks is not None:
        total = total + torch.exp2(problem.sinks[:, :, None].double() * LOG2_E - pivot)
    return torch.stack((pivot, torch.where(total == 0.0, 0.0, 1.0 / total)), 2).float()


def reference(problem: Problem, d_out: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output and the gradients of query, key and value, in ``dtype``."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    tensors = [fields.pop(name).to(dtype, copy=True).requires_grad_() for name in ("query", "key", "value")]
    unused = ("alibi_slopes", "seed", "dropout_p", "packed")
    fields = {name: value for name, value in fields.items() if name not in unused}
    for name in ("bias", "sinks"):
        fields[name] = None if fields[name] is None else fields[name].to(dtype)
    output = attention(*tensors, **fields).output
    return output.detach(), list(torch.autograd.grad(output, tensors, d_out.to(dtype)))


def gradients_of(
    problem: Problem, statistics: torch.Tensor, d_out: torch.Tensor, output: torch.Tensor, one_pass: bool,
    tile_map: TileMap | None = None, order: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of query, key and value, as the launcher writes them."""
    assert not refusals(problem)
    config = backward_config(problem, deterministic=not one_pass)
    assert config.one_pass == one_pass
    delta = (output.to(d_out.dtype).float() * d_out.float()).sum(3)
    d_query, d_key, d_value = (
        torch.full_like(tensor, math.nan) for tensor in (problem.query, problem.key, problem.value)
    )
    with machines.order_of_events(order):
        launch_attention_bwd(problem, d_out, statistics, delta, Gradients(d_query, d_key, d_value), tile_map, config)
    return d_query, d_key, d_value


def gradient_of_output(problem: Problem) -> torch.Tensor:
    d_out = random_tensor(*problem.query.shape[:3], problem.value.shape[3], seed=99, dtype=problem.query.dtype)
    return d_out.to(DEVICE)


def check(problem: Problem, *, one_pass: bool = False, tile_map: bool = False, order: int = 0) -> None:
    """Launch, and hold the gradients to their budgets."""
    d_out = gradient_of_output(problem)
    output, truths = reference(problem, d_out, torch.float64)
    _, peers = reference(problem, d_out, problem.query.dtype)
    maps = TileMap(problem) if tile_map else None
    gradients = gradients_of(problem, statistics_of(problem), d_out, output, one_pass, maps, order)
    for name, actual, truth, peer in zip(("d_query", "d_key", "d_value"), gradients, truths, peers, strict=True):
        assert_within_budget(actual, truth=truth, peer=peer, name=name)


def bias_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return random_tensor(*shape, seed=7, dtype=dtype)


CASES: dict[str, Callable[[], Problem]] = {
    "plain": lambda: make_problem(130, 200),
    "causal": lambda: make_problem(200, 200, upper=0),
    "d128-causal": lambda: make_problem(130, 150, 128, upper=20),
    "d128-fp16": lambda: make_problem(70, 130, 128, dtype=torch.float16),
    "two-keys": lambda: make_problem(65, 2),
    "one-row": lambda: make_problem(1, 130, upper=129),
    "d80": lambda: make_problem(66, 70, 80, value_dim=40, upper=0),
    "heads-inside": lambda: make_problem(66, 70, 32, heads=2, batch=2, layout="heads_inside"),
    "rows-that-see-nothing": lambda: make_problem(200, 70, upper=-130),
    "keys-that-nobody-sees": lambda: make_problem(60, 300, upper=0),
    "group-of-2": lambda: make_problem(100, 70, heads=4, kv_heads=2, upper=-30),
    "group-of-4": lambda: make_problem(70, 70, 128, heads=4, kv_heads=1),
    "window": lambda: make_problem(260, 200, lower=-40, upper=10),
    "window-d128": lambda: make_problem(70, 200, 128, lower=30),
    "mask": lambda: make_problem(40, 140, heads=2, kv_heads=1, mask=attention_mask(1, 2, 40, 140, seed=3)),
    "mask-of-keys": lambda: make_problem(70, 140, mask=attention_mask(1, 1, 1, 140, seed=3)),
    "mask-of-rows": lambda: make_problem(70, 140, 128, mask=torch.arange(70)[None, None, :, None] % 3 > 0),
    "padding": lambda: make_problem(70, 200, batch=2, key_padding_mask=key_padding_mask(2, 200, seed=1)),
    "documents": lambda: make_problem(
        150, 150, upper=0, query_documents=document_ids(1, 150), key_documents=document_ids(1, 150)
    ),
    "prefix": lambda: make_problem(150, 150, batch=2, upper=0, prefix=torch.tensor([70, 3])),
    "softcap": lambda: make_problem(70, 130, softcap=2.0, scale=0.5),
    "softcap-d128-fp16": lambda: make_problem(70, 70, 128, softcap=3.0, dtype=torch.float16, upper=0),
    "sinks": lambda: make_problem(70, 70, heads=2, sinks=attention_sinks(2)[None], upper=0),
    "scale-0": lambda: make_problem(70, 70, scale=0.0, upper=0),
    "bias": lambda: make_problem(100, 144, heads=2, bias=bias_of(1, 2, 100, 144)),
    "bias-unaligned-d128": lambda: make_problem(70, 131, 128, bias=bias_of(1, 1, 70, 131), upper=61),
    "bias-float32": lambda: make_problem(130, 140, batch=2, bias=bias_of(2, 1, 130, 140, dtype=torch.float32)),
    "bias-of-keys": lambda: make_problem(130, 140, batch=2, bias=bias_of(2, 1, 1, 140, dtype=torch.float32)),
    "all-at-once": lambda: make_problem(
        70, 140, heads=2, kv_heads=1, softcap=5.0, lower=-50, upper=80, bias=bias_of(1, 2, 70, 140),
        mask=attention_mask(1, 1, 70, 140, seed=5), key_padding_mask=torch.arange(140)[None] > 120,
    ),
    "all-at-once-d128": lambda: make_problem(
        70, 140, 128, heads=2, kv_heads=1, lower=-50, upper=10, prefix=torch.tensor([30]), bias=bias_of(1, 1, 70, 140),
        query_documents=document_ids(1, 70), key_documents=document_ids(1, 140),
    ),
}  # fmt: skip
NOT_IN_ONE_PASS = ("bias", "bias-float32", "softcap", "softcap-d128-fp16", "all-at-once")


QUICK = (
    "causal", "d128-causal", "heads-inside", "group-of-2", "window", "mask", "documents", "softcap", "sinks", "bias",
    "bias-of-keys", "all-at-once",
)  # fmt: skip


@pytest.mark.parametrize("name", quick(CASES, *QUICK))
def test_pair_matches_reference(name: str) -> None:
    check(CASES[name]())


QUICK_IN_ONE_PASS = ("causal", "d128-fp16", "group-of-4", "mask", "padding", "prefix", "all-at-once-d128")


@pytest.mark.parametrize("name", quick([name for name in CASES if name not in NOT_IN_ONE_PASS], *QUICK_IN_ONE_PASS))
def test_one_pass_matches_reference(name: str) -> None:
    check(CASES[name](), one_pass=True)


@pytest.mark.machine
@pytest.mark.parametrize("name", NOT_IN_ONE_PASS)
def test_one_pass_leaves_to_the_pair_what_does_not_fit(name: str) -> None:
    assert not backward_config(CASES[name](), deterministic=False).one_pass


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", quick(["blocks", "padding", "documents"], "blocks"))
def test_tile_lists_match_reference(name: str, one_pass: bool) -> None:
    blocks = torch.eye(3, dtype=torch.bool).repeat_interleave(64, 0).repeat_interleave(128, 1)[None, None, :150, :280]
    documents = torch.arange(280) // 64
    options: dict[str, Any] = {
        "blocks": {"mask": blocks, "heads": 2, "kv_heads": 1},
        "padding": {"key_padding_mask": torch.arange(280)[None] > 140},
        "documents": {"query_documents": documents[None, :150], "key_documents": documents[None]},
    }[name]
    check(make_problem(150, 280, **options), one_pass=one_pass, tile_map=True)


@pytest.mark.parametrize("order", quick([1, 2], 1, 2))
@pytest.mark.parametrize("one_pass", [False, True])
def test_every_order_of_events_gives_the_same(one_pass: bool, order: int) -> None:
    problem = make_problem(270, 140, heads=2, kv_heads=1, upper=-60)
    check(problem, one_pass=one_pass, order=order)


@pytest.mark.parametrize("shape", [(1, 1, 70, 80), (1, 1, 1, 80)], ids=["tiles", "of-keys"])
def test_finite_bias_is_never_minus_infinity(shape: tuple[int, ...]) -> None:
    """Where all that a row sees has a bias of finfo.min, it sees all of it alike; -inf alone hides."""
    bias = bias_of(*shape)
    bias[..., 60:] = torch.finfo(bias.dtype).min
    if shape[2] > 1:
        bias[:, :, 3] = torch.finfo(bias.dtype).min
        bias[:, :, 4] = torch.finfo(bias.dtype).min
        bias[:, :, 4, :40] = -math.inf
        bias[:, :, 5] = -math.inf
    else:
        bias[...] = torch.finfo(bias.dtype).min
        bias[..., :40] = -math.inf
    check(make_problem(70, 80, bias=bias, upper=40))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("one_pass", quick([False, True], True))
def test_what_is_masked_out_never_leaks(one_pass: bool) -> None:
    """NaN in keys and values that nobody may see."""
    padding = torch.arange(140)[None] >= 90
    problem = make_problem(40, 140, key_padding_mask=padding)
    d_out, statistics = gradient_of_output(problem), statistics_of(problem)
    output, _ = reference(problem, d_out, torch.float64)
    clean = gradients_of(problem, statistics, d_out, output, one_pass)
    poisoned = dataclasses.replace(problem, key=problem.key.clone(), value=problem.value.clone())
    poisoned.key[:, :, 95], poisoned.value[:, :, 100] = math.nan, math.inf
    gradients = gradients_of(poisoned, statistics, d_out, output, one_pass)
    for actual, expected in zip(gradients, clean, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


@pytest.mark.machine
def test_refusals_name_what_they_refuse() -> None:
    assert "head_dim=160" in " ".join(refusals(make_problem(8, 8, 160)))
    assert not refusals(make_problem(8, 8, 128))


@pytest.mark.parametrize("least", [-1e8, -1e9])
@pytest.mark.parametrize("shape", [(1, 1, 70, 80), (1, 1, 1, 80)], ids=["tiles", "of-keys"])
def test_large_finite_biases_of_all_keys_keep_probabilities_in_proportion(shape: tuple[int, ...], least: float) -> None:
    """Rows whose every key has one large bias, as padded rows have: forward and backward round the sums alike, or the
    recomputed probabilities would be off by powers of two."""
    bias = torch.full(shape, least, dtype=torch.float32)
    problem = make_problem(70, 80, bias=bias)
    output = problem.query.new_empty(1, 1, 70, 64)
    lse, statistics = (torch.empty(shape, device=DEVICE) for shape in ((1, 1, 70), (1, 1, 2, 70)))
    launch_attention_fwd(problem, output, lse, statistics)
    pivot, inverse_sum = statistics.unbind(2)
    products = problem.query.float() @ problem.key.float().mT * (problem.scale * math.log2(math.e))
    weights = torch.exp2(products + bias.to(DEVICE) * math.log2(math.e) - pivot[..., None]) * inverse_sum[..., None]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 70, device=DEVICE), rtol=1e-3, atol=1e-3)
    d_out = gradient_of_output(problem)
    gradients = gradients_of(problem, statistics, d_out, output.double(), one_pass=False)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert gradients[2].float().abs().max() < 100


@pytest.mark.machine
def test_gradients_at_odd_addresses_are_copied() -> None:
    """Autograd hands over slices of a concatenation: contiguous, and not aligned."""
    problem = make_problem(70, 80)
    d_out, statistics = gradient_of_output(problem), statistics_of(problem)
    output, _ = reference(problem, d_out, torch.float64)
    expected = gradients_of(problem, statistics, d_out, output, one_pass=False)
    odd = torch.cat([d_out.new_zeros(1), d_out.reshape(-1)])[1:].view_as(d_out)
    assert odd.is_contiguous() and odd.data_ptr() % 16
    for actual, other in zip(gradients_of(problem, statistics, odd, output, one_pass=False), expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.machine
def test_expanded_masks_and_biases_stay_small() -> None:
    mask = torch.ones(1, 1, 70, 80, dtype=torch.bool).expand(2, 4, 70, 80)
    problem = make_problem(70, 80, batch=2, heads=4, kv_heads=4, mask=mask)
    for words, *_ in (rules_of_rows(problem)[0], rules_of_keys(problem)[0]):  # type: ignore[misc]
        assert words.shape[:2] == (1, 1)
    of_keys = make_problem(70, 80, batch=2, bias=bias_of(2, 1, 1, 80).expand(2, 1, 70, 80))
    tiles, _, row_bias = bias_arguments(of_keys)
    assert tiles is None and row_bias is not None and row_bias[0].shape == (2, 1, 1, 80)  # type: ignore[attr-defined]
