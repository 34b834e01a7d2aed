"""Additive attention refuses bad input by name, and backends say why they refuse."""

import re
from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import random_tensor

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.ops.additive_attention

Q, K, V, W = (random_tensor(*s, seed=0) for s in ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7), (3, 5)))
MASK = torch.ones(4, 6, dtype=torch.bool)

WRONG = {
    "list": (TypeError, "query: expected a torch.Tensor, got list", {"query": [1.0]}),
    "integer": (TypeError, "value is torch.int64: expected float16", {"value": V.long()}),
    "narrow": (TypeError, "query is torch.float8_e4m3fn: expected float16", {"query": Q.to(torch.float8_e4m3fn)}),
    "dtypes": (TypeError, "weight is torch.float64 but query is torch.float32", {"weight": W.double()}),
    "device": (ValueError, "key is on meta but query is on cpu", {"key": K.to("meta")}),
    "two_dimensions": (ValueError, "query has shape (4, 5): expected [batch, length, size]", {"query": Q[0, 0]}),
    "mixed": (ValueError, "key (3, 6, 5), value (2, 3, 6, 7): expected as many dimensions", {"key": K[0]}),
    "batch": (ValueError, "expected the same batch size and number of heads in all three", {"key": K[:1]}),
    "size": (ValueError, "expected query and key to have the same size", {"key": K[..., :4]}),
    "no_columns": (ValueError, "expected a size (the last dimension) of at least 1",
                   {"query": Q[..., :0], "key": K[..., :0]}),
    "length": (ValueError, "expected key and value to have the same length", {"value": V[:, :, :5]}),
    "weight": (ValueError, "weight has shape (2, 5): expected (5,) or (3, 5)", {"weight": W[:2]}),
    "mask_type": (TypeError, "attn_mask is torch.int64: expected bool", {"attn_mask": MASK.long()}),
    "mask_shape": (ValueError, "attn_mask has shape (5, 6): expected one that broadcasts to (2, 3, 4, 6)",
                   {"attn_mask": torch.ones(5, 6, dtype=torch.bool)}),
    "padding_type": (TypeError, "key_padding_mask is torch.float32", {"key_padding_mask": torch.zeros(2, 6)}),
    "padding_shape": (ValueError, "key_padding_mask has shape (2, 5): expected [batch, keys] = (2, 6)",
                      {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
    "causal": (TypeError, "is_causal='yes': expected True or False", {"is_causal": "yes"}),
    "weights": (TypeError, "need_weights=1: expected True or False", {"need_weights": 1}),
    "average": (TypeError, "average_attn_weights='no': expected True or False", {"average_attn_weights": "no"}),
    "backend": (ValueError, "backend='cuda': expected one of 'auto', 'triton', 'torch'", {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_additive_refuses_by_name(name):
    error, message, wrong = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        attend(**{"query": Q, "key": K, "value": V, "weight": W, **wrong})


def test_additive_weight_of_a_call_without_heads_has_one_dimension():
    with pytest.raises(ValueError, match=re.escape("weight has shape (3, 5): expected (5,)")):
        attend(Q[0], K[0], V[0], W)


@pytest.mark.parametrize(
    ("name", "reason", "arguments"),
    [
        ("float64", "query is torch.float64",
         {"query": Q.double(), "key": K.double(), "value": V.double(), "weight": W.double()}),
        ("wide", "value size=513: it takes 1 to 512", {"value": random_tensor(2, 3, 6, 513, seed=0)}),
        ("mask", "attn_mask is torch.float64", {"attn_mask": torch.zeros(4, 6, dtype=torch.float64)}),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_additive_triton_backend_says_why_it_refuses(name, reason, arguments):
    call = {"query": Q, "key": K, "value": V, "weight": W, **arguments}
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        attend(**call, backend="triton")
    assert torch.equal(attend(**call), attend(**call, backend="torch"))


def test_additive_of_meta_tensors_has_the_shapes_of_its_results():
    meta = [t.to("meta") for t in (Q, K, V, W)]
    output, weights = attend(*meta, need_weights=True, backend="torch")
    assert (output.device.type, output.shape, weights.shape) == ("meta", (2, 3, 4, 7), (2, 4, 6))


def test_additive_follows_use_backend():
    with (
        fastattn.use_backend("triton"),
        pytest.raises(NotImplementedError, match="the triton backend refuses this call"),
    ):
        attend(Q.double(), K.double(), V.double(), W.double())
