"""Packed sequences: what others get wrong, what is refused, and what autograd, transforms and graphs make of them."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import grad, jvp, vmap

import fastattn
from fastattn.testing import random_tensor
from tests.ops.varlen_cases import offsets

H, D = 2, 8


def draw(rows, seed=0, heads=H, dtype=torch.float32):
    return random_tensor(rows, heads, D, seed=seed, dtype=dtype)


def packed(lengths, rest=0, **options):
    return tuple(draw(sum(lengths) + rest, seed, **options) for seed in range(3)), offsets(lengths)


def attend(*arguments, **words) -> Any:
    return fastattn.attention_varlen(*arguments, backend="torch", **words)


# ------------------------------------------------------------------------------------------------ what others get wrong


@pytest.mark.parametrize("past", [float("nan"), float("inf")])
def test_rows_past_the_last_sequence_get_no_gradient_and_give_none(past):
    """torch's ``varlen_attn`` gives NaN gradients there (pytorch#176793)."""
    (query, key, value), cu = packed([4, 6], rest=5)
    for tensor in (query, key, value):
        tensor[10:] = past
        tensor.requires_grad_()
    output = attend(query, key, value, cu, is_causal=True)
    d_output = torch.ones_like(output)
    d_output[10:] = past
    for d in torch.autograd.grad(output, (query, key, value), d_output):
        assert d[:10].isfinite().all() and d[:10].abs().sum() > 0
        assert torch.equal(d[10:], torch.zeros_like(d[10:]))


@pytest.mark.parametrize("lengths", [[0], [0, 0], [], [0, 3, 0], [3, 0, 0]])
def test_empty_sequences(lengths):
    """flash-attention returned wrong shapes for them (FA#1537, #2421, #2568)."""
    (query, key, value), cu = packed(lengths)
    query.requires_grad_()
    output, lse = attend(query, key, value, cu, return_lse=True)
    assert output.shape == query.shape and lse.shape == (H, sum(lengths))
    (d_query,) = torch.autograd.grad(output.sum() + lse.sum(), query, allow_unused=True)
    assert d_query is not None and d_query.shape == query.shape


def test_no_sequence_has_no_keys_in_use():
    """``seqused_k`` of no sequence was refused: ``has shape (0,): expected [0]``."""
    (query, key, value), cu = packed([], rest=3)
    output = attend(query, key, value, cu, seqused_k=torch.zeros(0, dtype=torch.int32))
    assert output.shape == query.shape


def test_rows_without_keys_and_keys_without_rows():
    query, (key, value) = draw(7).requires_grad_(), (draw(5, seed).requires_grad_() for seed in (1, 2))
    cu_q, cu_k = offsets([4, 0, 3]), offsets([0, 2, 3])
    output, lse = attend(query, key, value, cu_q, cu_k, return_lse=True)
    assert torch.equal(output[:4], torch.zeros_like(output[:4]))
    assert torch.equal(lse[:, :4], torch.full_like(lse[:, :4], -torch.inf))
    d_query, d_key, d_value = torch.autograd.grad(output.square().sum(), (query, key, value))
    assert torch.equal(d_query[:4], torch.zeros_like(d_query[:4]))
    for d in (d_key, d_value):
        assert torch.equal(d[:2], torch.zeros_like(d[:2])) and d[2:].abs().sum() > 0


def test_gradient_of_the_lse_flows():
    """torch's ``varlen_attn`` drops it without a word."""
    (query, key, value), cu = packed([4, 6])
    query.requires_grad_()
    _, lse = attend(query, key, value, cu, return_lse=True)
    (found,) = torch.autograd.grad(lse.sum(), query)
    expected = torch.cat([
        torch.softmax(query[rows].transpose(0, 1) @ key[rows].permute(1, 2, 0) / D**0.5, -1) @ key[rows].transpose(0, 1)
        for rows in (slice(0, 4), slice(4, 10))
    ], 1).transpose(0, 1) / D**0.5  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_dropout_is_drawn_for_each_sequence_and_ruled_by_the_seed():
    query = key = torch.zeros(40, 1, D)
    value = torch.eye(20, D).repeat(2, 1)[:, None]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attend(query, key, value, offsets([20, 20]), dropout_p=0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][:20], found[0][20:])
    compiled: Any = torch.compile(fastattn.attention_varlen, backend="eager", fullgraph=True)
    by_operator = compiled(query, key, value, offsets([20, 20]), dropout_p=0.5, backend="torch")
    assert not torch.equal(by_operator[:20], by_operator[20:])
    kept = by_operator.count_nonzero().item() / found[0].count_nonzero().item()
    assert 0.7 < kept < 1.4


# -------------------------------------------------------------------------------------- derivatives, transforms, graphs


def of_pairs(*tensors) -> Any:
    query, key, value, bias = tensors
    words = {"attn_mask": bias, "is_causal": True, "causal_alignment": "bottom_right", "return_lse": True}
    return attend(query, key, value, offsets([2, 3]), offsets([3, 3]), **words)


def leaves():
    tensors = draw(5, 1, 1), draw(6, 2, 1), draw(6, 3, 1), random_tensor(2, 1, 3, 3, seed=4)
    return tuple(t.double().requires_grad_() for t in tensors)


def test_all_derivatives_are_right():
    assert torch.autograd.gradcheck(of_pairs, leaves(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_pairs, leaves())


def test_functional_transforms_agree_with_autograd():
    tensors = leaves()
    (expected,) = torch.autograd.grad(of_pairs(*tensors)[0].square().sum(), tensors[0])
    detached: Any = tuple(t.detach() for t in tensors)
    torch.testing.assert_close(grad(lambda *t: of_pairs(*t)[0].square().sum())(*detached), expected)
    direction = torch.ones_like(detached[0])
    _, tangent, *_ = jvp(lambda query: of_pairs(query, *detached[1:])[0].square().sum(), (detached[0],), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    batch = torch.stack([detached[0], 2 * detached[0]])
    found = vmap(lambda query: of_pairs(query, *detached[1:])[0])(batch)
    torch.testing.assert_close(found[1], of_pairs(batch[1], *detached[1:])[0])


def test_more_and_longer_sequences_compile_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(fastattn.attention_varlen, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([3, 9], [4, 5, 6], [7, 2, 11, 30]):
        (query, key, value), cu = packed(lengths)
        torch.testing.assert_close(compiled(query, key, value, cu, backend="torch"), attend(query, key, value, cu))
    assert counter.frame_count == 1


def test_operators_pass_opcheck():
    from fastattn.ops.attention.varlen import operator
    from fastattn.ops.attention.varlen.call import make_call

    (query, key, value), cu = packed([3, 5], rest=1)
    inputs, options = operator.operands(make_call(query.requires_grad_(), key, value, cu, None), None, "torch")
    torch.library.opcheck(torch.ops.fastattn.attention_varlen_forward.default, (*inputs, *options), test_utils=(
        "test_schema", "test_faketensor",
    ))  # fmt: skip


def test_export_is_refused():
    (query, key, value), cu = packed([3, 5])

    class Module(torch.nn.Module):
        def forward(self, query, key, value, cu):
            return fastattn.attention_varlen(query, key, value, cu)

    with pytest.raises(Exception, match="attention_varlen cannot be exported"):
        torch.export.export(Module(), (query, key, value, cu))


def test_explanation_names_the_backends():
    (query, key, value), cu = packed([3, 5])
    explained = fastattn.explain(fastattn.attention_varlen, query, key, value, cu, backend="torch")
    assert (explained.backend, explained.path) == ("torch", "attention of each sequence by itself")
    wide = tuple(torch.randn(8, 1, 600) for _ in range(3))
    assert "head_dim=600" in str(fastattn.explain(fastattn.attention_varlen, *wide, cu, backend="auto"))


# ------------------------------------------------------------------------------------------------------ what is refused

x, cu = draw(6), torch.tensor([0, 2, 6], dtype=torch.int32)
REFUSED: dict[str, tuple[Any, ...]] = {
    "a list": (TypeError, "query: expected a torch.Tensor", (x.tolist(), x, x, cu), {}),
    "four dimensions": (ValueError, r"query has shape .*: expected 3 dimensions", (x[None], x, x, cu), {}),
    "another dtype": (TypeError, "value is torch.float64 but query is torch.float32", (x, x, x.double(), cu), {}),
    "integers": (TypeError, "query is torch.int64", (x.long(), x.long(), x.long(), cu), {}),
    "head sizes": (ValueError, "the same head size", (x, x[..., :4], x, cu), {}),
    "keys and values": (ValueError, "the same rows and heads", (x, x, x[:5], cu), {}),
    "heads": (ValueError, "multiple of the 3 key heads", (x, draw(6, heads=3), draw(6, heads=3), cu), {}),
    "offsets in int64": (TypeError, "cu_seqlens_q is torch.int64: expected torch.int32", (x, x, x, cu.long()), {}),
    "a list of offsets": (TypeError, "cu_seqlens_q: expected an int32 tensor", (x, x, x, [0, 6]), {}),
    "offsets of two dimensions": (ValueError, "cu_seqlens_q has shape", (x, x, x, cu[None]), {}),
    "no offsets": (ValueError, "cu_seqlens_q has shape", (x, x, x, cu[:0]), {}),
    "offsets of other keys": (ValueError, "cu_seqlens_k is None for 6", (x, draw(7), draw(7), cu), {}),
    "fewer offsets of keys": (ValueError, r"cu_seqlens_k has shape \(2,\): expected \[3\]", (x, x, x, cu, cu[:2]), {}),
    "offsets that fall": (
        ValueError, "cu_seqlens_q falls from 4 to 2 at sequence 1",
        (x, x, x, torch.tensor([0, 4, 2], dtype=torch.int32)), {},
    ),
    "offsets past the end": (
        ValueError, "cu_seqlens_q ends with 7: expected at most the 6 packed rows",
        (x, x, x, torch.tensor([0, 4, 7], dtype=torch.int32)), {},
    ),
    "offsets that begin late": (ValueError, "cu_seqlens_q begins with 1", (x, x, x, cu + 1), {}),
    "more keys in use": (
        ValueError, "seqused_k is 3 at sequence 0: expected 0 to its 2 keys", (x, x, x, cu),
        {"seqused_k": torch.tensor([3, 1], dtype=torch.int32)},
    ),
    "a longer sequence": (ValueError, "max_seqlen_q=3: expected at least 4", (x, x, x, cu), {"max_seqlen_q": 3}),
    "a length that is none": (TypeError, "max_seqlen_k='4'", (x, x, x, cu), {"max_seqlen_k": "4"}),
    "a small bias": (
        ValueError, "attn_mask has size 3 at dimension -2", (x, x, x, cu), {"attn_mask": torch.zeros(3, 4)}
    ),
    "a bias of other heads": (
        ValueError, "attn_mask has shape", (x, x, x, cu), {"attn_mask": torch.zeros(3, 4, 4)}
    ),
    "a bias of integers": (
        TypeError, "attn_mask is torch.int64", (x, x, x, cu), {"attn_mask": torch.zeros(4, 4).long()}
    ),
    "an LSE that is no flag": (TypeError, "return_lse=1: expected True or False", (x, x, x, cu), {"return_lse": 1}),
    "weights": (ValueError, "need_weights=True", (x, x, x, cu), {"need_weights": True}),
    "slopes of other sequences": (
        ValueError, "alibi_slopes has shape", (x, x, x, cu), {"alibi_slopes": torch.ones(3, H)}
    ),
    "a softcap of 0": (ValueError, "softcap=0.0", (x, x, x, cu), {"softcap": 0.0}),
    "an alignment": (ValueError, "causal_alignment='left'", (x, x, x, cu), {"causal_alignment": "left"}),
    "a window": (ValueError, "window=", (x, x, x, cu), {"window": (-1, 0)}),
    "a dropout": (ValueError, "dropout_p=2.0", (x, x, x, cu), {"dropout_p": 2.0}),
    "a backend": (ValueError, "backend='cuda'", (x, x, x, cu), {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_named(name):
    error, message, arguments, words = REFUSED[name]
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(*arguments, **words)
