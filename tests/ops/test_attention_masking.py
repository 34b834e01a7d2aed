"""What may not be seen has no influence: rows without keys are zero, and NaN behind a mask stays there."""

import math
from typing import Any

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import alibi_slopes, assert_within_budget, attention_inputs, attention_sinks, random_tensor
from tests.ops.attention_cases import attend

pytestmark = pytest.mark.usefixtures("poisoned")

B, H, L, S, D = 2, 2, 33, 70, 16


def masked_call(kind, hide, device):
    """Arguments that hide, by one kind of mask, what ``hide`` (boolean, broadcasting to [B, H, L, S]) says; documents
    hide whole rows or whole keys."""
    if kind == "bool":
        return {"attn_mask": ~hide.to(device)}
    if kind == "additive":
        return {"attn_mask": torch.zeros(hide.shape).masked_fill(hide, -math.inf).to(device)}
    if kind == "documents":
        hide = hide.expand(hide.shape[0], 1, L, S)[:, 0]
        rows, keys = hide.all(dim=2), hide.all(dim=1)
        return {"document_ids": (torch.where(rows, -1, 5).to(device), torch.where(keys, 9, 5).to(device))}
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
    "documents_without_keys": ("documents", (torch.arange(L) % 3 == 0).view(1, 1, L, 1).expand(1, 1, L, S)),
}


def check_empty_rows(empty, backend, device, seed, **arguments):
    """``empty`` is boolean [B, H, L]: exactly those rows are zero, in the output and in every gradient; their LSE is
    their sink, if any."""
    seqlen_q = empty.shape[2]
    query, key, value = attention_inputs(B, H, seqlen_q, S, D, device=device, seed=seed)
    d_output = random_tensor(B, H, seqlen_q, D, seed=seed + 9, device=device)
    output, weights, lse, d_query, d_key, d_value = with_gradients(
        (query, key, value), backend, d_output, **arguments, average_attn_weights=False
    )
    empty = empty.to(device)
    assert empty.any()
    if (sinks := arguments.get("sinks")) is None:
        assert torch.equal(lse == -math.inf, empty)
    else:
        torch.testing.assert_close(lse[empty], sinks[None, :, None].expand(lse.shape)[empty])
        assert lse.isfinite().all()
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


@pytest.mark.parametrize("case", ["bool_rows", "additive_rows", "documents_without_keys"])
def test_attention_row_without_keys_has_its_sink_alone(case, backend, device, seed):
    kind, hide = ROWS_WITHOUT_KEYS[case]
    empty = hide.expand(B, H, L, S).all(dim=-1)
    sinks = torch.tensor([0.7, -2.5], device=device)
    check_empty_rows(empty, backend, device, seed, **masked_call(kind, hide, device), sinks=sinks)


def test_attention_grad_of_sinks_of_rows_without_keys(backend, device, seed):
    """A row that sees nothing has its sink for LSE, so the sink's gradient there is that of the LSE, and no more."""
    query, key, value = attention_inputs(B, H, L, S, D, device=device, seed=seed)
    sinks = torch.tensor([0.7, -math.inf], device=device, requires_grad=True)
    mask = torch.zeros(L, S, dtype=torch.bool, device=device)
    output, lse = attend(query, key, value, attn_mask=mask, sinks=sinks, return_lse=True, backend=backend)
    assert not output.any()
    assert (lse[:, 1] == -math.inf).all()  # a sink of -inf is none
    d_lse = random_tensor(B, H, L, seed=seed + 9, device=device)
    (d_sinks,) = torch.autograd.grad([output, lse], sinks, [torch.ones_like(output), d_lse])
    torch.testing.assert_close(d_sinks[0], d_lse[:, 0].sum())
    assert d_sinks[1] == 0


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_attention_row_without_keys_is_zero_where_the_window_has_left_the_keys(alignment, backend, device, seed):
    """Top-left, the last queries stand behind every key; bottom-right, the first ones before every key."""
    seqlen_q = S + 20
    position = torch.arange(seqlen_q) - (0 if alignment == "top_left" else 20)
    empty = ((position - 5 >= S) | (position + 3 < 0)).expand(B, H, seqlen_q)
    check_empty_rows(empty, backend, device, seed, window=(5, 3), causal_alignment=alignment)


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

COLUMN = (torch.arange(S) % 5 == 2) | (torch.arange(S) > 50)
HIDDEN_KEYS = {
    "padding": ("padding", COLUMN.view(1, 1, 1, S)),
    "bool_broadcast_over_queries": ("bool", COLUMN.view(1, 1, 1, S)),
    "bool_column": ("bool", COLUMN.view(1, 1, 1, S).expand(1, 1, L, S)),
    "additive_broadcast_over_queries": ("additive", COLUMN.view(1, 1, 1, S)),
    "additive_column": ("additive", COLUMN.view(1, 1, 1, S).expand(B, 1, L, S)),
    "documents": ("documents", COLUMN.view(1, 1, 1, S)),
    "causal_future": ({"is_causal": True}, (torch.arange(S) >= L).view(1, 1, 1, S)),
    "window_future": ({"window": (9, 4)}, (torch.arange(S) >= L + 4).view(1, 1, 1, S)),
    "window_past": (
        {"window": (6, None), "causal_alignment": "bottom_right"},
        (torch.arange(S) < S - L - 6)[None, None, None],
    ),
    "prefix_boundary": ({"is_causal": True, "prefix": 50}, (torch.arange(S) >= 50).view(1, 1, 1, S)),
    "window_behind_the_prefix": (
        {"window": (6, 0), "causal_alignment": "bottom_right", "prefix": 11},
        ((torch.arange(S) >= 11) & (torch.arange(S) < S - L - 6)).view(1, 1, 1, S),
    ),
}


@pytest.mark.parametrize(("garbage", "outputs"), [(math.nan, "plain"), (math.inf, "weights_and_lse")], ids=str)
@pytest.mark.parametrize("case", HIDDEN_KEYS)
def test_attention_ignores_nan_in_hidden_keys(case, garbage, outputs, backend, device, seed):
    """What nobody may see may hold NaN (pytorch#101967): the results are those of zeros in its place."""
    kind, hide = HIDDEN_KEYS[case]
    arguments = kind if isinstance(kind, dict) else masked_call(kind, hide, device)
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


# Long enough for tile maps, with tiles that are hidden whole, seen whole and in part.
LONG_L, LONG_S = 97, 150
LATE = torch.arange(LONG_S) >= 110
HIDDEN_TILES: dict[str, dict[str, Any]] = {
    "window": {"window": (30, 12)},
    "prefix": {"is_causal": True, "prefix": torch.tensor([110])},
    "documents": {
        "document_ids": (torch.arange(LONG_L)[None] // 64, torch.where(LATE, 7, torch.arange(LONG_S) // 64)[None])
    },
    "block_sparse": {
        "attn_mask": (~LATE & ((torch.arange(LONG_L)[:, None] // 64 + torch.arange(LONG_S) // 64) % 2 == 0))[None, None]
    },
    "padding": {"key_padding_mask": LATE[None]},
    "causal": {"is_causal": True},
    "bias": {},
}  # fmt: skip


@pytest.mark.parametrize("case", HIDDEN_TILES)
def test_attention_nan_behind_masks_reaches_no_gradient(case, backend, device, seed):
    """All that has a gradient at once: query, key, value, bias, slopes and sinks, under a softcap and with weights.
    NaN is behind the mask in the keys, inf in the values."""
    arguments = {
        name: tuple(t.to(device) for t in value) if name == "document_ids"
        else value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in HIDDEN_TILES[case].items()
    }  # fmt: skip
    tensors = attention_inputs(1, 2, LONG_L, LONG_S, D, kv_heads=1, device=device, seed=seed)
    leaves = dict(zip(("query", "key", "value"), tensors))
    leaves |= {"alibi_slopes": alibi_slopes(2, device=device), "sinks": attention_sinks(2, device=device)}
    if "attn_mask" not in arguments:
        bias = random_tensor(1, 2, LONG_L, LONG_S, seed=seed + 8, device=device)
        leaves["attn_mask"] = bias.masked_fill(LATE.to(device), -math.inf) if case == "bias" else bias
    column = LATE.to(device)[:, None]
    d_output = random_tensor(1, 2, LONG_L, D, seed=seed + 9, device=device)

    def run(of_keys, of_values):
        own = dict(leaves, key=leaves["key"].masked_fill(column, of_keys))
        own["value"] = leaves["value"].masked_fill(column, of_values)
        own = {name: t.detach().requires_grad_() for name, t in own.items()}
        results = attend(**own, **arguments, softcap=5.0, need_weights=True, return_lse=True, backend=backend)
        gradients = torch.autograd.grad(results, list(own.values()), [d_output, *map(torch.ones_like, results[1:])])
        return dict(zip(("output", "weights", "lse", *own), (*results, *gradients)))

    clean, dirty = run(0.0, 0.0), run(math.nan, -math.inf)
    for name, expected in clean.items():
        assert expected.isfinite().all(), name
        torch.testing.assert_close(dirty[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["bool", "additive", "documents", "causal", "window", "prefix"])
def test_attention_nan_in_a_value_reaches_only_the_rows_that_see_it(kind, backend, device, seed):
    """A key that some rows see holds NaN: those are NaN, the others right. Where causality alone hides keys, the torch
    backend does not promise it: torch's kernel runs, and nothing looks at the numbers."""
    if (kind, backend) == ("causal", "torch"):
        pytest.skip("under causality alone the torch backend is torch's own kernel, in which NaN spreads")
    query, key, value = attention_inputs(B, H, L, S, D, device=device, seed=seed)
    position = 20
    sees = torch.arange(L).view(1, 1, L, 1) >= position
    arguments: dict[str, Any] = {"is_causal": True}
    if kind == "window":
        arguments["window"] = (7, None)
        sees = sees & (torch.arange(L).view(1, 1, L, 1) <= position + 7)
    elif kind == "prefix":
        arguments["prefix"] = position  # the first key that it does not show
    elif kind == "documents":
        ids = (torch.arange(L) >= position).int(), (torch.arange(S) >= position).int()
        arguments = {"document_ids": tuple(t.expand(B, -1).to(device) for t in ids)}
    elif kind != "causal":
        hide = (torch.arange(S) == position) & ~sees
        arguments = masked_call(kind, hide, device)
    spoiled = value.clone()
    spoiled[:, :, position] = math.nan
    output = attend(query, key, spoiled, **arguments, backend=backend)
    clean = attend(query, key, value, **arguments, backend=backend)
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


@pytest.mark.parametrize("far", [2**31 - 1, 2**40])
def test_attention_windows_and_prefixes_of_any_size(far, backend, device, seed):
    """Bounds beyond 32 bits hide nothing, and do not wrap around."""
    query, key, value = attention_inputs(1, 1, L, S, D, device=device, seed=seed)
    expected = attend(query, key, value, backend=backend)
    torch.testing.assert_close(attend(query, key, value, window=(far, far), backend=backend), expected)
    torch.testing.assert_close(attend(query, key, value, is_causal=True, prefix=far, backend=backend), expected)
    causal = attend(query, key, value, is_causal=True, backend=backend)
    torch.testing.assert_close(attend(query, key, value, window=(far, 0), backend=backend), causal)


@pytest.mark.parametrize(
    "arguments",
    [{"is_causal": True}, {"window": (None, 2)}, {"window": (2, 0), "causal_alignment": "bottom_right"}],
    ids=str,
)
def test_attention_of_one_query_ignores_nan_in_hidden_keys(arguments, backend, device, seed):
    """A single query, as in decoding with a window: its tile holds keys that it may not see."""
    query, key, value = attention_inputs(1, 2, 1, 10, D, device=device, seed=seed)
    spoiled = (torch.arange(10, device=device) == 5)[:, None]
    d_output = random_tensor(1, 2, 1, D, seed=seed + 9, device=device)
    clean, dirty = (
        with_gradients(
            (query, key.masked_fill(spoiled, x), value.masked_fill(spoiled, x)), backend, d_output, **arguments
        )
        for x in (0.0, math.nan)
    )
    for expected, found in zip(clean, dirty):
        torch.testing.assert_close(found, expected)


def test_attention_documents_are_told_apart_by_all_of_their_bits(backend, device):
    value = torch.tensor([1.0, 5.0], device=device).view(1, 1, 2, 1)
    ids = torch.tensor([[0, 2**32]], device=device)
    assert torch.equal(attend(value, value, value, document_ids=ids, backend=backend), value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64])
def test_attention_prefix_of_any_integer_dtype(dtype, backend, device, seed):
    query, key, value = attention_inputs(2, 1, L, S, D, device=device, seed=seed)
    prefix = torch.tensor([3, 100], device=device)
    found = attend(query, key, value, is_causal=True, prefix=prefix.to(dtype), backend=backend)
    assert torch.equal(found, attend(query, key, value, is_causal=True, prefix=prefix.int(), backend=backend))
