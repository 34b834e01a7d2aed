"""Functions on scores and masks under torch.compile: one graph, the numbers of eager mode, and no compiling anew."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import fastattn

HEADS, SIZE = 2, 8


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(length=9, batch=2):
    torch.manual_seed(length)
    return [torch.randn(batch, HEADS, length, SIZE, requires_grad=True) for _ in range(3)]


def learned(*sizes):
    torch.manual_seed(sum(sizes))
    return torch.randn(sizes, requires_grad=True)


TABLE, FACTOR = learned(HEADS, 33), learned()


def of_module_level(score, batch, head, query_index, key_index):
    return torch.tanh(score * FACTOR) + TABLE[head, query_index - key_index]


def causal(batch, head, query_index, key_index):
    return query_index >= key_index


def with_globals(query, key, value, backend):
    return fastattn.attention(query, key, value, score_mod=of_module_level, mask_mod=causal, backend=backend)


def with_closure_over_values(query, key, value, backend):
    bias = (TABLE @ TABLE.mT)[:, :, None] * FACTOR * 0.02  # made inside, of tensors that are learned

    def score_mod(score, batch, head, query_index, key_index):
        return score + bias[head, head, 0] * query_index

    output, lse = fastattn.attention(query, key, value, score_mod=score_mod, return_lse=True, backend=backend)
    return output * lse[..., None]


def with_numbers(query, key, value, backend):
    width, shares = 3, query.shape[1]
    return fastattn.attention(
        query, key, value, score_mod=lambda score, b, h, i, j: score * (h + 1) / shares,
        mask_mod=lambda b, h, i, j: (i - j).abs() <= width, need_weights=True, backend=backend,
    )[1]  # fmt: skip


def with_partial(query, key, value, backend):
    def score_mod(score, batch, head, query_index, key_index, *, table, cap):
        return cap * torch.tanh(score / cap) + table[head, key_index]

    chosen = functools.partial(score_mod, table=TABLE.exp(), cap=2.0)
    return fastattn.attention(query, key, value, score_mod=chosen, is_causal=True, backend=backend)


def with_tensors_behind_the_function(query, key, value, backend):
    def score_mod(score, batch, head, query_index, key_index, table, factor):
        return score * factor + table[head][key_index]

    return fastattn.attention(query, key, value, score_mod=(score_mod, TABLE, FACTOR), backend=backend)


def checkpointed(query, key, value, backend):
    return checkpoint(with_globals, query, key, value, backend, use_reentrant=False)


def packed(query, key, value, backend):
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return fastattn.attention_varlen(
        query, key, value, offsets, is_causal=True, score_mod=of_module_level, backend=backend
    )


CALLS = [
    with_globals, with_closure_over_values, with_numbers, with_partial, with_tensors_behind_the_function, checkpointed,
    packed,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_one_graph_has_the_results_and_gradients_of_eager_mode(call, backend):
    given = inputs()
    leaves = (*given, TABLE, FACTOR)
    expected = call(*given, backend)
    actual = torch.compile(call, backend="aot_eager", fullgraph=True)(*given, backend)
    torch.testing.assert_close(actual, expected)
    of_both = [torch.autograd.grad(t.square().sum(), leaves, allow_unused=True) for t in (actual, expected)]
    for leaf, one, other in zip(leaves, *of_both):
        one, other = (torch.zeros_like(leaf) if g is None else g for g in (one, other))  # a graph makes zeros of None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class _Relative(nn.Module):
    """Attention whose method is the function."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 33).repeat(HEADS, 1))
        self.slope = 0.5

    def score_mod(self, score, batch, head, query_index, key_index):
        return score + self.slope * self.table[head, query_index - key_index]

    def forward(self, query, key, value):
        return fastattn.attention(query, key, value, score_mod=self.score_mod)


def test_method_of_a_module_through_inductor():
    module, given = _Relative(), inputs()
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        expected, actual = module(*given), compiled(*given)
        torch.testing.assert_close(actual, expected)
        of_both = [torch.autograd.grad(t.sum(), (module.table, *given)) for t in (actual, expected)]
        for one, other in zip(*of_both):
            torch.testing.assert_close(one, other)
        module.slope = 2.0  # another number is another program


def test_other_lengths_compile_nothing_anew(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(with_globals, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for length in (9, 12, 7, 15):
        query, key, value = inputs(length)
        expected = with_globals(query, key, value, backend)
        torch.testing.assert_close(compiled(query, key, value, backend), expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_block_mask_is_read_inside_a_graph():
    given = inputs(150, batch=1)
    mask = create_block_mask(causal, None, None, 150, 150, device="cpu")
    compiled = torch.compile(fastattn.flex_attention, backend="aot_eager", fullgraph=True)
    expected = fastattn.attention(*given, score_mod=of_longer, is_causal=True)
    torch.testing.assert_close(compiled(*given, score_mod=of_longer, block_mask=mask), expected)


def of_longer(score, batch, head, query_index, key_index):
    return score + TABLE[head, (query_index - key_index).clamp(0, 31)]


@torch.no_grad()  # the kernels over a cache have no gradients
def test_cache_is_written_and_read_inside_a_graph(backend):
    def step(query, key_cache, value_cache, key, value, held):
        return fastattn.attention_with_kvcache(
            query, key_cache, value_cache, key, value, cache_seqlens=held, score_mod=of_longer, backend=backend
        )

    query, key, value = (t.detach()[:, :, :1] for t in inputs())
    held = torch.tensor([3, 5], dtype=torch.int32)
    caches = [torch.randn(2, HEADS, 16, SIZE) for _ in range(2)]
    keys, values = (cache.clone() for cache in caches)
    expected = step(query, keys, values, key, value, held)
    keys, values = caches
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(query, keys, values, key, value, held)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(keys[0, :, 3], key[0, :, 0])


def test_what_is_not_understood_is_named(backend):
    def score_mod(score, batch, head, query_index, key_index):
        return score + torch.special.bessel_j0(score)

    def call(query, key, value):
        return fastattn.attention(query, key, value, score_mod=score_mod, backend=backend)

    with pytest.raises(Exception, match="bessel_j0"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs())


def test_exported_graph_has_the_formula():
    class Attend(nn.Module):
        def forward(self, query, key, value):
            return fastattn.attention(query, key, value, score_mod=of_longer, mask_mod=causal)

    given = tuple(t.detach() for t in inputs())
    program = torch.export.export(Attend(), given, strict=False)
    torch.testing.assert_close(program.module()(*given), Attend()(*given))
    assert not any("fastattn" in str(node.target) for node in program.graph.nodes)
