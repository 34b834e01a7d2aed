"""Calls with functions by the short way: to the bit what they are by the long way, and nothing of an old call."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention import api
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend


@pytest.fixture(autouse=True)
def _cleared():
    api._MODIFIED.clear()
    yield
    api._MODIFIED.clear()


class Call:
    """A call and its gradients; ``seed`` draws other numbers."""

    def __init__(self, seed: int, device: torch.device, **words: Any) -> None:
        self.words = words
        self.leaves = [random_tensor(1, 2, 20, 8, seed=seed + n, device=device).requires_grad_() for n in range(3)]
        self.table = random_tensor(2, 33, seed=seed + 3, device=device).requires_grad_()
        self.factor = random_tensor(seed=seed + 4, device=device).requires_grad_()

    def results(self) -> list[torch.Tensor]:
        """Results, then gradients."""
        found = attend(
            *self.leaves, score_mod=self.score_mod, mask_mod=lambda b, h, i, j: i >= j, backend="triton", **self.words
        )  # fmt: skip
        results = found if isinstance(found, tuple) else (found,)
        loss = torch.stack([result.square().sum() for result in results]).sum()
        return [*results, *torch.autograd.grad(loss, (*self.leaves, self.table, self.factor))]

    def score_mod(self, score, batch, head, query_index, key_index):
        return torch.tanh(score * self.factor) + self.table[head, (query_index - key_index).clamp(-16, 16) + 16]


@pytest.mark.parametrize("words", [{}, {"need_weights": True, "return_lse": True}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_repeated_calls_have_the_bits_of_first_ones(words, device):
    for seed in range(3):
        call = Call(10 * seed, device, **words)
        torch.manual_seed(seed)
        found = call.results()
        known = len(api._MODIFIED)
        with fastattn.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            torch.manual_seed(seed)
            expected = call.results()  # which hooks keep on the long way
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert known == 1


def test_evaluation_and_derivatives_of_higher_order_follow(device):
    call = Call(1, device)
    for _ in range(3):
        call.results()
    output = attend(*call.leaves, score_mod=call.score_mod, backend="triton")
    (first,) = torch.autograd.grad(output.square().sum(), call.factor, create_graph=True)
    (second,) = torch.autograd.grad(first, call.table)
    with fastattn.use_backend("torch"):
        output = attend(*call.leaves, score_mod=call.score_mod)
        (first,) = torch.autograd.grad(output.square().sum(), call.factor, create_graph=True)
        (expected,) = torch.autograd.grad(first, call.table)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)
