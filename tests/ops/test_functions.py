"""``score_mod`` and ``mask_mod``: values and all gradients against the reference in float64, with every other word."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend
from tests.ops.functions_calls import Call, draw, of_ours, of_reference
from tests.ops.functions_cases import MASKS, SCORES, Sizes
from tests.ops.functions_checks import check

pytestmark = pytest.mark.usefixtures("poisoned")
BF16, FP16 = torch.bfloat16, torch.float16
ALL = {"need_weights": True, "return_lse": True}
WINDOW = {"window": (9, 4), "causal_alignment": "bottom_right"}


@pytest.mark.parametrize("name", SCORES)
def test_score_mod_matches_reference(name, backend, device):
    check(Call(name, words={"return_lse": True}), backend, device)


@pytest.mark.parametrize("name", MASKS)
def test_mask_mod_matches_reference(name, backend, device):
    check(Call(mask=name, words={"return_lse": True}), backend, device)


COMBINED = [
    Call("table_of_differences", "documents_or_first", BF16),
    Call("table_of_differences", words={"is_causal": True}, more=("bias",)),
    Call("alibi", "of_head_and_batch", FP16, {"return_lse": True}, ("key_padding_mask",)),
    Call("alibi", words=WINDOW, more=("alibi_slopes", "sinks")),
    Call("pair_bias", words=ALL, more=("bias", "key_padding_mask")),
    Call("pair_bias", "causal", BF16, {"softcap": 1.5}),
    Call("table_of_documents", dtype=FP16, words={"softcap": 2.0, "is_causal": True}, more=("sinks",)),
    Call("table_of_documents", "rows_without_keys", words={**ALL, "dropout_p": 0.3}),
    Call("hidden_by_infinity", "flags_of_keys", BF16, ALL, ("sinks", "bias")),
    Call("hidden_by_infinity", words=WINDOW, more=("alibi_slopes",), kv_heads=2),
    Call("arithmetic_of_scores", "prefix_by_batch", words={"dropout_p": 0.2}),
    Call("arithmetic_of_indices", dtype=BF16, words={"scale": -0.4}),
    Call("of_places_alone", "causal", words={"scale": 0.3}, more=("sinks",)),
    Call("wrapping", words={"dropout_p": 0.5, "need_weights": True}),
    Call(mask="rows_without_keys", dtype=FP16, words={**ALL, "softcap": 1.0}, more=("sinks",)),
    Call(mask="documents_or_first", words={"is_causal": True, "dropout_p": 0.4}, more=("bias", "alibi_slopes")),
    # captured tensors that are narrower or wider than the queries
    Call("table_of_differences", of_captured=BF16),
    Call("alibi", dtype=BF16, of_captured=FP16),
    # above a tile, so that some are left out
    Call("table_of_differences", "documents_or_first", sizes=Sizes(1, 2, 150, 140)),
    Call("nothing_captured", "causal", BF16, sizes=Sizes(1, 2, 70, 210)),
]


@pytest.mark.parametrize("call", COMBINED, ids=str)
def test_functions_beside_other_words_match_reference(call, backend, device):
    check(call, backend, device)


# ----------------------------------------------------------------------------------------------- what nobody may see


def with_garbage(backend, garbage):
    """A call of which ``rows_without_keys`` hides rows 5 to 8 and key 7, and keys from 40 on; there is the garbage."""
    call = Call("pair_bias", "rows_without_keys", words={"return_lse": True}, sizes=Sizes(1, 2))
    drawn = draw(call)
    rows, keys = torch.arange(37)[:, None], torch.arange(45)
    hidden = ((rows >= 5) & (rows <= 8)) | (keys == 7) | (keys >= 40)
    drawn.leaves["query"] = torch.where(hidden.all(1)[:, None], garbage, drawn.leaves["query"])
    for name in ("key", "value"):
        drawn.leaves[name] = torch.where(hidden.all(0)[:, None], garbage, drawn.leaves[name])
    drawn.leaves["captured_0"] = torch.where(hidden, garbage, drawn.leaves["captured_0"])
    drawn.upstream["output"] = torch.where(hidden.all(1)[:, None], garbage, drawn.upstream["output"])
    return of_ours(call, drawn, backend)[0]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_a_mask_mod_hides_takes_no_part(garbage, backend):
    """In queries, keys, values, what score_mod captures and gradients that come in."""
    expected, found = with_garbage(backend, 0.0), with_garbage(backend, garbage)
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), name
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rows_that_see_nothing_are_zero(backend):
    found = with_garbage(backend, 1.0)
    for name in ("output", "d_query"):
        assert not found[name][:, :, 5:9].any(), name
    assert (found["lse"][:, :, 5:9] == -torch.inf).all()
    assert not found["d_key"][:, :, 40:].any() and not found["d_value"][:, :, 7].any()
    assert not found["d_captured_0"][:, :, :, 7].any()


def test_score_of_infinity_hides_as_a_mask_does(backend):
    """NaN behind it takes no part, and a captured number that only hidden pairs read has no gradient."""
    qkv = [random_tensor(1, 2, 9, 16, seed=i).requires_grad_() for i in range(3)]
    table = torch.tensor([0.5, float("nan")]).requires_grad_()

    def score_mod(score, batch, head, query_index, key_index):
        return torch.where(key_index > query_index, float("-inf"), score + table[(key_index > query_index).int()])

    found = attend(*qkv, score_mod=score_mod, backend=backend)
    expected = attend(*qkv, is_causal=True, backend="torch")
    torch.testing.assert_close(found, expected)
    *d_found, d_table = torch.autograd.grad(found.square().sum(), [*qkv, table])
    for d, d_expected in zip(d_found, torch.autograd.grad(expected.square().sum(), qkv)):
        torch.testing.assert_close(d, d_expected)
    assert d_table.isfinite().all()
    assert d_table[1] == 0


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_lengths(batch, lengths, backend):
    query, key = (random_tensor(batch, 2, length, 16, seed=1).requires_grad_() for length in lengths)
    table = torch.ones(3, requires_grad=True)
    words: Any = {
        "score_mod": lambda s, b, h, q, k: s * table[(q - k).abs() % 3],
        "mask_mod": lambda b, h, q, k: q >= k,
    }
    output, lse = attend(query, key, key, return_lse=True, backend=backend, **words)
    assert output.shape == query.shape and not output.any()
    assert (lse == -torch.inf).all() and lse.shape == query.shape[:3]
    for tensor, d in zip((query, key, table), torch.autograd.grad(output.sum(), (query, key, table))):
        assert d.shape == tensor.shape and not d.any()


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("score", ["table_of_differences", "table_of_documents"])
def test_float64_is_computed_in_float64(score, device):
    call = Call(score, "documents_or_first", torch.float64, ALL, of_captured=torch.float64)
    found, _ = of_ours(call, draw(call, device), "torch")
    for name, truth in of_reference(call, draw(call, device), None, torch.float64).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12)


def test_autocast_changes_neither_the_function_nor_what_it_captures(backend):
    """The queries alone are narrowed: the table stays float32, and so does its gradient."""
    query = random_tensor(1, 2, 9, 16, seed=1)
    table = random_tensor(2, 4, seed=2).requires_grad_()

    def run(query):
        return attend(query, query, query, score_mod=lambda s, b, h, q, k: s + table[h, k % 4].exp())

    with fastattn.use_backend(backend):
        expected = run(query.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            found = run(query)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    d_table, d_expected = (torch.autograd.grad(output.float().square().sum(), table)[0] for output in (found, expected))
    assert d_table.dtype == torch.float32 and torch.equal(d_table, d_expected)
