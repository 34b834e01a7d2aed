"""``@triton.jit`` functions as score_mod and mask_mod, on every backend and with gradients of what they load."""

from typing import Any

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.language.extra import libdevice

HALF = tl.constexpr(0.5)
WIDTH = 3
QUERY = random_tensor(2, 2, 6, 16, seed=1)


@triton.jit
def by_table(score, batch, head, query_index, key_index, table_ptr):
    """A table ``[H, 3]``, addressed by an offset."""
    return score + tl.load(table_ptr + head * WIDTH + key_index % WIDTH)


@triton.jit
def halved(x):
    return x * HALF


@triton.jit
def by_helper(score, batch, head, query_index, key_index, table_ptr):
    bent = libdevice.tanh(halved(score)) + tl.exp(-tl.abs(score))
    return bent * tl.load(table_ptr + head)


@triton.jit
def by_masked_loads(score, batch, head, query_index, key_index, table_ptr, count_ptr):
    """Reads behind the end of the table only where a mask forbids it."""
    place = key_index * 4 - 2
    inside = (place >= 0) & (place < tl.load(count_ptr))
    return score * tl.load(table_ptr + place, mask=inside, other=1.5)


@triton.jit
def rounding_towards_zero(score, batch, head, query_index, key_index):
    difference = query_index - key_index
    return score + difference // 2 + 0.25 * (difference % 3)


@triton.jit
def of_many_words(score, batch, head, query_index, key_index):
    near = tl.maximum(tl.minimum(key_index, 3), 1).to(tl.float32)
    bounded = tl.clamp(score, -0.5, 0.5) + tl.sqrt(near) - tl.fma(score, 0.5, 1.0) + tl.sigmoid(score)
    return tl.where(query_index >= key_index, bounded, score) + tl.log(tl.exp2(score)) + tl.floor(score) / 8


@triton.jit
def of_documents(batch, head, query_index, key_index, documents_ptr):
    row = documents_ptr + batch * 6
    return (tl.load(row + query_index) == tl.load(row + key_index)) | (key_index == 0)


def truncated(a, b):
    return torch.div(a, b, rounding_mode="trunc")


def in_words(s, b, h, q, k):
    bounded = s.clamp(-0.5, 0.5) + k.clamp(1, 3).sqrt() - (s * 0.5 + 1) + s.sigmoid()
    return torch.where(q >= k, bounded, s) + torch.exp2(s).log() + s.floor() / 8


TABLE, LONG = random_tensor(2, 3, seed=2), random_tensor(10, seed=3)
SCORES: dict[str, tuple[Any, Any, tuple[torch.Tensor, ...]]] = {
    "offsets": (by_table, lambda s, b, h, q, k, t: s + t[h, k % 3], (TABLE,)),
    "offsets_in_a_transposed_table": (by_table, lambda s, b, h, q, k, t: s + t[h, k % 3], (TABLE.T.contiguous().T,)),
    "helpers_and_constants": (
        by_helper, lambda s, b, h, q, k, t: (torch.tanh(s / 2) + torch.exp(-s.abs())) * t[h, 0], (TABLE[:, :1],)
    ),
    "masked_loads": (
        by_masked_loads,
        lambda s, b, h, q, k, t, n: s * torch.where((k * 4 >= 2) & (k * 4 < 12), t[(k * 4 - 2).clamp(0, 9)], 1.5),
        (LONG, torch.tensor(10)),
    ),
    "rounding_towards_zero": (
        rounding_towards_zero, lambda s, b, h, q, k: s + truncated(q - k, 2) + 0.25 * torch.fmod(q - k, 3), ()
    ),
    "many_words": (of_many_words, in_words, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_score_mod_of_triton_matches_reference(name, backend):
    function, form, tensors = SCORES[name]
    results = []
    for dtype in (torch.float32, torch.float64):
        query, *own = (t.to(dtype) if t.is_floating_point() else t for t in (QUERY, *tensors))
        leaves = [t.requires_grad_() for t in (query.detach(), *own) if t.is_floating_point()]
        floating = iter(leaves[1:])
        own = [next(floating) if t.is_floating_point() else t for t in own]
        if dtype == torch.float32:
            output = attend(*[leaves[0]] * 3, score_mod=(function, *own) if own else function, backend=backend)
        else:
            output = reference(*[leaves[0]] * 3, score_mod=lambda *a, own=own: form(*a, *own)).output
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for found, truth in zip(*results):
        torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4)


def test_mask_mod_of_triton_matches_reference(backend):
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    found = attend(QUERY, QUERY, QUERY, mask_mod=(of_documents, documents), backend=backend)
    truth = reference(
        *[QUERY.double()] * 3, mask_mod=lambda b, h, q, k: (documents[b, q] == documents[b, k]) | (k == 0)
    ).output
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@triton.jit
def of_an_unknown_word(score, batch, head, query_index, key_index):
    return score + tl.cumsum(score, 0)


@triton.jit
def of_the_program(score, batch, head, query_index, key_index):
    return score + tl.program_id(0)


@triton.jit
def of_a_number_for_a_pointer(score, batch, head, query_index, key_index):
    return score + tl.load(query_index)


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown word": (of_an_unknown_word, r"tl\.cumsum has no form in torch"),
    "the program": (of_the_program, r"tl\.program_id has no form in torch"),
    "no pointer": (of_a_number_for_a_pointer, r"tl\.load of something that is no pointer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_function_of_triton_is_refused_in_words(name, backend):
    function, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        attend(QUERY, QUERY, QUERY, score_mod=function, backend=backend)
