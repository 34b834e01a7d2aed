"""attention_with_kvcache held against the reference; what it refuses; and cases that fail elsewhere."""

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch

import fastattn
import fastattn.reference
from fastattn.ops.attention.kvcache import api, on_torch, pages
from fastattn.ops.attention.kvcache import call as checks
from fastattn.testing import random_tensor
from tests.ops.kvcache_cases import AXES, Case, check, make_problem
from tests.pairwise import pairwise

# Of any type: they are called with dicts of arguments
attention_with_kvcache: Any = fastattn.attention_with_kvcache
reference: Any = fastattn.reference.attention_with_kvcache

FEATURES = [dataclasses.replace(Case(), **{axis: level}) for axis, levels in AXES.items() for level in levels]
FEATURES += [Case(page_size=7, shared=True)]
PAIRS = [Case(**levels) for levels in pairwise(AXES, lambda levels: Case(**levels).makes_sense)]
# One query, plain scores: the pages are read where they lie
PAGES = [
    Case(page_size=16),
    Case(held="ragged", page_size=7, heads=(4, 2), rotary="halves"),
    Case(held="ragged", page_size=16, padding=True, window=(19, 2), dtype="bf16"),
    Case(page_size=7, shared=True, sinks=True, heads=(3, 1), window=(3, 0)),
    Case(held="one", page_size=16, new=False, dtype="fp16"),
]


def ids(cases):
    return [case.id for case in cases]


@pytest.mark.parametrize("case", FEATURES, ids=ids(FEATURES))
@pytest.mark.parity
def test_kvcache_feature_matches_reference(case, device):
    check("kvcache", case, "torch", device, gradients=True)


@pytest.mark.parametrize("case", PAIRS, ids=ids(PAIRS))
@pytest.mark.parity
def test_kvcache_pairs_of_features_match_reference(case, device):
    check("kvcache", case, "torch", device, gradients=True)
    check("kvcache", case, "torch", device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("number", range(len(PAIRS)), ids=ids(PAIRS))
@pytest.mark.parity
def test_kvcache_pairs_of_features_match_reference_on_triton(number, device):
    check("kvcache", dataclasses.replace(PAIRS[number], num_splits=3 * (number % 2)), "triton", device)


@pytest.mark.parametrize("case", PAIRS, ids=ids(PAIRS))
def test_kvcache_matches_reference_where_no_number_may_be_read(case, monkeypatch):
    """The way of graphs and of other devices, here on tensors whose numbers nobody asks for."""
    monkeypatch.setattr(on_torch, "is_eager_on_cpu", lambda tensor: False)
    check("kvcache", case, "torch", gradients=True)


@pytest.mark.parametrize("case", PAGES, ids=ids(PAGES))
@pytest.mark.parametrize("most_read", [0.0, 1.5, 99.0])
def test_kvcache_reads_pages_where_they_lie(case, most_read, monkeypatch):
    """``most_read`` decides whether the pages in use are copied, as they are where most of the pool is not in use."""
    calls = []
    run = pages.run
    monkeypatch.setattr(pages, "_MOST_READ", most_read)
    monkeypatch.setattr(pages, "run", lambda *arguments: calls.append(1) or run(*arguments))
    check("kvcache", case, "torch", gradients=False)
    assert calls


def test_kvcache_pages_held_by_several_sequences_are_read_once(monkeypatch):
    """Eight beams with 4 pages in common and one of their own: torch's kernel sees 12 pages, not 40."""
    seen = []
    attend = pages._attend
    monkeypatch.setattr(pages, "_attend", lambda q, k, v, **words: seen.append(k.shape[0]) or attend(q, k, v, **words))
    beams, size = 8, 16
    table = torch.cat((torch.arange(4).expand(beams, 4), 4 + torch.arange(beams)[:, None]), dim=1).to(torch.int32)
    query, keys, values = (random_tensor(*s, seed=i) for i, s in enumerate([(beams, 2, 1, 8), *[(12, 2, size, 8)] * 2]))
    output = attention_with_kvcache(query, keys, values, cache_seqlens=5 * size, block_table=table, backend="torch")
    assert seen == [12]
    held = torch.full((beams,), 5 * size)
    expected = reference(query, keys, values, cache_seqlens=held, block_table=table).output
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_kvcache_step_by_step_is_attention_to_the_whole(page_size, backend, device):
    """Six tokens at once and then one at a time give what causal attention gives, with the same cache all along."""
    batch, heads, length, size = 2, 2, 40 if backend == "torch" else 20, 8
    query, key, value = (random_tensor(batch, heads, length, size, seed=i, device=device) for i in range(3))
    shape = (batch, heads, length) if page_size is None else (6, heads, page_size)
    caches = {name: torch.full((*shape, size), torch.nan, device=device) for name in ("key_cache", "value_cache")}
    table = None if page_size is None else torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=device)
    found, begin = [], 0
    for count in (6, *[1] * (length - 6)):
        new = slice(begin, begin + count)
        words: dict[str, Any] = {"cache_seqlens": begin, "block_table": table, "backend": backend}
        of_tokens = {"query": query[:, :, new], "key": key[:, :, new], "value": value[:, :, new]}
        found.append(attention_with_kvcache(**of_tokens, **caches, **words))
        begin += count
    expected = fastattn.attention(query, key, value, is_causal=True, backend="torch")
    torch.testing.assert_close(torch.cat(found, 2), expected)


def test_kvcache_takes_one_length_for_all_and_a_batch_of_none(backend, device):
    query, caches = torch.randn(0, 2, 1, 8, device=device), [torch.randn(0, 2, 5, 8, device=device) for _ in range(2)]
    output, lse = attention_with_kvcache(query, *caches, cache_seqlens=3, return_lse=True, backend=backend)
    assert output.shape == (0, 2, 1, 8) and lse.shape == (0, 2, 1)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
def test_kvcache_query_that_sees_nothing_is_zero(page_size, with_sinks, backend, device):
    """flash-attention returned what was in memory for sequences of length 0 (issues 1537 and 2421 there)."""
    shape = (2, 2, 8) if page_size is None else (5, 2, page_size)
    caches = [torch.full((*shape, 8), torch.nan, device=device) for _ in range(2)]
    words: dict[str, Any] = (
        {} if page_size is None else {"block_table": torch.zeros(2, 2, dtype=torch.int32, device=device)}
    )
    if with_sinks:
        words["sinks"] = torch.tensor([0.5, -1.0], device=device)
    query = torch.randn(2, 2, 1, 8, device=device)
    output, lse = attention_with_kvcache(query, *caches, cache_seqlens=0, return_lse=True, backend=backend, **words)
    assert (output == 0).all()
    expected = torch.tensor([0.5, -1.0], device=device) if with_sinks else torch.full((2,), -torch.inf, device=device)
    torch.testing.assert_close(lse, expected[None, :, None].expand(2, 2, 1))


def test_kvcache_entries_of_the_table_behind_the_last_token_are_not_read(backend, device):
    problem = make_problem(Case(page_size=16), device)
    arguments = problem.arguments(gradients=False)
    expected = reference(**arguments).output
    arguments["block_table"][:, 3:] = -7
    torch.testing.assert_close(attention_with_kvcache(**arguments, backend=backend), expected)


@pytest.mark.parametrize("page_size", [None, 7])
def test_kvcache_writes_nothing_out_of_bounds_where_no_number_may_be_read(page_size, backend, device, monkeypatch):
    """Tokens without a slot are dropped, and those of other sequences are written."""
    monkeypatch.setattr(on_torch, "is_eager_on_cpu", lambda tensor: False)
    problem = make_problem(Case(length=3, page_size=page_size), device)
    arguments = problem.arguments(gradients=False)
    room = 70
    held = torch.tensor([room - 1, 37, room + 50], dtype=torch.int32, device=device)
    before = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    fits = reference(**{**arguments, "cache_seqlens": torch.tensor([37, 37, 37], device=device)})
    monkeypatch.setattr(checks, "is_eager_on_cpu", lambda tensor: False)
    if page_size is not None:
        arguments["block_table"][2] = torch.tensor([900, -1] * 5)
    attention_with_kvcache(**{**arguments, "cache_seqlens": held}, backend=backend)
    for name in ("key_cache", "value_cache"):
        changed = (arguments[name].nan_to_num(7.5) != before[name].nan_to_num(7.5)).any(-1).any(1)
        assert changed.sum() == 3 + 1, "the second sequence has room for three tokens, the first for one"
        if page_size is None:
            torch.testing.assert_close(arguments[name][1], getattr(fits, name)[1], equal_nan=True)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("held", [3, torch.tensor([3, 1], dtype=torch.int32)], ids=["alike", "ragged"])
def test_kvcache_of_a_vmapped_call_takes_its_own_tokens(page_size, held):
    """Two samples of two sequences: a batch of two tokens can be mistaken for the two samples."""
    shape = (2, 2, 8) if page_size is None else (4, 2, page_size)
    words = {} if page_size is None else {"block_table": table([3, 0], [1, 2])}
    stacks = [
        random_tensor(2, *s, seed=i) for i, s in enumerate([(2, 4, 1, 8), *[(*shape, 8)] * 2, *[(2, 2, 1, 8)] * 2])
    ]
    copies = [stack.clone() for stack in stacks]
    found = torch.vmap(lambda *of_sample: attention_with_kvcache(*of_sample, cache_seqlens=held, **words))(*copies)
    for sample, output in enumerate(found):
        lengths = torch.as_tensor(held).expand(2)
        expected = reference(*(stack[sample] for stack in stacks), cache_seqlens=lengths, **words)
        torch.testing.assert_close(output, expected.output)
        torch.testing.assert_close(copies[1][sample], expected.key_cache, rtol=0, atol=0)
        torch.testing.assert_close(copies[2][sample], expected.value_cache, rtol=0, atol=0)


def test_kvcache_gradient_outlives_what_later_calls_write():
    """The backward of a step reads what the cache held then, not what was written behind it since."""
    problem = make_problem(Case(length=1))
    arguments = problem.arguments()
    output = attention_with_kvcache(**arguments)
    with torch.no_grad():
        attention_with_kvcache(**{**arguments, "cache_seqlens": arguments["cache_seqlens"] - 9})
    again = problem.arguments()
    expected = attention_with_kvcache(**again)
    for name in ("query", "key", "value"):
        found, wanted = (
            torch.autograd.grad(result.sum(), of[name], retain_graph=True)[0]
            for result, of in ((output, arguments), (expected, again))
        )
        torch.testing.assert_close(found, wanted)
    assert not arguments["key_cache"].requires_grad


@pytest.mark.parametrize("page_size", [None, 4])
def test_kvcache_derivatives_of_second_order_and_forward_mode(page_size):
    shape = (1, 1, 8) if page_size is None else (3, 1, page_size)
    caches = [random_tensor(*shape, 3, seed=i, dtype=torch.float64) for i in range(2)]
    words: dict[str, Any] = {"block_table": None if page_size is None else torch.tensor([[2, 0]], dtype=torch.int32)}
    leaves = [random_tensor(1, 1 + (i == 0), 2, 3, seed=5 + i, dtype=torch.float64).requires_grad_() for i in range(3)]

    def attend(query, key, value):
        copies = [cache.clone() for cache in caches]
        return attention_with_kvcache(query, *copies, key, value, cache_seqlens=5, **words)

    assert torch.autograd.gradcheck(attend, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_kvcache_of_gradients_reads_a_cache_that_is_not_written():
    query, cache = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8, requires_grad=True)
    attention_with_kvcache(query, cache, cache, cache_seqlens=4).sum().backward()
    assert cache.grad is not None and (cache.grad[:, :, :4] != 0).any() and (cache.grad[:, :, 4:] == 0).all()


@pytest.mark.parametrize("page_size", [None, 16])
def test_kvcache_in_a_compiled_graph(page_size, backend, device):
    problem = make_problem(Case(page_size=page_size, rotary="halves", length=3), device)
    compiled = torch.compile(attention_with_kvcache, backend="aot_eager", fullgraph=True)
    arguments = problem.arguments(gradients=False)
    expected = reference(**arguments)
    torch.testing.assert_close(compiled(**arguments, backend=backend), expected.output)
    torch.testing.assert_close(arguments["key_cache"], expected.key_cache, equal_nan=True)


def test_kvcache_repeats_a_call_by_the_short_way(device):
    """From the third call on; autograd is told each time that the caches have been written."""
    api._ARGUMENTS.clear()
    problem = make_problem(Case(held="ragged", page_size=16, length=3), device)
    for repetition in range(4):
        arguments, expected = problem.arguments(gradients=False), reference(**problem.arguments(gradients=False))
        versions = [arguments[name]._version for name in ("key_cache", "value_cache")]
        output = attention_with_kvcache(**arguments, backend="triton")
        torch.testing.assert_close(output, expected.output)
        torch.testing.assert_close(arguments["value_cache"], expected.value_cache, equal_nan=True, rtol=0, atol=0)
        assert [arguments[name]._version for name in ("key_cache", "value_cache")] == [v + 1 for v in versions]
        assert len(api._ARGUMENTS) == (repetition > 0)


def test_kvcache_on_kernels_refuses_gradients(device):
    arguments = make_problem(Case(), device).arguments()
    with pytest.raises(NotImplementedError, match=r"gradients are asked for \(query, key, value\)"):
        attention_with_kvcache(**arguments, backend="triton")


def test_kvcache_on_kernels_refuses_transforms():
    arguments = make_problem(Case(new=False)).arguments(gradients=False)
    query = arguments.pop("query")
    attend = functools.partial(attention_with_kvcache, **arguments, backend="triton")
    for transformed in (lambda: torch.vmap(attend)(query[None]), lambda: torch.func.jvp(attend, (query,), (query,))):
        with pytest.raises(NotImplementedError, match=r"under torch\.func or in forward mode"):
            transformed()


class _Layer(torch.nn.Module):
    """Its caches are buffers, which an exported program writes as the module does."""

    def __init__(self, page_size):
        super().__init__()
        shape = (2, 2, 16, 8) if page_size is None else (8, 2, page_size, 8)
        self.keys, self.values = torch.nn.Buffer(torch.zeros(shape)), torch.nn.Buffer(torch.zeros(shape))
        self.table = None if page_size is None else torch.nn.Buffer(torch.arange(8, dtype=torch.int32).view(2, 4))

    def forward(self, query, key, value, held):
        words = {"cache_seqlens": held, "block_table": self.table}
        return attention_with_kvcache(query, self.keys, self.values, key, value, **words)


@pytest.mark.parametrize("page_size", [None, 4])
def test_kvcache_in_an_exported_program(page_size):
    """It consists of torch's operators, and its buffers take the tokens of one step after the other."""
    query, key, value = (random_tensor(2, heads, 1, 8, seed=heads) for heads in (4, 2, 2))
    held = torch.tensor([3, 0], dtype=torch.int32)
    program = torch.export.export(_Layer(page_size), (query, key, value, held))
    assert all("fastattn" not in str(node.target) for node in program.graph.nodes)
    exported, layer = program.module(), _Layer(page_size)
    for step in range(3):
        expected = layer(query, key, value, held + step)
        torch.testing.assert_close(exported(query, key, value, held + step), expected)


def test_kvcache_is_explained():
    arguments = make_problem(Case(page_size=16)).arguments(gradients=False)
    explanation = fastattn.explain(fastattn.attention_with_kvcache, **arguments, backend="torch")
    assert explanation.backend == "torch" and "page" in explanation.path


# ----------------------------------------------------------------------------------------------------- what is refused


def table(*rows):
    return torch.tensor(rows, dtype=torch.int32)


with torch.inference_mode():
    INFERENCE = torch.randn(3, 2, 70, 16)

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query_3d": ({"query": torch.randn(3, 2, 16)}, ValueError, "query has shape (3, 2, 16): expected 4 dimensions"),
    "dtype": ({"key_cache": torch.randn(3, 2, 70, 16).half()}, TypeError, "key_cache is torch.float16 but query is"),
    "batch": ({"query": torch.randn(2, 2, 1, 16)}, ValueError, "the same batch size (dimension 0)"),
    "head_size": ({"query": torch.randn(3, 2, 1, 8)}, ValueError, "the same head size"),
    "heads": ({"query": torch.randn(3, 3, 1, 16)}, ValueError, "3 query heads to be a multiple of the 2 key heads"),
    "slots": ({"value_cache": torch.randn(3, 2, 69, 16)}, ValueError, "both caches to have the same batch, heads"),
    "only_key": ({"value": None}, TypeError, "value is None but key is given"),
    "length": ({"key": torch.randn(3, 2, 2, 16)}, ValueError, "key has shape (3, 2, 2, 16): expected (3, 2, 1, 16)"),
    "seqlens_dtype": ({"cache_seqlens": torch.zeros(3).long()}, TypeError, "cache_seqlens is torch.int64"),
    "seqlens_type": ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens: expected an int32 tensor, got float"),
    "seqlens_batch": ({"cache_seqlens": table(1, 2)}, ValueError, "cache_seqlens has shape (2,): expected [batch]"),
    "full": ({"cache_seqlens": table(3, 70, 2)}, ValueError, "cache_seqlens[1] is 70: expected 0 to 69"),
    "negative": ({"cache_seqlens": table(3, 4, -2)}, ValueError, "cache_seqlens[2] is -2"),
    "padding": ({"cache_leftpad": table(3, 99, 2)}, ValueError, "cache_leftpad[1] is 99: expected 0 to 38"),
    "only_cos": ({"rotary_cos": torch.randn(70, 4)}, TypeError, "rotary_sin is None but rotary_cos is given"),
    "wide": (
        {"rotary_cos": torch.randn(70, 9), "rotary_sin": torch.randn(70, 9)}, ValueError, "at most 8 pairs"),
    "positions": (
        {"rotary_cos": torch.randn(5, 4), "rotary_sin": torch.randn(5, 4)}, ValueError, "has 5 positions: expected at"),
    "turned": (
        {"rotary_cos": torch.randn(70, 4), "rotary_sin": torch.randn(70, 4), "key": None, "value": None}, ValueError,
        "rotary_cos is given without key"),
    "mask": ({"attn_mask": torch.zeros(3, 1, 1, 69)}, ValueError, "attn_mask has shape (3, 1, 1, 69)"),
    "lse": ({"return_lse": 1}, TypeError, "return_lse=1: expected True or False"),
    "causal": ({"is_causal": 1}, TypeError, "is_causal=1: expected True or False"),
    "window": ({"window": (-1, 2)}, ValueError, "window=(-1, 2)"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap=0.0"),
    "sinks": ({"sinks": torch.zeros(5)}, ValueError, "sinks has shape (5,)"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits=-1"),
    "splits_type": ({"num_splits": 1.5}, TypeError, "num_splits=1.5"),
    "gradient": ({"key_cache": torch.randn(3, 2, 70, 16, requires_grad=True)}, ValueError, "caches without gradients"),
    "page": ({"block_table": table([2, 1], [0, 2], [9, 1]), "cache_seqlens": 69}, ValueError, "block_table[2, 0] is 9"),
    "two_writers": (
        {"block_table": table([0], [1], [1])}, ValueError, "sequences 1 and 2 would both write into page 1"),
    "page_twice": (
        {"block_table": table([0, 0], [1, 2], [2, 1]), "cache_seqlens": 70}, ValueError,
        "block_table[0] holds page 0 twice"),
    "keys_of_one_row": ({"key_cache": torch.randn(1, 2, 70, 16).expand(3, 2, 70, 16)}, ValueError, "key_cache has str"),
    "values_of_one_head": (
        {"value_cache": torch.randn(3, 1, 70, 16).expand(3, 2, 70, 16)}, ValueError, "value_cache has strides"),
    "values_of_inference": ({"value_cache": INFERENCE}, ValueError, "value_cache was made under torch.inference_mode"),
    "seqlens_int": ({"cache_seqlens": 2**40}, ValueError, "cache_seqlens=1099511627776: expected 0 to 2147483647"),
    "angles_type": ({"rotary_cos": [1.0], "rotary_sin": [0.0]}, TypeError, "rotary_cos: expected a torch.Tensor"),
    "angles_0d": (
        {"rotary_cos": torch.tensor(1.0), "rotary_sin": torch.tensor(0.0)}, ValueError,
        "rotary_cos has shape (): expected [positions, pairs]"),
    "table_dtype": ({"block_table": torch.zeros(3, 2)}, TypeError, "block_table is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_kvcache_refuses(name):
    """The message names the argument, and nothing has been written."""
    change, error, message = REFUSED[name]
    arguments: dict[str, Any] = make_problem(Case()).arguments(gradients=False) | change
    before = [arguments[n].detach().clone() for n in ("key_cache", "value_cache")]
    with pytest.raises(error, match=re.escape(message)):
        attention_with_kvcache(**arguments)
    for name, cache in zip(("key_cache", "value_cache"), before):
        torch.testing.assert_close(arguments[name], cache, equal_nan=True)
