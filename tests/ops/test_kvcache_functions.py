"""Functions on scores and masks over a key/value cache: indices are slots, in every layout and on every backend."""

from typing import Any

import pytest
import torch

import fastattn
from tests.ops.attention_cases import attend

over_cache: Any = fastattn.attention_with_kvcache  # what it returns depends on its arguments
BATCH, HEADS, KV_HEADS, SLOTS, LENGTH, SIZE = 3, 4, 2, 32, 3, 16
HELD = torch.tensor([10, 0, 20], dtype=torch.int32)


def table():
    return torch.linspace(-2, 2, BATCH * HEADS * 65).view(BATCH, HEADS, 65)


def score_mod(of):
    return lambda score, b, h, i, j: torch.tanh(score) * 2 + of[b, h, i - j + 32]


def mask_mod(batch, head, query_index, key_index):
    return (query_index + batch) % 5 != key_index % 4


FUNCTIONS: dict[str, dict[str, Any]] = {
    "score": {"score_mod": score_mod(table())},
    "mask": {"mask_mod": mask_mod},
    "both": {"score_mod": score_mod(table()), "mask_mod": mask_mod},
}


def tensors():
    torch.manual_seed(1)
    shape = BATCH, KV_HEADS, SLOTS, SIZE
    caches = torch.randn(shape), torch.randn(shape)
    new = torch.randn(BATCH, KV_HEADS, LENGTH, SIZE), torch.randn(BATCH, KV_HEADS, LENGTH, SIZE)
    return torch.randn(BATCH, HEADS, LENGTH, SIZE), *caches, *new


def of_each_sequence(functions, **words):
    """Each sequence by itself, in float64, whose function is told its batch entry and its first slot."""
    query, key_cache, value_cache, key, value = tensors()
    found = []
    for b, held in enumerate(HELD.tolist()):
        tokens = slice(0, held + LENGTH)
        for cache, new in ((key_cache, key), (value_cache, value)):
            cache[b, :, held : held + LENGTH] = new[b]
        own = {
            name: lambda *a, f=function, b=b, held=held: f(*a[:-4], a[-4] + b, a[-3], a[-2] + held, a[-1])
            for name, function in functions.items()
        }
        entry = [t[b : b + 1].double() for t in (query, key_cache[:, :, tokens], value_cache[:, :, tokens])]
        call = {"is_causal": True, "causal_alignment": "bottom_right", "backend": "torch", **own, **words}
        found.append(attend(*entry, **call))
    return torch.cat(found)


@pytest.mark.parametrize("words", [{}, {"window": (4, None), "softcap": 3.0}], ids=["plain", "window"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "pages"])
@pytest.mark.usefixtures("poisoned")
def test_functions_are_told_slots(functions, paged, words, backend):
    query, key_cache, value_cache, key, value = tensors()
    more: dict[str, Any] = {}
    if paged:
        pages = [c.view(BATCH, KV_HEADS, 4, 8, SIZE).transpose(1, 2).flatten(0, 1) for c in (key_cache, value_cache)]
        key_cache, value_cache = (p.contiguous() for p in pages)
        more["block_table"] = torch.arange(BATCH * 4, dtype=torch.int32).view(BATCH, 4)
    caches = key_cache, value_cache
    actual = over_cache(query, *caches, key, value, cache_seqlens=HELD, backend=backend, **functions, **words, **more)
    torch.testing.assert_close(actual.double(), of_each_sequence(functions, **words), rtol=0, atol=3e-6)


def test_gradients_of_what_is_captured_are_of_the_torch_backend():
    learned = table().requires_grad_()
    query, key_cache, value_cache, _, _ = tensors()

    def call(backend):
        return over_cache(
            query, key_cache, value_cache, cache_seqlens=12, score_mod=score_mod(learned), backend=backend
        )

    (gradient,) = torch.autograd.grad(call("torch").square().sum(), learned)
    assert gradient.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="gradients are asked for \\(a tensor that score_mod reads\\)"):
        call("triton")


def test_more_tensors_than_places_are_refused():
    many = [torch.randn(HEADS) for _ in range(25)]
    query, key_cache, value_cache, _, _ = tensors()
    with pytest.raises(NotImplementedError, match="read 25 tensors: expected at most 24"):
        over_cache(
            query, key_cache, value_cache, cache_seqlens=12, backend="triton",
            score_mod=lambda score, b, h, i, j: score + sum(t[h] for t in many),
        )  # fmt: skip
