"""The short way on the CPU says what the long way says, and takes no call that it could get wrong."""

import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import reference
from fastattn.ops.attention import direct
from fastattn.testing import assert_within_budget, random_tensor

NAN, INF = math.nan, math.inf


def qkv(heads=4, kv_heads=4, length=6, keys=7, size=8, dtype=torch.float32):
    shapes = (2, heads, length, size), (2, kv_heads, keys, size), (2, kv_heads, keys, size)
    return [random_tensor(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def bools(*shape):
    return random_tensor(*shape, seed=7) > -0.5


def padding():
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, :2] = hidden[1, 5:] = True
    return hidden


def assert_right(
    output, query, key, value, attn_mask=None, key_padding_mask=None, is_causal=False, scale=None, window=(None, None),
    alibi_slopes=None, **_,
):  # fmt: skip
    """The output of a call beside the reference's, in float64 and in the dtype of the call."""
    left, right = window

    def referred(dtype):
        words: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "scale": scale,
            "lower": None if left is None else -left,
            "upper": 0 if is_causal else right,
            "alibi_slopes": None if alibi_slopes is None else alibi_slopes.to(dtype),
        }
        if attn_mask is not None:
            attn_mask_ = attn_mask[(None,) * (4 - attn_mask.dim())]
            words |= {"mask": attn_mask_} if attn_mask.dtype == torch.bool else {"bias": attn_mask_.to(dtype)}
        return reference.attention(*(t.detach().to(dtype) for t in (query, key, value)), **words).output

    if output.dtype == torch.float64:
        torch.testing.assert_close(output, referred(torch.float64))
    else:
        assert_within_budget(output, truth=referred(torch.float64), peer=referred(output.dtype), name="output")


@pytest.fixture(autouse=True)
def _torch_backend():
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture
def taken(monkeypatch):
    """Whether the short way took the calls, the plainest ones at its first step."""
    seen: list[bool] = []

    def watched(original):
        def attend(*args):
            output = original(*args)
            seen.append(output is not None)
            return output

        return attend

    for name in ("attend_plainly", "attend_by_difference", "attend"):
        monkeypatch.setattr(direct, name, watched(getattr(direct, name)))
    return lambda: any(seen)


TAKEN = {
    "plain": ({}, {}),
    "scale": ({}, {"scale": 0.3}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "causal": ({"keys": 6}, {"is_causal": True}),
    "window": ({"keys": 6}, {"window": (2, 1)}),
    "causal_window": ({"keys": 6}, {"window": (2, None), "is_causal": True}),
    "alibi": ({"keys": 6}, {"alibi_slopes": torch.tensor([0.5, 0.0, 0.1, 2.0]), "is_causal": True}),
    "alibi_in_a_window": ({"keys": 6}, {"alibi_slopes": torch.tensor([0.5, 0.0, 0.1, 2.0]), "window": (3, 1)}),
    "padding_of_one_shape": ({"keys": 6}, {"key_padding_mask": padding()[:, :6]}),
    "grouped": ({"kv_heads": 2}, {}),
    "bool_mask": ({}, {"attn_mask": bools(2, 4, 6, 7)}),
    "bool_broadcast": ({}, {"attn_mask": bools(1, 1, 6, 7)}),
    "bias": ({}, {"attn_mask": random_tensor(1, 4, 6, 7, seed=8)}),
    "padding": ({}, {"key_padding_mask": padding()}),
    "padding_grouped": ({"kv_heads": 2}, {"key_padding_mask": padding()}),
    "padding_and_mask": ({}, {"key_padding_mask": padding(), "attn_mask": bools(1, 4, 6, 1)}),
    "padding_and_bias": ({}, {"key_padding_mask": padding(), "attn_mask": random_tensor(1, 4, 6, 7, seed=8)}),
    "one_query_bias_grouped": ({"kv_heads": 2, "length": 1}, {"attn_mask": random_tensor(1, 4, 1, 7, seed=8)}),
    "row_without_keys": ({}, {"attn_mask": torch.zeros(2, 1, 6, 7, dtype=torch.bool)}),
    "long_bias": ({"length": 300}, {"attn_mask": random_tensor(1, 4, 300, 7, seed=8)}),
}


@pytest.mark.parametrize(("sizes", "words"), TAKEN.values(), ids=TAKEN)
def test_direct_call_matches_the_reference(sizes, words, taken):
    query, key, value = qkv(**sizes)
    output = fastattn.attention(query, key, value, **words)
    assert taken()
    assert_right(output, query, key, value, **words)


LEFT = {
    "narrow_values": lambda q, k, v: ((q, k, v[..., :4]), {}),
    "columns_first": lambda q, k, v: ((q.mT.contiguous().mT, k, v), {}),
    "negative_scale": lambda q, k, v: ((q, k, v), {"scale": -1.0}),
    "grouped_causal": lambda q, k, v: ((q[:, :, :6], k[:, :2, :6], v[:, :2, :6]), {"is_causal": True}),
    "causal_with_more_keys": lambda q, k, v: ((q, k, v), {"is_causal": True}),
    "causal_with_a_mask": lambda q, k, v: ((q, k, v), {"is_causal": True, "attn_mask": bools(1, 1, 6, 7)}),
    "bias_of_another_dtype": lambda q, k, v: ((q, k, v), {"attn_mask": random_tensor(6, 7, seed=1).double()}),
    "empty": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "trained_under_a_bias": lambda q, k, v: ((q.requires_grad_(), k, v), {"attn_mask": random_tensor(6, 7, seed=1)}),
    "trained_bias": lambda q, k, v: ((q, k, v), {"attn_mask": random_tensor(1, 4, 6, 7, seed=1).requires_grad_()}),
    "negative_slopes": lambda q, k, v: ((q[:, :, :6], k[:, :, :6], v[:, :, :6]), {"alibi_slopes": -torch.ones(4)}),
    "long_mask": lambda q, k, v: ((q.repeat(1, 1, 70, 1), k, v), {"attn_mask": bools(1, 1, 420, 7)}),
}  # fmt: skip


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_other_calls_are_left_to_the_long_way(make, taken):
    args, words = make(*qkv())
    output = fastattn.attention(*args, **words)
    assert not taken()
    assert_right(output, *args, **words)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("where", ["key", "value"])
def test_direct_call_throws_away_what_garbage_at_hidden_keys_spoils(garbage, where):
    query, key, value = qkv()
    hidden = padding()
    expected = fastattn.attention(query, key, value, key_padding_mask=hidden)
    (key if where == "key" else value).masked_fill_(hidden[:, None, :, None], garbage)
    torch.testing.assert_close(fastattn.attention(query, key, value, key_padding_mask=hidden), expected)


BAD = {
    "padding_of_another_batch": ({"key_padding_mask": torch.zeros(1, 7, dtype=torch.bool)}, ValueError),
    "padding_of_numbers": ({"key_padding_mask": torch.zeros(2, 7)}, TypeError),
    "mask_of_another_length": ({"attn_mask": torch.zeros(1, 1, 6, 8)}, ValueError),
    "mask_of_integers": ({"attn_mask": torch.zeros(1, 1, 6, 7, dtype=torch.long)}, TypeError),
    "causal_by_a_word": ({"is_causal": "yes"}, TypeError),
    "infinite_scale": ({"scale": INF}, ValueError),
    "backend": ({"backend": "cuda"}, ValueError),
    "alignment": ({"causal_alignment": "bottom"}, ValueError),
    "causal_by_a_number": ({"is_causal": 0}, TypeError),
    "dropout_in_a_tensor": ({"dropout_p": torch.tensor(0.0)}, TypeError),
    "mask_in_a_list": ({"attn_mask": [True]}, TypeError),
    "sparse_mask": ({"attn_mask": torch.zeros(1, 1, 6, 7).to_sparse()}, TypeError),
    "sparse_padding": ({"key_padding_mask": padding().to_sparse()}, TypeError),
    "nested_mask": ({"attn_mask": torch.nested.nested_tensor([torch.zeros(4, 6, 7)] * 2)}, TypeError),
    "integers_beside_padding": (
        {"attn_mask": torch.zeros(1, 1, 6, 7, dtype=torch.long), "key_padding_mask": padding()},
        TypeError,
    ),
    "another_batch_beside_padding": (
        {"attn_mask": torch.zeros(3, 1, 6, 7), "key_padding_mask": padding()},
        ValueError,
    ),
}


@pytest.mark.parametrize(("words", "error"), BAD.values(), ids=BAD)
def test_wrong_arguments_keep_their_errors(words, error):
    with pytest.raises(error, match=rf"^({'|'.join(words)})"):
        fastattn.attention(*qkv(), **words)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_sparse_padding_of_tensors_of_one_shape_keeps_its_error(convert):
    with pytest.raises(TypeError, match=r"^key_padding_mask has the layout torch\.sparse_"):
        fastattn.attention(*qkv(keys=7, length=7), key_padding_mask=convert(padding()))


@pytest.mark.parametrize("position", range(3))
def test_nested_tensors_keep_their_error(position):
    inputs = qkv(keys=6)
    inputs[position] = torch.nested.nested_tensor(list(inputs[position]))
    with pytest.raises(TypeError, match="is a nested tensor: expected a dense tensor"):
        fastattn.attention(*inputs)


def test_small_scale_keeps_scores_whose_products_overflow(taken):
    """Products of query and key near -1e40, and scores near -10: torch's kernel would scale -inf."""
    query, key, value = qkv()
    query, key = query.abs() * 1e10, -key.abs() * 1e29
    words = {"attn_mask": bools(1, 1, 6, 7), "scale": 1e-39}
    output = fastattn.attention(query, key, value, **words)
    assert not taken()
    truth = reference.attention(*(t.double() for t in (query, key, value)), mask=words["attn_mask"], scale=1e-39).output
    torch.testing.assert_close(output, truth.float())


@pytest.mark.parametrize("garbage", [0.0, NAN, 3e38])
def test_direct_call_trains_under_a_mask(garbage, taken):
    """Huge values that nobody sees give a finite output, and gradients of the scores that overflow."""
    query, key, value = qkv(kv_heads=2)
    hidden, d_output = padding(), random_tensor(2, 4, 6, 8, seed=9)
    spoilt = value.masked_fill(hidden[:, None, :, None], garbage).requires_grad_()

    def gradients(leaves, dtype):
        output = reference.attention(*leaves, key_padding_mask=hidden).output
        return torch.autograd.grad(output, leaves, d_output.to(dtype))

    leaves = [query.requires_grad_(), key.requires_grad_(), spoilt]
    output = fastattn.attention(*leaves, key_padding_mask=hidden)
    assert taken() == (garbage == garbage)
    found = torch.autograd.grad(output, leaves, d_output)
    truth, peer = (
        gradients([t.detach().to(dtype).requires_grad_() for t in (query, key, value)], dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for name, actual, *others in zip(("dq", "dk", "dv"), found, truth, peer):
        assert_within_budget(actual, truth=others[0], peer=others[1], name=name)


@pytest.mark.parametrize("mask", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("length", [6, 7])
def test_garbage_stays_hidden_from_gradients_where_the_fused_kernel_is_off(length, mask):
    """SDPA's other form has no hook that would look at its gradients: values of 1e38 at hidden keys made them NaN."""
    query, key, value = qkv(length=length)
    words: Any = {mask: padding() if mask == "key_padding_mask" else ~padding()[:, None, None]}
    value.masked_fill_(padding()[:, None, :, None], 1e38)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    with sdpa_kernel(SDPBackend.MATH):
        output: Any = fastattn.attention(*leaves, **words)
    found = torch.autograd.grad(output, leaves, torch.full_like(output, 10.0))
    assert all(bool(t.isfinite().all()) for t in found)


def test_direct_call_gives_gradients_of_every_order(taken):
    inputs = [t.double().requires_grad_() for t in qkv(length=3, keys=3, size=2)]
    assert torch.autograd.gradgradcheck(lambda *t: fastattn.attention(*t, is_causal=True), inputs)
    assert taken()
