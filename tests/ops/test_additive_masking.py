"""What additive attention does with what is hidden: NaN and inf stay where they are, empty rows are zero."""

import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.reference import additive_attention as reference
from fastattn.testing import random_tensor
from tests.ops.additive_cuts import cut_small

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.ops.additive_attention

pytestmark = pytest.mark.usefixtures("poisoned")
B, L, S, A, DV = 2, 20, 50, 3, 5


@pytest.fixture(params=["torch-formula", "torch-blocks", "triton-kernels"])
def backend(request, monkeypatch):
    """The torch backend in its two forms, and the kernels."""
    name, form = request.param.split("-")
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    if form == "blocks":
        cut_small(monkeypatch, 800)
    return name


def leaves(device):
    shapes = ((B, L, A), (B, S, A), (B, S, DV), (A,))
    return [random_tensor(*shape, seed=i, device=device).requires_grad_() for i, shape in enumerate(shapes)]


def hiding(how, device):
    """Arguments that hide keys from 35 on (20 where causal), and how many are seen."""
    mask = torch.ones(L, S, dtype=torch.bool, device=device)
    mask[:, 35:] = False
    padding = (~mask[:1]).expand(B, S)
    return {
        "mask": ({"attn_mask": mask}, 35),
        "bias": ({"attn_mask": torch.where(mask, 0.5, -math.inf)}, 35),
        "padding": ({"key_padding_mask": padding}, 35),
        "causal": ({"is_causal": True}, L),
    }[how]


# The last is finite, and its product with a gradient is not
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("how", ["mask", "bias", "padding", "causal"])
def test_additive_hidden_values_do_not_leak(how, bad, backend, device):
    arguments, seen = hiding(how, device)
    tensors = leaves(device)

    def results(tensors):
        output, weights = attend(*tensors, **arguments, need_weights=True, backend=backend)
        return output, weights, *torch.autograd.grad(20 * output.square().sum() + weights.square().sum(), tensors)

    expected = results(tensors)
    spoilt = [t.detach().clone() for t in tensors]
    spoilt[1][:, seen:] = 0.0 if math.isfinite(bad) else bad
    spoilt[2][:, seen:] = bad
    found = results([t.requires_grad_() for t in spoilt])
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [False, True], ids=["formula", "blocks"])
def test_additive_bias_is_what_it_is_in_the_dtype_of_the_scores(blocks, monkeypatch, device):
    """A float64 bias of -1e300 is -inf in float32: it hides keys, and a row of it is zero and not NaN."""
    if blocks:
        cut_small(monkeypatch, 800)
    bias = torch.zeros(L, S, dtype=torch.float64, device=device)
    bias[3] = -1e300
    bias[:, 35:] = -1e300
    tensors = leaves(device)

    def results(function, bias):
        output, weights = function(bias)
        return output, weights, *torch.autograd.grad(output.square().sum() + weights.square().sum(), tensors)

    def defined(bias):
        query, key, value, weight = tensors
        found = reference(query[:, None], key[:, None], value[:, None], weight[None], bias=bias)
        return found.output[:, 0], found.weights[:, 0]

    def ours(bias):
        return attend(*tensors, attn_mask=bias, need_weights=True, backend="torch")

    expected = results(ours, torch.where(bias == 0, 0.0, -math.inf))
    assert not expected[0][:, 3].any()
    for function in (ours, defined):
        for actual, wanted in zip(results(function, bias), expected):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_additive_visible_nan_shows(which, backend, device):
    """And nowhere else: row 3 of the queries, or every row that sees key 30. Of a value torch's products, which know
    0 * NaN, may take it to rows that do not."""
    tensors = [t.detach() for t in leaves(device)]
    mask = torch.ones(L, S, dtype=torch.bool, device=device)
    mask[:10, 30] = False
    tensors[which][0, 3 if which == 0 else 30] = math.nan
    output = attend(*tensors, attn_mask=mask, backend=backend)
    spoilt = torch.zeros(B, L, dtype=torch.bool, device=device)
    spoilt[0, 3 if which == 0 else slice(10, None)] = True
    found = output.isnan().any(-1)
    assert found[spoilt].all()
    if (which, backend) != (2, "torch"):
        assert not found[~spoilt].any()


@pytest.mark.parametrize("how", ["mask", "bias", "padding"])
def test_additive_rows_without_keys_are_zero(how, backend, device):
    mask = torch.ones(B, L, S, dtype=torch.bool, device=device)
    if how == "padding":
        mask[1] = False
        arguments = {"key_padding_mask": ~mask[:, 0]}
    else:
        mask[:, 7:9] = False
        arguments = {"attn_mask": mask if how == "mask" else torch.where(mask, 0.0, -math.inf)}
    tensors = leaves(device)
    output, weights = attend(*tensors, **arguments, need_weights=True, backend=backend)
    d_query, *others = torch.autograd.grad(output.square().sum() + weights.square().sum(), tensors)
    empty = ~mask.any(-1)
    assert empty.any()
    for tensor in (output, weights, d_query):
        assert not tensor[empty].any()
        assert tensor[~empty].any()
    assert all(g.isfinite().all() for g in others)


def test_additive_masks_broadcast_as_the_scores_do(backend, device):
    """A mask of three dimensions is ``[B, L, S]`` in a call without heads, ``[H, L, S]`` in one with them."""
    query, key, value, weight = (t.detach() for t in leaves(device))
    mask = torch.rand(B, L, S, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    whole = attend(query, key, value, weight, attn_mask=mask, backend=backend)
    for entry in range(B):
        alone = slice(entry, entry + 1)
        one = attend(query[alone], key[alone], value[alone], weight, attn_mask=mask[entry], backend=backend)
        torch.testing.assert_close(whole[alone], one)
    headed = attend(query[None], key[None], value[None], weight, attn_mask=mask, backend=backend)
    torch.testing.assert_close(headed[0], whole)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e37], ids=str)
@pytest.mark.parametrize("how", ["mask", "bias", "causal_bias", "padding"])
def test_additive_garbage_in_hidden_places_reaches_nothing(how, garbage, backend, device):
    """Queries that see nothing, keys and values that nobody sees, biases of hidden pairs, and the gradients that come
    in for such rows and pairs: results and gradients are those of the call without the garbage."""
    visible = torch.ones(B, L, S, dtype=torch.bool, device=device)
    bias = random_tensor(L, S, seed=7, device=device)
    if how == "causal_bias":
        visible = visible.tril()
    elif how == "padding":
        visible[0], visible[1, :, 20:] = False, False
    else:
        visible[:, 3], visible[:, :, 7:9] = False, False
    blind, unseen = ~visible.any(dim=2)[..., None], ~visible.any(dim=1)[..., None]

    def run(content):
        def spoil(tensor, place):
            return tensor if content is None else tensor.masked_fill(place, content)

        query, key, value, weight = (t.detach() for t in leaves(device))
        own = [spoil(query, blind), spoil(key, unseen), spoil(value, unseen), weight]
        if how == "mask":
            arguments: dict[str, Any] = {"attn_mask": visible[0]}
        elif how == "padding":
            arguments = {"key_padding_mask": ~visible[:, 0]}
        else:
            hidden = bias.masked_fill(~visible[0], -math.inf) if how == "bias" else spoil(bias, ~visible[0])
            own.append(hidden)
            arguments = {"attn_mask": hidden.requires_grad_(), "is_causal": how == "causal_bias"}
        own = [t.requires_grad_() for t in own]
        results = attend(*own[:4], **arguments, need_weights=True, backend=backend)
        d_output, d_weights = (random_tensor(*r.shape, seed=8, device=device) for r in results)
        cotangents = [spoil(d_output, blind), spoil(d_weights, ~visible)]
        return [*results, *torch.autograd.grad(results, own, cotangents)]

    for index, (dirty, clean) in enumerate(zip(run(garbage), run(None))):
        torch.testing.assert_close(dirty, clean, rtol=1e-4, atol=1e-5, msg=lambda m, i=index: f"result {i}: {m}")
