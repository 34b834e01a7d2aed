"""The kernels over a key/value cache: append, attention by shares, merge, against the reference."""

import dataclasses
import math
import random
from typing import Any, NamedTuple

import pytest
import torch

from fastattn.reference import attention_with_kvcache as reference
from fastattn.testing import assert_within_budget, random_tensor, ulp
from tests.machines.marks import quick
from tests.pairwise import pairwise

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.decode import forward
from fastattn_kernels.attention.decode.append import launch_append
from fastattn_kernels.attention.decode.config import splits_for
from fastattn_kernels.attention.decode.problem import CacheProblem
from fastattn_kernels.common.plans import planned

pytestmark = pytest.mark.usefixtures("poisoned")

NAN, INF = math.nan, math.inf
NOWHERE = 2**31 - 1  # stands in a block table where no page does


class Case(NamedTuple):
    """What the call of a test is like."""

    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (32, 32)  # of a head of keys, and of values
    length: int = 1
    page_size: int = 0  # 0: the cache is contiguous
    is_new: bool = True
    rotary: str = ""  # halves or interleaved, of all features or of a part
    lower: int | None = None
    upper: int | None = 0
    leftpad: bool = False
    softcap: float | None = None
    sinks: bool = False
    slopes: int = 0  # of 1: shared by the sequences; of 2: each its own
    bias: str = ""  # the axes that do not broadcast, of "bhls"
    scale: float = 0.3
    splits: int = 1
    heads_inside: bool = False  # a cache [B, S, Hk, D], transposed

    def __str__(self):
        changed = [(name, value) for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return "-".join(f"{name}={value}" for name, value in changed).replace("torch.", "") or "plain"


class Drawn(NamedTuple):
    """A problem; what the reference is told of it beside its tensors; which places of the cache are in use."""

    problem: Any  # a CacheProblem
    words: dict
    in_use: torch.Tensor  # boolean [B or pages, slots]


def table_of(held: list[int], page_size: int, per_sequence: int, generator) -> list[list[int]]:
    """Pages in any order, whose number is that of all sequences' and two more. The first page of a sequence is that of
    the first sequence where both are past it. Behind a sequence's last page there is anything."""
    order = list(range(len(held) * per_sequence + 2))
    generator.shuffle(order)
    table = [[order.pop() for _ in range(per_sequence)] for _ in held]
    past = [sequence for sequence, tokens in enumerate(held) if tokens >= page_size]
    for sequence in past:
        table[sequence][0] = table[past[0]][0]
    return table


def draw(case: Case, seed: int, device) -> Drawn:
    """Three sequences: one that holds nothing, one that is full afterwards, and another. What is not in use is NaN."""
    generator = random.Random(seed)
    (heads, kv_heads), (head_dim, value_dim), length = case.heads, case.sizes, case.length
    per_sequence = 1 if case.page_size > 64 else 2 if case.page_size > 32 else 5
    room = per_sequence * case.page_size or 75
    new = length if case.is_new else 0
    held = [0, room - new, generator.randint(0, room - new)]

    def normal(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=generator.randrange(2**20), dtype=case.dtype, device=device)

    def integers(numbers) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    table, entries, slots = None, len(held), room
    if case.page_size:
        table = table_of(held, case.page_size, per_sequence, generator)
        entries, slots = 3 * per_sequence + 2, case.page_size
    in_use = torch.zeros(entries, slots, dtype=torch.bool, device=device)
    leftpad = [generator.randint(0, tokens + new) for tokens in held]
    for sequence, tokens in enumerate(held):
        for slot in range(leftpad[sequence] if case.leftpad else 0, tokens):
            in_use[table[sequence][slot // slots] if table else sequence, slot % slots] = True
        if table:
            used = -(-(tokens + new) // slots)
            table[sequence][used:] = [generator.choice([-1, NOWHERE, 0])] * (per_sequence - used)
    caches = []
    for size in (head_dim, value_dim):
        cache = normal(entries, slots, kv_heads, size).masked_fill_(~in_use[:, :, None, None], NAN).transpose(1, 2)
        caches.append(cache if case.heads_inside else cache.contiguous())
    words: dict = {"cache_seqlens": integers(held), "scale": case.scale, "softcap": case.softcap}
    if table:
        words["block_table"] = integers(table)
    if case.leftpad:
        words["cache_leftpad"] = integers(leftpad)
    if case.rotary and case.is_new:
        pairs = head_dim // 2 if "all" in case.rotary else head_dim // 4
        angles = 3 * torch.rand(room, pairs, generator=torch.Generator().manual_seed(seed)).to(device)
        words |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        words["rotary_interleaved"] = "interleaved" in case.rotary
    if case.sinks:
        words["sinks"] = normal(heads)
    if case.slopes:
        words["alibi_slopes"] = normal(*([3] * (case.slopes == 2)), heads).abs() / 10
    if case.bias:
        bias = normal(*(size if axis in case.bias else 1 for axis, size in zip("bhls", (3, heads, length, room))))
        words["attn_mask"] = bias.masked_fill(bias > 0.8, -INF)
    tensors = {name: word for name, word in words.items() if name not in ("attn_mask", "sinks", "alibi_slopes")}
    problem = CacheProblem(
        query=normal(3, length, heads, head_dim).transpose(1, 2),
        key_cache=caches[0],
        value_cache=caches[1],
        key=normal(3, kv_heads, length, head_dim) if case.is_new else None,
        value=normal(3, length, kv_heads, value_dim).transpose(1, 2) if case.is_new else None,
        bias=words.get("attn_mask"),
        sinks=words["sinks"][None] if case.sinks else None,
        alibi_slopes=words["alibi_slopes"].view(-1, heads) if case.slopes else None,
        lower=case.lower,
        upper=case.upper,
        **tensors,
    )
    words["is_causal"] = False
    words["window"] = (None if case.lower is None else -case.lower, case.upper)
    return Drawn(problem, words, in_use)


def run(problem: CacheProblem, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(output, lse)``; the new tokens are put into the problem's caches."""
    query = problem.query
    output = torch.empty(*query.shape[:3], problem.value_cache.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], device=query.device)
    launch_append(problem)
    forward.launch_attention_decode(problem, output, lse, splits)
    return output, lse


def expected_of(drawn: Drawn, dtype: torch.dtype):
    """The reference's results in a dtype."""
    tensors = {name: getattr(drawn.problem, name) for name in ("query", "key_cache", "value_cache", "key", "value")}
    words: dict[str, Any] = {
        name: word.to(dtype) if isinstance(word, torch.Tensor) and word.is_floating_point() else word
        for name, word in (tensors | drawn.words).items()
    }
    return reference(**words)


def check(case: Case, seed: int, device) -> None:
    """Output, LSE and caches of a case."""
    drawn = draw(case, seed, device)
    problem = drawn.problem
    truth, peer = expected_of(drawn, torch.float64), expected_of(drawn, case.dtype)
    before = problem.key_cache.clone(), problem.value_cache.clone()
    output, lse = run(problem, case.splits)
    after = problem.key_cache.clone(), problem.value_cache.clone()
    # Scores go to base 2 and the LSE comes back, by two constants and two products that round, as the peer's do not.
    finite = truth.lse[truth.lse.isfinite()]
    of_base = 2 * ulp(finite.abs().max().item(), torch.float32)
    for name, actual, allowance in (("output", output, 0.0), ("lse", lse, of_base)):
        of_truth, of_peer = getattr(truth, name), getattr(peer, name).to(actual.dtype)
        assert_within_budget(
            actual, truth=of_truth, peer=of_peer, name=name, allowance=allowance, feature="kvcache", backend="triton"
        )
    for name, held, now in zip(("key_cache", "value_cache"), before, after):
        expected, of_peer = getattr(truth, name), getattr(peer, name)
        is_written = expected.isfinite() & ~drawn.in_use[:, None, :, None]
        assert torch.equal(now.isnan(), expected.isnan())
        assert torch.equal(now[~is_written].nan_to_num(7.0), held[~is_written].nan_to_num(7.0)), name
        assert_within_budget(now, truth=expected, peer=of_peer, name=name, feature="kvcache", backend="triton")
        if name == "value_cache" or "rotary_cos" not in drawn.words:
            assert torch.equal(now.nan_to_num(7.0), of_peer.nan_to_num(7.0)), name


AXES: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "heads": [(4, 2), (3, 1), (2, 2)],
    "sizes": [(32, 32), (59, 59), (32, 48)],
    "length": [1, 3, 17],
    "page_size": [0, 16, 48, 64, 256],
    "is_new": [True, False],
    "rotary": ["", "halves of all", "interleaved", "halves of a part"],
    "lower": [None, -9],
    "upper": [0, None, 2],
    "leftpad": [False, True],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "slopes": [0, 1, 2],
    "bias": ["", "bhls", "ls", "s", "bh"],
    "scale": [0.3, -0.2, 0.0],
    "splits": [1, 2, 7],
    "heads_inside": [False, True],
}
ALONE = [Case(), *(Case()._replace(**{name: level}) for name, levels in AXES.items() for level in levels[1:])]
PAIRS = [Case(**case) for case in pairwise(AXES, attempts=3)]


@pytest.mark.parametrize("case", quick(ALONE, ALONE[0], Case(page_size=16)), ids=str)
def test_attention_over_a_cache_matches_reference(case, device, seed):
    check(case, seed, device)


@pytest.mark.parametrize("case", PAIRS, ids=range(len(PAIRS)))
def test_pairs_of_features_over_a_cache_match_reference(case, device, seed):
    check(case, seed, device)


# ------------------------------------------------------------------------------------------------------ what leaks not


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page_size", [0, 16])
def test_nan_of_a_token_reaches_the_queries_that_see_it_and_no_other(page_size, splits, device):
    """Of one tile, some rows see the token and some do not: the tile is computed again, carefully."""
    drawn = draw(Case(length=5, lower=-6, page_size=page_size, is_new=False), 3, device)
    problem, place = drawn.problem, 1
    tokens = int(problem.cache_seqlens[1])
    clean, _ = run(problem, splits)
    for back, seen_by in ((3, slice(2, None)), (9, slice(0, 3))):
        slot = tokens - back
        if page_size:
            place, slot = int(problem.block_table[1, slot // page_size]), slot % page_size
        kept = problem.value_cache[place, :, slot].clone()
        problem.value_cache[place, :, slot] = NAN
        output, _ = run(problem, splits)
        assert output[1, :, seen_by].isnan().all()
        output[1, :, seen_by] = clean[1, :, seen_by]
        torch.testing.assert_close(output, clean, rtol=1e-5, atol=1e-6)
        problem.value_cache[place, :, slot] = kept


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_behind_a_bias_of_minus_infinity_is_not_seen(splits, device):
    drawn = draw(Case(bias="hs", is_new=False, upper=None), 4, device)
    problem = drawn.problem
    problem.bias[..., 5] = -INF
    clean, _ = run(problem, splits)
    problem.key_cache[:, :, 5], problem.value_cache[:, :, 5] = NAN, INF
    torch.testing.assert_close(run(problem, splits)[0], clean, rtol=1e-5, atol=1e-6)


def test_nan_in_a_query_stays_in_its_row(device):
    drawn = draw(Case(length=3, is_new=False, sinks=True), 5, device)
    clean, clean_lse = run(drawn.problem, 2)
    drawn.problem.query[1, 2, 1] = NAN
    output, lse = run(drawn.problem, 2)
    assert output[1, 2, 1].isnan().all()
    assert lse[1, 2, 1].isnan()
    output[1, 2, 1], lse[1, 2, 1] = clean[1, 2, 1], clean_lse[1, 2, 1]
    torch.testing.assert_close(output, clean)
    torch.testing.assert_close(lse, clean_lse)


# --------------------------------------------------------------------------------------------- numbers that do not fit


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy between two stretches of NaN, and all of that memory."""
    guard = 4096
    memory = torch.full((tensor.numel() + 2 * guard,), NAN, dtype=tensor.dtype, device=tensor.device)
    inside = memory[guard : guard + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor), memory


def problem_of(lengths: list[int], length: int, table: list[list[int]] | None, device) -> tuple[Any, list]:
    """New tokens for caches of finite numbers that lie between NaN; and the memory of both."""
    entries, slots = (len(lengths), 20) if table is None else (6, 8)
    shape = entries, 2, slots, 16
    keys, key_memory = guarded(random_tensor(*shape, seed=1, device=device))
    values, value_memory = guarded(random_tensor(*shape, seed=2, device=device))
    problem = CacheProblem(
        random_tensor(len(lengths), 4, length, 16, seed=5, device=device),
        keys,
        values,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        0.25,
        random_tensor(len(lengths), 2, length, 16, seed=3, device=device),
        random_tensor(len(lengths), 2, length, 16, seed=4, device=device),
        block_table=None if table is None else torch.tensor(table, dtype=torch.int32, device=device),
        upper=0,
    )
    return problem, [key_memory, value_memory]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("table", [None, [[3, 0, 5], [1, 4, 2]]], ids=["contiguous", "paged"])
def test_lengths_that_do_not_fit_are_clamped(table, splits, device):
    """A negative length is 0, and tokens for which there is no room are dropped; queries stand where they stood."""
    problem, memory = problem_of([-5, 18 if table is None else 22], 3, table, device)
    guards = [int(each.isnan().sum()) for each in memory]
    output, lse = run(problem, splits)
    assert [int(each.isnan().sum()) for each in memory] == guards
    assert output.isfinite().all()
    assert lse.isfinite().all()
    # the second sequence has room for two of its three tokens, and the third query sees what the second one does
    words = {"cache_seqlens": torch.tensor([3, problem.room], device=device), "scale": problem.scale}
    if table is not None:
        words["block_table"] = problem.block_table
    last = reference(problem.query[:, :, 2:], problem.key_cache, problem.value_cache, **words)
    torch.testing.assert_close(output[:, :, 2:], last.output, rtol=1e-5, atol=1e-6)
    assert torch.equal(problem.key_cache[0 if table is None else 3, :, 0], problem.key[0, :, 0])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("nowhere", [-1, 6, NOWHERE, -(2**31)])
def test_pages_that_do_not_exist_hold_nothing(nowhere, splits, device):
    """Neither are they read, nor written, and the softcap does not bring them back as scores."""
    problem, memory = problem_of([17, 14], 3, [[3, nowhere, 5], [1, nowhere, 2]], device)
    before, guards = problem.key_cache.clone(), [int(each.isnan().sum()) for each in memory]
    problem = dataclasses.replace(problem, softcap=2.0)
    output, lse = run(problem, splits)
    assert [int(each.isnan().sum()) for each in memory] == guards
    assert torch.equal(problem.key_cache[[0, 4]], before[[0, 4]])
    hides = torch.zeros(1, 1, 1, 24, device=device)
    hides[..., 8:16] = -INF
    words = {"cache_seqlens": problem.cache_seqlens + 3, "scale": problem.scale, "softcap": 2.0, "attn_mask": hides}
    words["block_table"] = torch.tensor([[3, 0, 5], [1, 0, 2]], device=device)
    expected = reference(problem.query, problem.key_cache, problem.value_cache, **words)
    torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected.lse, rtol=1e-5, atol=1e-6)


def test_a_sequence_longer_than_the_bias_ends_with_it(device):
    drawn = draw(Case(bias="hs", upper=None, is_new=False), 6, device)
    problem = drawn.problem
    short, _ = guarded(problem.bias[..., :40].contiguous())
    output, _ = run(dataclasses.replace(problem, bias=short), 2)
    lengths = problem.cache_seqlens.clamp(max=40)
    words = drawn.words | {"cache_seqlens": lengths, "attn_mask": short}
    expected = reference(problem.query, problem.key_cache, problem.value_cache, **words)
    torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-6)


def test_rotary_positions_past_the_end_turn_nothing(device):
    drawn = draw(Case(rotary="halves of all"), 7, device)
    problem = drawn.problem
    few = {name: guarded(getattr(problem, name)[:10].contiguous())[0] for name in ("rotary_cos", "rotary_sin")}
    run(dataclasses.replace(problem, **few), 1)
    slot = int(problem.cache_seqlens[1])
    assert slot >= 10
    assert torch.equal(problem.key_cache[1, :, slot], problem.key[1, :, 0])


@pytest.mark.parametrize(("batch", "length", "heads"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_calls_without_a_query_launch_nothing_that_fails(batch, length, heads, device):
    kv_heads = heads // 2
    cache, new = (
        torch.zeros(batch, kv_heads, 8, 16, device=device),
        torch.ones(batch, kv_heads, length, 16, device=device),
    )
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    query = torch.ones(batch, heads, length, 16, device=device)
    output, lse = run(CacheProblem(query, cache, cache, lengths, 1.0, new, new), 0)
    assert output.shape == (batch, heads, length, 16)
    assert lse.shape == (batch, heads, length)


def test_a_cache_without_room_gives_zero(device):
    query, nothing = torch.ones(2, 2, 1, 16, device=device), torch.ones(2, 2, 0, 16, device=device)
    lengths = torch.full((2,), 3, dtype=torch.int32, device=device)
    output, lse = run(CacheProblem(query, nothing, nothing, lengths, 1.0, query, query), 0)
    assert not output.any()
    assert (lse == -INF).all()


# ------------------------------------------------------------------------------------------------- launches and shares


@pytest.mark.parametrize(("is_new", "splits", "launches"), [(True, 2, 3), (True, 1, 2), (False, 1, 1)])
def test_launches_are_as_few_as_they_can_be(is_new, splits, launches, device):
    drawn = draw(Case(is_new=is_new), 8, device)
    fields = tuple(vars(drawn.problem))
    by_plan = planned(lambda *values: run(CacheProblem(**dict(zip(fields, values))), splits))
    found = [by_plan(*vars(drawn.problem).values()) for _ in range(3)]
    assert [plan.launches for plan in by_plan.plans.known()] == [launches]
    assert torch.equal(found[0][0], found[2][0])


def test_shares_are_merged_the_same_way_in_every_run(device):
    drawn = draw(Case(dtype=torch.bfloat16, length=3, upper=0), 10, device)
    first, second = run(drawn.problem, 3), run(drawn.problem, 3)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_more_splits_than_tiles_change_nothing(device):
    drawn = draw(Case(length=3, sinks=True), 9, device)
    one, many = run(drawn.problem, 1), run(drawn.problem, 20)
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiles", [1, 5, 64, 131, 132, 133, 200, 500, 4096])
@pytest.mark.parametrize("room", [0, 100, 512, 8192, 131072])
def test_slots_are_divided_by_the_fewest_programs_that_fill_the_machine(tiles, room):
    splits = splits_for(tiles, room, 132)
    assert splits >= 1
    assert splits == 1 or room // splits >= 256
    assert splits == 1 or tiles * (splits - 1) < 2 * 132 or splits <= 8
    if room == 131072:
        assert tiles * splits >= 132


def test_no_share_is_without_a_tile(device):
    """However many programs somebody asks for: each would take memory for what it does not find."""
    drawn = draw(Case(), 0, device)
    config, _, splits = forward.division_of(drawn.problem, 10**9)
    assert splits == -(-drawn.problem.room // config.block_n)
