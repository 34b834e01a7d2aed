"""Dropout: how many weights it keeps, that the backward drops the same ones, and that a seed repeats it."""

import math

import pytest
import torch

from fastattn.ops._call import make_call
from tests.ops.attention_cases import attend, dropout_state, kept_weights


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should(dropout_p, backend, device):
    """Within six standard deviations of a binomial, over all weights and over each head's."""
    torch.manual_seed(0)
    query = torch.zeros(2, 3, 97, 130, device=device)[..., :8]
    key = torch.zeros(2, 3, 130, 8, device=device)
    call = make_call(query, key, key, dropout_p=dropout_p)
    keep = kept_weights(call, dropout_state(call, backend), backend)
    assert keep.dtype == torch.bool
    assert keep.shape == (2, 3, 97, 130)
    for part in (keep, *keep.flatten(0, 1), keep[..., ::2], keep[..., :1], keep[:, :, ::2]):
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / part.numel())
        assert abs(part.double().mean().item() - (1 - dropout_p)) < 6 * deviation


def test_dropout_draws_anew_for_every_head_row_and_call(backend, device):
    torch.manual_seed(0)
    query = torch.zeros(2, 2, 33, 16, device=device)
    call = make_call(query, query, query, dropout_p=0.5)
    first, second = (kept_weights(call, dropout_state(call, backend), backend) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first[0, 0], first[1, 0])
    assert len(first.flatten(0, 2).unique(dim=0)) == 2 * 2 * 33


def test_dropout_follows_torch_manual_seed(backend, device):
    query = torch.randn(1, 2, 33, 16, device=device)

    def run(seed):
        torch.manual_seed(seed)
        return attend(query, query, query, dropout_p=0.5, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("weights", ["average", "heads"])
def test_dropout_weights_are_those_that_made_the_output(weights, backend, device):
    """``weights @ value`` is the output: the second kernel that makes the weights drops what the first one dropped."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 1, n, 16, device=device) for n in (33, 70, 70))
    output, found = attend(
        query,
        key,
        value,
        dropout_p=0.5,
        need_weights=True,
        average_attn_weights=weights == "average",
        backend=backend,
    )
    found = found if weights == "heads" else found[:, None]  # one head is its own average
    torch.testing.assert_close(found @ value, output, rtol=1e-5, atol=1e-5)
    dropped = (found == 0).double().mean().item()
    assert abs(dropped - 0.5) < 6 * math.sqrt(0.25 / found.numel())


def test_dropout_of_everything_is_zero(backend, device):
    leaves = [torch.randn(1, 2, 5, 16, device=device, requires_grad=True) for _ in range(3)]
    output = attend(*leaves, dropout_p=1.0, backend=backend)
    assert not output.any()
    for gradient in torch.autograd.grad(output, leaves, torch.ones_like(output)):
        assert not gradient.any()


def test_dropout_of_nothing_draws_no_random_numbers(backend, device):
    query = torch.randn(1, 2, 5, 16, device=device)
    before = torch.get_rng_state()
    attend(query, query, query, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
