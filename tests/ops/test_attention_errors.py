"""Bad arguments get an exception that names the argument, its value and what is accepted; nothing runs before."""

import re
from typing import Any

import pytest
import torch

import fastattn
from tests.ops.attention_cases import attend

B, H, L, S, D = 2, 4, 5, 7, 8


def good(device, dtype=torch.float32) -> dict[str, Any]:
    query = torch.zeros(B, H, L, D, device=device, dtype=dtype)
    key, value = (torch.zeros(B, H, S, D, device=device, dtype=dtype) for _ in range(2))
    return {"query": query, "key": key, "value": value}


def bad_calls(device):
    """``(name, changed arguments, exception, words that the message holds)``."""

    def zeros(*shape, **options):
        return torch.zeros(*shape, **{"device": device, **options})

    def mask(*shape, dtype=torch.bool):
        return zeros(*shape, dtype=dtype)

    def ids(*shape, **options):
        return zeros(*shape, dtype=torch.int64, **options)

    three = {"query": zeros(B, L, D)}
    return [
        ("query_list", {"query": [1.0]}, TypeError, ["query", "list", "torch.Tensor"]),
        ("key_none", {"key": None}, TypeError, ["key", "NoneType", "torch.Tensor"]),
        ("query_3d", three, ValueError, ["query", "(2, 5, 8)", "4 dimensions"]),
        ("value_5d", {"value": zeros(1, B, H, S, D)}, ValueError, ["value", "(1, 2, 4, 7, 8)", "4 dimensions"]),
        ("query_int", {"query": zeros(B, H, L, D, dtype=torch.int64)}, TypeError, ["query", "torch.int64", "float16"]),
        ("query_complex", {"query": zeros(B, H, L, D, dtype=torch.complex64)}, TypeError, ["query", "torch.complex64"]),
        ("key_dtype", {"key": zeros(B, H, S, D, dtype=torch.bfloat16)}, TypeError, ["key", "torch.bfloat16", "one"]),
        ("value_dtype", {"value": zeros(B, H, S, D, dtype=torch.float64)}, TypeError, ["value", "torch.float64"]),
        ("key_device", {"key": zeros(B, H, S, D, device="meta")}, ValueError, ["key", "meta", "one device"]),
        ("batch", {"key": zeros(3, H, S, D)}, ValueError, ["(3, 4, 7, 8)", "(2, 4, 5, 8)", "batch"]),
        ("head_size", {"key": zeros(B, H, S, 9)}, ValueError, ["(2, 4, 7, 9)", "head size"]),
        ("key_value_length", {"value": zeros(B, H, 6, D)}, ValueError, ["(2, 4, 6, 8)", "same length"]),
        ("key_value_heads", {"value": zeros(B, 2, S, D)}, ValueError, ["(2, 2, 7, 8)", "number of heads"]),
        (
            "head_groups",
            {"key": zeros(B, 3, S, D), "value": zeros(B, 3, S, D)},
            ValueError,
            ["4 query heads", "multiple", "3 key heads"],
        ),
        (
            "head_size_zero",
            {"query": zeros(B, H, L, 0), "key": zeros(B, H, S, 0)},
            ValueError,
            ["(2, 4, 5, 0)", "at least 1"],
        ),
        ("mask_list", {"attn_mask": [True]}, TypeError, ["attn_mask", "list", "torch.Tensor"]),
        ("mask_int", {"attn_mask": mask(L, S, dtype=torch.int64)}, TypeError, ["attn_mask", "torch.int64", "bool"]),
        ("mask_shape", {"attn_mask": mask(S, L)}, ValueError, ["attn_mask", "(7, 5)", "(2, 4, 5, 7)"]),
        ("mask_5d", {"attn_mask": mask(1, B, H, L, S)}, ValueError, ["attn_mask", "(1, 2, 4, 5, 7)", "(2, 4, 5, 7)"]),
        ("mask_device", {"attn_mask": zeros(L, S, device="meta")}, ValueError, ["attn_mask", "meta", "one device"]),
        ("mask_sparse", {"attn_mask": zeros(L, S).to_sparse()}, TypeError, ["attn_mask", "sparse_coo", "to_dense"]),
        ("padding_sparse", {"key_padding_mask": mask(B, S).to_sparse()}, TypeError, ["key_padding_mask", "to_dense"]),
        ("sinks_sparse", {"sinks": zeros(H).to_sparse()}, TypeError, ["sinks", "sparse_coo", "to_dense"]),
        ("padding_list", {"key_padding_mask": [0]}, TypeError, ["key_padding_mask", "list", "torch.Tensor"]),
        ("padding_float", {"key_padding_mask": zeros(B, S)}, TypeError, ["key_padding_mask", "torch.float32", "bool"]),
        ("padding_shape", {"key_padding_mask": mask(B, L)}, ValueError, ["key_padding_mask", "(2, 5)", "(2, 7)"]),
        (
            "padding_device",
            {"key_padding_mask": zeros(B, S, dtype=torch.bool, device="meta")},
            ValueError,
            ["key_padding_mask", "meta"],
        ),
        ("alignment", {"is_causal": True, "causal_alignment": "left"}, ValueError, ["'left'", "'top_left'"]),
        ("dropout_negative", {"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1", "between 0 and 1"]),
        ("dropout_above_one", {"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5", "between 0 and 1"]),
        ("dropout_nan", {"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan", "between 0 and 1"]),
        ("dropout_text", {"dropout_p": "half"}, TypeError, ["dropout_p", "half", "number"]),
        ("scale_text", {"scale": "big"}, TypeError, ["scale", "big", "number"]),
        ("causal_text", {"is_causal": "top_left"}, TypeError, ["is_causal", "top_left", "True or False"]),
        ("weights_text", {"need_weights": "no"}, TypeError, ["need_weights", "no", "True or False"]),
        ("average_number", {"average_attn_weights": 0}, TypeError, ["average_attn_weights=0", "True or False"]),
        ("lse_number", {"return_lse": 1}, TypeError, ["return_lse=1", "True or False"]),
        ("scale_inf", {"scale": float("inf")}, ValueError, ["scale", "inf", "finite"]),
        ("window_number", {"window": 3}, TypeError, ["window=3", "(left, right)"]),
        ("window_three", {"window": (1, 2, 3)}, TypeError, ["window=(1, 2, 3)", "(left, right)"]),
        ("window_float", {"window": (1.5, None)}, TypeError, ["window=(1.5, None)", "ints"]),
        ("window_bool", {"window": (True, 0)}, TypeError, ["window=(True, 0)", "ints"]),
        ("window_negative", {"window": (3, -1)}, ValueError, ["window=(3, -1)", "0 or more"]),
        ("prefix_float", {"prefix": 2.0}, TypeError, ["prefix=2.0", "int"]),
        ("prefix_negative", {"prefix": -1}, ValueError, ["prefix=-1", "0 or more"]),
        ("prefix_floating", {"prefix": zeros(B)}, TypeError, ["prefix", "torch.float32", "integer"]),
        ("prefix_shape", {"prefix": zeros(H, dtype=torch.int64)}, ValueError, ["prefix", "(4,)", "[batch]", "(2,)"]),
        ("prefix_device", {"prefix": zeros(B, dtype=torch.int64, device="meta")}, ValueError, ["prefix", "meta"]),
        ("documents_one", {"document_ids": ids(B, L)}, ValueError, ["document_ids", "5 queries", "7 keys", "pair"]),
        ("documents_list", {"document_ids": [ids(B, L)]}, TypeError, ["document_ids", "list", "1 items", "pair"]),
        ("documents_text", {"document_ids": "a"}, TypeError, ["document_ids", "str", "torch.Tensor"]),
        ("documents_none", {"document_ids": (None, None)}, TypeError, ["document_ids of queries", "NoneType"]),
        ("documents_swapped", {"document_ids": (ids(B, S), ids(B, L))}, ValueError, ["of queries", "(2, 7)"]),
        ("documents_keys", {"document_ids": (ids(1, L), ids(3, S))}, ValueError, ["of keys", "(3, 7)"]),
        ("documents_bool", {"document_ids": (mask(B, L), mask(B, S))}, TypeError, ["torch.bool", "integer"]),
        ("documents_device", {"document_ids": (ids(B, L), ids(B, S, device="meta"))}, ValueError, ["of keys", "meta"]),
        ("slopes_list", {"alibi_slopes": [0.5] * H}, TypeError, ["alibi_slopes", "list", "torch.Tensor"]),
        ("slopes_int", {"alibi_slopes": ids(H)}, TypeError, ["alibi_slopes", "torch.int64", "floating"]),
        ("slopes_shape", {"alibi_slopes": zeros(3, H)}, ValueError, ["(3, 4)", "[heads] or [batch, heads]"]),
        ("slopes_device", {"alibi_slopes": zeros(H, device="meta")}, ValueError, ["alibi_slopes", "meta"]),
        ("sinks_number", {"sinks": 0.0}, TypeError, ["sinks", "float", "torch.Tensor"]),
        ("sinks_int", {"sinks": ids(H)}, TypeError, ["sinks", "torch.int64", "floating"]),
        ("sinks_shape", {"sinks": zeros(B, H)}, ValueError, ["sinks", "(2, 4)", "[heads]", "(4,)"]),
        ("sinks_device", {"sinks": zeros(H, device="meta")}, ValueError, ["sinks", "meta", "one device"]),
        ("softcap_text", {"softcap": "30"}, TypeError, ["softcap", "'30'", "number"]),
        ("softcap_zero", {"softcap": 0.0}, ValueError, ["softcap=0.0", "above 0"]),
        ("softcap_inf", {"softcap": float("inf")}, ValueError, ["softcap=inf", "finite"]),
        ("softcap_nan", {"softcap": float("nan")}, ValueError, ["softcap=nan", "finite"]),
        ("backend", {"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'auto'", "'triton'", "'torch'"]),
    ]  # fmt: skip


NAMES = [name for name, *_ in bad_calls("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_attention_bad_argument_says_what_is_accepted(name, device):
    changed, exception, words = next(rest for n, *rest in bad_calls(device) if n == name)
    with pytest.raises(exception) as caught:
        attend(**{**good(device), **changed})
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("name", NAMES)
def test_explain_raises_as_attention_does(name, device):
    changed, exception, words = next(rest for n, *rest in bad_calls(device) if n == name)
    with pytest.raises(exception, match=re.escape(words[0])):
        fastattn.explain(**{**good(device), **changed})


@pytest.mark.parametrize("name", NAMES)
def test_attention_bad_argument_raises_before_anything_runs(name, device, monkeypatch):
    from fastattn.ops.attention import on_torch, on_triton

    def ran(*args):
        raise AssertionError("the backend was reached")

    for module in (on_torch, on_triton):
        monkeypatch.setattr(module, "run", ran)
    changed, exception, _ = next(rest for n, *rest in bad_calls(device) if n == name)
    with pytest.raises(exception):
        attend(**{**good(device), **changed})


def test_triton_refuses_a_head_size_with_its_limit(device):
    pytest.importorskip("triton", reason="triton is not installed")
    query = torch.zeros(1, 1, 4, 513, device=device)
    with pytest.raises(NotImplementedError, match=r"triton.*head_dim=513.*1 to 512"):
        attend(query, query, query, backend="triton")
    value = torch.zeros(1, 1, 4, 600, device=device)
    with pytest.raises(NotImplementedError, match=r"value head_dim=600.*1 to 512"):
        attend(query[..., :8], query[..., :8], value, backend="triton")


def test_triton_refuses_float64(device):
    pytest.importorskip("triton", reason="triton is not installed")
    arguments = good(device, torch.float64)
    with pytest.raises(NotImplementedError, match=r"float64.*float16, bfloat16 and float32"):
        attend(**arguments, backend="triton")
    assert fastattn.explain(**arguments).backend == "torch"


# --------------------------------------------------------------------------------------- scaled_dot_product_attention


def test_sdpa_refuses_a_mask_together_with_is_causal(device):
    """torch's own error type."""
    arguments = good(device)
    mask = torch.ones(L, S, dtype=torch.bool, device=device)
    with pytest.raises(RuntimeError, match=r"is_causal=True.*attn_mask"):
        fastattn.scaled_dot_product_attention(**arguments, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize(
    ("changed", "exception", "words"),
    [
        ({"query": 3}, TypeError, "query.*int"),
        ({"value": torch.zeros(4)}, ValueError, r"value.*\(4,\).*\[length, head_dim\]"),
        ({"query": torch.zeros(3, H, L, D)}, ValueError, r"\(3, 4, 5, 8\).*broadcast"),
        ({"key": torch.zeros(B, 2, S, D), "value": torch.zeros(B, 2, S, D)}, ValueError, "enable_gqa=True"),
        ({"attn_mask": torch.zeros(S, L, dtype=torch.bool)}, ValueError, r"attn_mask.*\(7, 5\)"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p=2.0"),
    ],
    ids=["query_int", "value_1d", "batch", "heads", "mask_shape", "dropout"],
)
def test_sdpa_bad_argument_says_what_is_accepted(changed, exception, words):
    with pytest.raises(exception, match=words):
        fastattn.scaled_dot_product_attention(**{**good("cpu"), **changed})
