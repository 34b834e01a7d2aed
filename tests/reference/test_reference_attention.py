"""The reference against PyTorch's math path, and against attention written once more, row by row."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastattn.reference import attention, visibility
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask, random_tensor

B, H, L, S, D = 2, 4, 5, 7, 3


def inputs(**options):
    return attention_inputs(B, H, L, S, D, dtype=torch.float64, seed=1, **options)


def row_by_row(
    query, key, value, *, bias=None, mask=None, padding=None, lower=None, upper=None, prefix=None, documents=None,
    slopes=None, shift=0, softcap=None, sinks=None,
):  # fmt: skip
    """Attention with Python's own numbers: nothing here is shared with the reference."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    bias = None if bias is None else bias.expand(full)
    mask = None if mask is None else mask.expand(full)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in full[:3])).tolist():
        scores = {}
        for j in range(key.shape[2]):
            hidden = (upper is not None and j > i + upper) or (lower is not None and j < i + lower)
            hidden = hidden and not (prefix is not None and j < prefix[b])
            hidden = hidden or (padding is not None and bool(padding[b, j]))
            hidden = hidden or (mask is not None and not mask[b, h, i, j])
            hidden = hidden or (documents is not None and bool(documents[0][b, i] != documents[1][b, j]))
            score = sum(x * y for x, y in zip(query[b, h, i].tolist(), key[b, h // groups, j].tolist()))
            score = score / math.sqrt(query.shape[3])
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            score += 0.0 if bias is None else bias[b, h, i, j].item()
            score -= 0.0 if slopes is None else slopes[b, h].item() * abs(i + shift - j)
            if not hidden and score != -math.inf:
                scores[j] = math.exp(score)
        total = sum(scores.values()) + (0.0 if sinks is None else math.exp(sinks[h]))
        if total:
            lse[b, h, i] = math.log(total)
            output[b, h, i] = sum(e / total * value[b, h // groups, j] for j, e in scores.items())
    return output, lse


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("diagonal", [None, 0, S - L, L - S])
@pytest.mark.parametrize("masks", ["none", "bool", "bias", "padding", "bool+padding", "bias+padding"])
def test_reference_is_attention_row_by_row(masks, diagonal, kv_heads):
    query, key, value = inputs(kv_heads=kv_heads)
    bias = attention_mask(B, H, L, S, dtype=torch.float64, seed=2) if "bias" in masks else None
    mask = attention_mask(B, H, L, S, broadcast="head", seed=2) if "bool" in masks else None
    padding = key_padding_mask(B, S, seed=3) if "padding" in masks else None
    found = attention(query, key, value, bias=bias, mask=mask, key_padding_mask=padding, upper=diagonal)
    output, lse = row_by_row(query, key, value, bias=bias, mask=mask, padding=padding, upper=diagonal)
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.lse, lse, rtol=1e-12, atol=1e-12)


# What rules the scores beyond masks, each with everything else and alone.
RULES: dict[str, dict[str, Any]] = {
    "window": {"lower": -2, "upper": 1},
    "window_bottom_right": {"lower": S - L - 1, "upper": S - L},
    "left_window": {"lower": -1},
    "prefix": {"upper": 0, "prefix": torch.tensor([3, 0])},
    "prefix_of_a_window": {"lower": 0, "upper": 1, "prefix": torch.tensor([1, 9])},
    "documents": {"documents": (torch.tensor([[0, 0, 1, 1, 2], [5, 5, 5, 3, 4]]), torch.arange(B * S).view(B, S) % 4)},
    "alibi": {"slopes": torch.tensor([[0.5, 0.25, -0.5, 0.0]] * 2, dtype=torch.float64), "shift": S - L},
    "softcap": {"softcap": 0.75},
    "sinks": {"sinks": [0.5, -3.0, 2.0, -math.inf]},
}
RULES["all"] = {name: value for rules in RULES.values() for name, value in rules.items()}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", RULES)
def test_reference_with_every_rule_is_attention_row_by_row(name, masked):
    query, key, value = inputs(kv_heads=2)
    bias = attention_mask(B, H, L, S, dtype=torch.float64, seed=2) if masked else None
    padding = key_padding_mask(B, S, seed=3) if masked else None
    rules = dict(RULES[name])
    output, lse = row_by_row(query, key, value, bias=bias, padding=padding, **rules)
    documents, sinks = rules.pop("documents", (None, None)), rules.pop("sinks", None)
    found = attention(
        query,
        key,
        value,
        bias=bias,
        key_padding_mask=padding,
        query_documents=documents[0],
        key_documents=documents[1],
        alibi_slopes=rules.pop("slopes", None),
        sinks=None if sinks is None else torch.tensor([sinks], dtype=torch.float64),
        **rules,
    )
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.lse, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_and_its_gradients_are_those_of_sdpa(is_causal):
    leaves = [t.requires_grad_() for t in inputs()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=is_causal)
    found = attention(*leaves, upper=0 if is_causal else None).output
    torch.testing.assert_close(found, expected)
    d_output = random_tensor(*found.shape, seed=4, dtype=torch.float64)
    for a, e in zip(torch.autograd.grad(found, leaves, d_output), torch.autograd.grad(expected, leaves, d_output)):
        torch.testing.assert_close(a, e)


def test_reference_gradcheck_with_rows_that_see_nothing():
    leaves = [t.requires_grad_() for t in attention_inputs(1, 2, 3, 3, 2, dtype=torch.float64, seed=1)]
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False

    def function(query, key, value):
        found = attention(query, key, value, mask=mask)
        assert not found.output[:, :, 1].any()
        return found.output, found.weights, found.lse[:, :, ::2]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_reference_dropout_keeps_and_divides():
    query, key, value = inputs()
    keep = random_tensor(B, H, L, S, seed=5) > 0
    plain = attention(query, key, value)
    dropped = attention(query, key, value, dropout_keep=keep, dropout_p=0.5)
    torch.testing.assert_close(dropped.weights, 2 * plain.weights * keep)
    torch.testing.assert_close(dropped.output, dropped.weights @ value)
    assert torch.equal(dropped.lse, plain.lse)


def test_reference_ignores_what_nobody_sees():
    query, key, value = inputs()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[:, 3] = True
    spoiled = [t.clone() for t in (key, value)]
    for t in spoiled:
        t[:, :, 3] = math.nan
    clean = attention(query, key, value, key_padding_mask=padding)
    found = attention(query, *spoiled, key_padding_mask=padding)
    for a, e in zip(found, clean):
        assert torch.equal(a, e)


def test_visibility_of_each_mask_and_of_all():
    assert visibility(3, 4).all()
    assert visibility(3, 4, upper=0).int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]]]
    assert visibility(3, 4, upper=1).int().tolist() == [[[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]]
    assert visibility(2, 1, upper=-1).int().tolist() == [[[[0], [1]]]]
    assert visibility(3, 4, lower=1).int().tolist() == [[[[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]]]
    assert visibility(2, 4, lower=0, upper=0).int().tolist() == [[[[1, 0, 0, 0], [0, 1, 0, 0]]]]
    kept = visibility(2, 4, lower=2, upper=2, prefix=torch.tensor([1, 0]))
    assert kept.int().tolist() == [[[[1, 0, 1, 0], [1, 0, 0, 1]]], [[[0, 0, 1, 0], [0, 0, 0, 1]]]]
    documents = {"query_documents": torch.tensor([[0, 7]]), "key_documents": torch.tensor([[7, 7, 0]])}
    assert visibility(2, 3, **documents).int().tolist() == [[[[0, 0, 1], [1, 1, 0]]]]
    padding = torch.tensor([[False, True], [True, True]])
    assert visibility(1, 2, key_padding_mask=padding).int().tolist() == [[[[1, 0]]], [[[0, 0]]]]
    mask = torch.tensor([[True, False], [True, True]])
    assert visibility(2, 2, mask=mask, upper=0).int().tolist() == [[[[1, 0], [1, 1]]]]
