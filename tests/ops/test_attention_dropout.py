"""Dropout: how many weights it keeps, that the backward drops the same ones, and that a seed repeats it."""

import math

import pytest
import torch

from fastattn.ops.attention import dropout
from fastattn.ops.attention.call import make_call
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


def test_dropout_of_kernels_depends_on_seed_and_offset(device):
    """Were one of the two left out, all kernels would still agree, on fewer ways to draw."""
    pytest.importorskip("triton", reason="triton is not installed")
    query = torch.zeros(1, 1, 33, 16, device=device)
    call = make_call(query, query, query, dropout_p=0.5)
    state = torch.tensor([3, 4], device=device)
    drawn = kept_weights(call, state, "triton")
    for one_more in ([1, 0], [0, 1]):
        assert not torch.equal(kept_weights(call, state + torch.tensor(one_more, device=device), "triton"), drawn)


def test_dropout_follows_torch_manual_seed(backend, device):
    query = torch.randn(1, 2, 33, 16, device=device)

    def run(seed):
        torch.manual_seed(seed)
        return attend(query, query, query, dropout_p=0.5, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("length", [6, 40, 300])
@pytest.mark.parametrize("rule", ["causal", "padding", "mask", "bias"])
def test_dropout_keeps_to_the_masks(rule, length, backend, device):
    """The output of values that are the unit vectors is the weights after dropout: 0 where the mask hides, and else 0
    or more than the weight itself, in calls of every size, without weights to return."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, length, 8, device=device) for _ in range(2))
    value = torch.eye(length, device=device).expand(1, 2, length, length)
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if rule == "causal":
        arguments, visible = {"is_causal": True}, visible.tril()
    elif rule == "padding":
        visible[:, length // 2 :] = False
        arguments = {"key_padding_mask": ~visible[:1]}
    else:
        visible[::2, 1:] = False
        bias = torch.zeros(length, length, device=device).masked_fill(~visible, -math.inf)
        arguments = {"attn_mask": visible if rule == "mask" else bias}
    output = attend(query, key, value, **arguments, dropout_p=0.5, backend=backend)
    plain = attend(query, key, value, **arguments, backend=backend)
    assert not output[:, :, ~visible].any()
    kept = output != 0
    torch.testing.assert_close(output[kept], 2 * plain[kept], rtol=1e-4, atol=1e-6)
    share = kept[:, :, visible].double().mean().item()
    assert abs(share - 0.5) < 6 * math.sqrt(0.25 / (2 * visible.sum().item()))


def test_dropout_of_a_large_call_is_drawn_again_from_a_seed(device, monkeypatch):
    """On the torch backend a call with many weights keeps a seed in the place of the kept weights. Whichever part of
    the weights is asked for, it is a part of the same draw, and forward and backward agree on it."""
    seed = torch.tensor([7], device=device)
    whole = dropout.kept(seed, 0.3, 2, slice(0, 3), slice(0, 600), slice(0, 700))
    assert abs(whole.double().mean().item() - 0.7) < 6 * math.sqrt(0.21 / whole.numel())
    assert whole.flatten(0, 2).unique(dim=0).shape[0] == 3 * 2 * 600
    for rows, keys in (
        (slice(0, 1), slice(0, 700)),
        (slice(250, 261), slice(255, 513)),
        (slice(512, 600), slice(5, 6)),
    ):
        part = dropout.kept(seed, 0.3, 2, slice(1, 3), rows, keys)
        assert torch.equal(part, whole[1:3, :, rows, keys])
    assert not torch.equal(dropout.kept(seed + 1, 0.3, 2, slice(0, 3), slice(0, 600), slice(0, 700)), whole)

    monkeypatch.setattr(dropout, "MOST_DRAWN_WHOLE", 0)
    leaves = [torch.randn(1, 2, 300, 16, device=device, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(*tensors) -> torch.Tensor:
        torch.manual_seed(3)
        return attend(*tensors, is_causal=True, dropout_p=0.5, return_lse=True, backend="torch")[0]

    cotangent = torch.randn(1, 2, 300, 16, dtype=torch.float64)
    gradients = torch.autograd.grad(run(*leaves), leaves, cotangent, create_graph=True)
    direction = [torch.randn_like(t) for t in leaves]
    step = 1e-6
    above, below = (run(*(t + sign * step * d for t, d in zip(leaves, direction))) for sign in (1, -1))
    slope = ((above - below) / (2 * step) * cotangent).sum()
    torch.testing.assert_close(sum((g * d).sum() for g, d in zip(gradients, direction)), slope, rtol=1e-6, atol=1e-6)
    torch.manual_seed(3)
    tangent = torch.func.jvp(lambda *t: run(*t), tuple(leaves), tuple(direction))[1]
    torch.testing.assert_close((tangent * cotangent).sum(), slope, rtol=1e-6, atol=1e-6)


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
