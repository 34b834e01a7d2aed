"""What may not be seen has no influence: rows without keys are zero, and NaN behind a mask stays there."""

import math
from typing import Any

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs, random_tensor
from tests.ops.attention_cases import attend

pytestmark = pytest.mark.usefixtures("poisoned")

B, H, L, S, D = 2, 2, 33, 70, 16


def masked_call(kind, hide, device):
    """Arguments that hide, by one kind of mask, what ``hide`` (boolean, broadcasting to [B, H, L, S]) says."""
    if kind == "bool":
        return {"attn_mask": ~hide.to(device)}
    if kind == "additive":
        return {"attn_mask": torch.zeros(hide.shape).masked_fill(hide, -math.inf).to(device)}
    assert kind == "padding"
    return {"key_padding_mask": hide.expand(B, 1, 1, hide.shape[-1])[:, 0, 0].contiguous().to(device)}


def with_gradients(qkv, backend, d_output, **arguments):
    """Output, weights, LSE, and the gradients of query, key and value of all three."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    results = attend(*leaves, **arguments, need_weights=True, return_lse=True, backend=backend)
    cotangents = [d_output, torch.ones_like(results[1]), torch.ones_like(results[2])]
    return (*results, *torch.autograd.grad(results, leaves, cotangents))


# ----------------------------------------------------------------------------------------------- rows that see nothing

ROWS_WITHOUT_KEYS = {
    "bool_rows": ("bool", torch.arange(L).view(1, 1, L, 1) % 3 == 0),
    "bool_one_pair_at_a_time": ("bool", (torch.arange(L) % 3 == 0).view(1, 1, L, 1).expand(1, 1, L, S)),
    "additive_rows": ("additive", (torch.arange(L) % 3 == 0).view(1, 1, L, 1).expand(1, 1, L, S)),
    "additive_broadcast_over_keys": ("additive", torch.arange(L).view(1, 1, L, 1) % 3 == 0),
    "one_head": ("bool", torch.tensor([True, False]).view(1, H, 1, 1)),
    "padding_of_a_whole_sequence": ("padding", torch.tensor([True, False]).view(B, 1, 1, 1).expand(B, 1, 1, S)),
}


def check_empty_rows(empty, backend, device, seed, **arguments):
    """``empty`` is boolean [B, H, L]: exactly those rows are zero, in the output and in every gradient."""
    seqlen_q = empty.shape[2]
    query, key, value = attention_inputs(B, H, seqlen_q, S, D, device=device, seed=seed)
    d_output = random_tensor(B, H, seqlen_q, D, seed=seed + 9, device=device)
    output, weights, lse, d_query, d_key, d_value = with_gradients(
        (query, key, value), backend, d_output, **arguments, average_attn_weights=False
    )
    empty = empty.to(device)
    assert empty.any()
    assert torch.equal(lse == -math.inf, empty)
    for name, tensor in (("output", output), ("weights", weights), ("d_query", d_query)):
        assert not tensor[empty].any(), f"{name} of a row that sees nothing is not zero"
    for name, tensor in (("output", output), ("weights", weights), ("lse", lse), ("d_query", d_query)):
        assert tensor[~empty].isfinite().all(), f"{name} of a row that sees something is not finite"
    for name, tensor in (("d_key", d_key), ("d_value", d_value)):
        assert tensor.isfinite().all(), f"{name} is not finite"

    # What those rows hold reaches no other gradient.
    query, d_output = query.clone(), d_output.clone()
    query[empty], d_output[empty] = 1e3, 1e3
    again = with_gradients((query, key, value), backend, d_output, **arguments, average_attn_weights=False)
    assert torch.equal(again[4], d_key)
    assert torch.equal(again[5], d_value)


@pytest.mark.parametrize("case", ROWS_WITHOUT_KEYS)
def test_attention_row_without_keys_is_zero(case, backend, device, seed):
    kind, hide = ROWS_WITHOUT_KEYS[case]
    empty = hide.expand(B, H, L, S).all(dim=-1)
    check_empty_rows(empty, backend, device, seed, **masked_call(kind, hide, device))


def test_attention_row_without_keys_is_zero_where_there_are_more_queries_than_keys(backend, device, seed):
    """Bottom-right: the first L - S queries come before every key."""
    seqlen_q = S + 20
    empty = (torch.arange(seqlen_q) < 20).expand(B, H, seqlen_q)
    check_empty_rows(empty, backend, device, seed, is_causal=True, causal_alignment="bottom_right")


def test_attention_row_without_keys_is_zero_where_masks_meet(backend, device, seed):
    """No mask alone hides a whole row: the causal one leaves key 0 to query 0, and that key is padding."""
    empty = (torch.arange(L) == 0).expand(B, H, L)
    padding = (torch.arange(S) == 0).expand(B, S).contiguous().to(device)
    check_empty_rows(empty, backend, device, seed, is_causal=True, key_padding_mask=padding)


# ---------------------------------------------------------------------------------------------- NaN behind the mask

GARBAGE = [math.nan, math.inf]
COLUMN = (torch.arange(S) % 5 == 2) | (torch.arange(S) > 50)
HIDDEN_KEYS = {
    "padding": ("padding", COLUMN.view(1, 1, 1, S)),
    "bool_broadcast_over_queries": ("bool", COLUMN.view(1, 1, 1, S)),
    "bool_column": ("bool", COLUMN.view(1, 1, 1, S).expand(1, 1, L, S)),
    "additive_broadcast_over_queries": ("additive", COLUMN.view(1, 1, 1, S)),
    "additive_column": ("additive", COLUMN.view(1, 1, 1, S).expand(B, 1, L, S)),
    "causal_future": (None, (torch.arange(S) >= L).view(1, 1, 1, S)),
}


@pytest.mark.parametrize("outputs", ["plain", "weights_and_lse"])
@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("case", HIDDEN_KEYS)
def test_attention_ignores_nan_in_hidden_keys(case, garbage, outputs, backend, device, seed):
    """What nobody may see may hold NaN (pytorch#101967): the results are those of zeros in its place."""
    kind, hide = HIDDEN_KEYS[case]
    arguments = {"is_causal": True} if kind is None else masked_call(kind, hide, device)
    query, key, value = attention_inputs(B, H, L, S, D, device=device, seed=seed)
    d_output = random_tensor(B, H, L, D, seed=seed + 9, device=device)
    column = hide.expand(B, H, hide.shape[2], S)[:, :, 0, :, None].to(device)

    def run(content):
        filled = [t.masked_fill(column, content) for t in (key, value)]
        if outputs == "weights_and_lse":
            return with_gradients((query, *filled), backend, d_output, **arguments)
        leaves = [t.requires_grad_() for t in (query.clone(), *filled)]
        output = attend(*leaves, **arguments, backend=backend)
        return (output, *torch.autograd.grad(output, leaves, d_output))

    for index, (clean, dirty) in enumerate(zip(run(0.0), run(garbage))):
        assert torch.equal(dirty.isfinite(), clean.isfinite()), f"{garbage} leaked into result {index}"
        torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_attention_nan_in_a_value_reaches_only_the_rows_that_see_it(kind, device, seed):
    """A key that some rows see holds NaN: those are NaN, the others right. The torch backend does not promise it."""
    pytest.importorskip("triton", reason="triton is not installed")
    query, key, value = attention_inputs(B, H, L, S, D, device=device, seed=seed)
    position = 20
    sees = torch.arange(L).view(1, 1, L, 1) >= position
    arguments: dict[str, Any] = {"is_causal": True}
    if kind != "causal":
        hide = (torch.arange(S) == position) & ~sees
        arguments = masked_call(kind, hide, device)
    spoiled = value.clone()
    spoiled[:, :, position] = math.nan
    output = attend(query, key, spoiled, **arguments, backend="triton")
    clean = attend(query, key, value, **arguments, backend="triton")
    rows = sees[0, 0, :, 0].to(device)
    assert output[:, :, rows].isnan().all()
    # the careful pass has tiles of its own, and so other roundings
    truth, peer = (attend(*(t.to(dtype) for t in (query, key, value)), **arguments, backend="torch")
                   for dtype in (torch.float64, torch.float32))  # fmt: skip
    assert_within_budget(output[:, :, ~rows], truth=truth[:, :, ~rows], peer=peer[:, :, ~rows], name="output")
    assert_within_budget(clean, truth=truth, peer=peer, name="output of clean values")


def test_attention_very_negative_additive_masks_keep_their_order(backend, device, seed):
    """finfo.min is not -inf: a row that holds nothing else still attends, evenly, as in eager PyTorch."""
    query, key, value = attention_inputs(B, H, L, S, D, device=device, seed=seed)
    bias = torch.full((1, 1, L, S), torch.finfo(torch.float32).min, device=device)
    output = attend(query, key, value, attn_mask=bias, backend=backend)
    truth = value.double().mean(dim=2, keepdim=True).expand(B, H, L, D)
    peer = reference(query, key, value, bias=bias).output
    assert_within_budget(output, truth=truth, peer=peer, name="output")
