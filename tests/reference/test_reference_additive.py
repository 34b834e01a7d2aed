"""The reference of additive attention against the same, written once more, pair by pair."""

import math

import pytest
import torch

from fastattn.reference import additive_attention
from fastattn.testing import attention_mask, key_padding_mask, random_tensor

B, H, L, S, A, DV = 2, 3, 5, 7, 4, 2


def inputs(**options):
    shapes = ((B, H, L, A), (B, H, S, A), (B, H, S, DV), (H, A))
    return [random_tensor(*s, seed=i, dtype=torch.float64, **options) for i, s in enumerate(shapes)]


def pair_by_pair(query, key, value, weight, *, bias=None, mask=None, padding=None, upper=None):
    """Python's own numbers: nothing here is shared with the reference."""
    output = torch.zeros(B, H, L, DV, dtype=torch.float64)
    weights = torch.zeros(B, H, L, S, dtype=torch.float64)
    bias = None if bias is None else bias.expand(B, H, L, S)
    mask = None if mask is None else mask.expand(B, H, L, S)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, L))).tolist():
        terms = {}
        for j in range(S):
            columns = zip(weight[h % weight.shape[0]].tolist(), query[b, h, i].tolist(), key[b, h, j].tolist())
            score = sum(w * math.tanh(x + y) for w, x, y in columns)
            score += 0.0 if bias is None else bias[b, h, i, j].item()
            hidden = (upper is not None and j > i + upper) or (padding is not None and bool(padding[b, j]))
            hidden = hidden or (mask is not None and not mask[b, h, i, j])
            if not hidden and score != -math.inf:
                terms[j] = math.exp(score)
        for j, term in terms.items():
            weights[b, h, i, j] = term / sum(terms.values())
            output[b, h, i] += weights[b, h, i, j] * value[b, h, j]
    return output, weights


@pytest.mark.parametrize("upper", [None, 0, -2, S - L])
@pytest.mark.parametrize("masks", ["none", "bool", "bias", "padding", "bool+padding", "bias+padding"])
def test_additive_reference_is_the_formula_pair_by_pair(masks, upper):
    tensors = inputs()
    bias = attention_mask(B, H, L, S, dtype=torch.float64, seed=2) if "bias" in masks else None
    mask = attention_mask(B, H, L, S, broadcast="head", seed=2) if "bool" in masks else None
    padding = key_padding_mask(B, S, seed=3) if "padding" in masks else None
    found = additive_attention(*tensors, bias=bias, mask=mask, key_padding_mask=padding, upper=upper)
    expected = pair_by_pair(*tensors, bias=bias, mask=mask, padding=padding, upper=upper)
    for actual, truth in zip(found, expected):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_additive_reference_shares_one_weight_among_heads():
    query, key, value, weight = inputs()
    found = additive_attention(query, key, value, weight[:1])
    torch.testing.assert_close(found.output, pair_by_pair(query, key, value, weight[:1])[0], rtol=1e-12, atol=1e-12)


def test_additive_reference_ignores_what_nobody_sees():
    query, key, value, weight = inputs()
    mask = torch.ones(S, dtype=torch.bool)
    mask[3] = False
    expected = additive_attention(query, key, value, weight, mask=mask)
    key[:, :, 3], value[:, :, 3] = math.nan, math.inf
    leaves = [t.requires_grad_() for t in (query, key, value, weight)]
    found = additive_attention(*leaves, mask=mask)
    assert torch.equal(found.output, expected.output)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.output.sum(), leaves))


def test_additive_reference_row_that_sees_nothing_is_zero_with_its_gradients():
    leaves = [t.requires_grad_() for t in inputs()]
    mask = torch.ones(L, S, dtype=torch.bool)
    mask[2] = False
    found = additive_attention(*leaves, mask=mask)
    assert not found.output[:, :, 2].any()
    assert not found.weights[:, :, 2].any()
    d_query, *others = torch.autograd.grad(found.output.square().sum(), leaves)
    assert not d_query[:, :, 2].any()
    assert d_query[:, :, 1].all()
    assert all(g.isfinite().all() for g in others)


def test_additive_reference_is_twice_differentiable():
    leaves = [t[:1, :1, :2].requires_grad_() if t.dim() == 4 else t[:1].requires_grad_() for t in inputs()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: tuple(additive_attention(*t, upper=0)), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: tuple(additive_attention(*t, upper=0)), leaves)
