"""Tiles of torch's fused CPU kernel: right wherever they serve, in training too, and only there."""

from typing import Any

import pytest
import torch

from benchmarks.families.masks import in_words_of_reference
from fastattn.ops.attention import flash
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.functions import as_words
from fastattn.ops.attention.operator import operands
from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs, random_tensor
from tests.ops.attention_cases import attend

LENGTH = 200


@pytest.fixture
def ran(monkeypatch):
    """``"forward"`` and ``"backward"``, each time that they ran."""
    seen = []
    for name in ("forward", "backward"):

        def run(*args, original=getattr(flash, name), name=name):  # noqa: B008
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(flash, name, run)
    return seen


def slopes(*values: float) -> torch.Tensor:
    return torch.tensor(values)


PADDING = torch.arange(LENGTH) >= torch.tensor([[150], [LENGTH]])
DOCUMENTS = (torch.arange(LENGTH) // 37)[None]
# Of 2 batch entries, 4 heads and 2 key heads.
CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (37, 5)},
    "causal_window": {"window": (20, None), "is_causal": True},
    "first_rows_blind": {"is_causal": True, "causal_alignment": "bottom_right"},
    "last_rows_blind": {"window": (9, 5)},
    "alibi": {"alibi_slopes": slopes(0.5, 0.25, 0.1, 0.02), "is_causal": True},
    "alibi_both_ways": {"alibi_slopes": slopes(2.0, 0.25, 0.0, 0.02)},
    "alibi_of_entries": {"alibi_slopes": slopes(2.0, 0.25, 0.0, 0.02, 1.0, 1.0, 0.5, 0.3).view(2, 4), "window": (9, 9)},
    "negative_alibi": {"alibi_slopes": slopes(-0.01, 0.25, -0.02, 0.0), "is_causal": True},
    "sinks": {"sinks": slopes(1.0, 0.0, -2.0, 4.0), "is_causal": True},
    "blind_rows_and_sinks": {"sinks": slopes(1.0, 0.0, -2.0, 4.0), "window": (9, 5)},
    "blind_rows_and_no_sink": {"sinks": slopes(1.0, float("-inf"), -2.0, 4.0), "window": (9, 5)},
    "padding_and_alibi": {"key_padding_mask": PADDING, "alibi_slopes": slopes(0.5, 0.25, 0.1, 0.02)},
    "documents": {"document_ids": DOCUMENTS, "is_causal": True, "sinks": slopes(1.0, 0.0, -2.0, 4.0)},
    "prefix": {"is_causal": True, "prefix": torch.tensor([3, 90]), "sinks": slopes(1.0, 0.0, -2.0, 4.0)},
}


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Query, key and value; some rows are blind where there are fewer keys than rows."""
    keys = 150 if "blind" in name else LENGTH
    return attention_inputs(2, 4, LENGTH, keys, 16, kv_heads=2, dtype=dtype, seed=5)


def truth_and_peer(tensors, words, d_output=None):
    """What the reference gives in float64 and in the dtype of ``tensors``: the output and, of a gradient, gradients."""
    found = []
    for dtype in (torch.float64, tensors[0].dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        names = ("query", "key", "value", *(["sinks"] if len(leaves) > 3 else []))
        own = in_words_of_reference(make_call(*leaves[:3], **{**words, **dict(zip(names[3:], leaves[3:]))}))
        output = reference(*leaves[:3], **own).output
        gradients = () if d_output is None else torch.autograd.grad(output, leaves, d_output.to(dtype))
        found.append(dict(zip(("output", *(f"d_{name}" for name in names)), (output.detach(), *gradients))))
    return found


def check(results: dict[str, torch.Tensor], truth, peer):
    for name, result in results.items():
        assert_within_budget(result, truth=truth[name], peer=peer[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_evaluation_matches_the_reference(name, dtype, ran):
    tensors = inputs_of(name, dtype)
    with torch.no_grad():
        output = attend(*tensors, **CALLS[name], backend="torch")
        check({"output": output}, *truth_and_peer(tensors, CALLS[name]))
    assert set(ran) == {"forward"}


@pytest.mark.parametrize("name", CALLS)
def test_training_matches_the_reference(name, ran):
    words = CALLS[name]
    tensors = inputs_of(name)
    leaves = [t.requires_grad_() for t in (*tensors, *([words["sinks"].clone()] if "sinks" in words else []))]
    own = {**words, **({"sinks": leaves[3]} if "sinks" in words else {})}
    d_output = random_tensor(2, 4, LENGTH, 16, seed=7)
    output, _ = attend(*leaves[:3], **own, return_lse=True, backend="torch")
    gradients = torch.autograd.grad(output, leaves, d_output)
    truth, peer = truth_and_peer(leaves, words, d_output)
    check(dict(zip(truth, (output, *gradients))), truth, peer)
    # rows whose near keys are padding have a large LSE
    assert set(ran) == {"forward", "backward"} - ({"backward"} if name == "padding_and_alibi" else set())


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["entries", "heads", "rows"])
def test_expanded_queries_train(axis, ran):
    """Learned queries are one for all entries. Their output lay with the expanded axis innermost, whose elements the
    kernel's backward took for those of a row: the gradients of queries and keys were silently wrong."""
    query, key, value = inputs_of("window")
    query = query.narrow(axis, 0, 1).expand_as(query)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    d_output = random_tensor(2, 4, LENGTH, 16, seed=7)
    output, _ = attend(*leaves, **CALLS["window"], return_lse=True, backend="torch")
    assert output.is_contiguous()
    gradients = torch.autograd.grad(output, leaves, d_output)
    assert set(ran) == {"forward", "backward"}
    truth, peer = truth_and_peer(leaves, CALLS["window"], d_output)
    check(dict(zip(truth, (output, *gradients))), truth, peer)


def test_causality_alone_is_cut_into_tiles_where_that_is_faster(ran):
    for length, tiles in ((191, []), (192, ["forward"]), (767, ["forward"]), (768, [])):
        tensors = attention_inputs(1, 1, length, length, 8, seed=1)
        with torch.no_grad():
            output = attend(*tensors, is_causal=True, backend="torch")
        check({"output": output}, *truth_and_peer(tensors, {"is_causal": True}))
        assert ran == tiles
        ran.clear()


def test_lse_matches_the_reference_and_of_blind_rows_it_is_minus_infinity_or_the_sink(ran):
    query, key, value = attention_inputs(2, 4, LENGTH, 150, 16, seed=8)
    sinks, words = slopes(1.0, float("-inf"), -2.0, 4.0), {"window": (9, 5)}
    call, no_sinks = make_call(query, key, value, **words), dict[str, Any]()
    for of_sinks in no_sinks, {"sinks": sinks}:
        with torch.no_grad():
            _, lse = attend(query, key, value, **words, **of_sinks, return_lse=True, backend="torch")
        expected = reference(query, key, value, lower=call.lower, upper=call.upper, sinks=of_sinks.get("sinks")).lse
        torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-5)
        assert lse.is_contiguous()
        assert bool((lse[:, 1, -10:] == float("-inf")).all())
    assert ran == ["forward"] * 2


def test_weights_that_alibi_makes_denormal_are_left_out(ran):
    """They would take five times as long; nothing that float32 can show is lost."""
    length = 1100
    query, key, value = (0.1 * t for t in attention_inputs(1, 1, length, length, 8, seed=9))
    words = {"alibi_slopes": slopes(0.1), "is_causal": True}
    call = make_call(query, key, value, **words)
    vector = flash.by_difference(*operands(call, None, "torch"))
    assert vector is not None
    farthest = vector[vector > float("-inf")].min().item()
    assert -60.0 < farthest < -40.0
    with torch.no_grad():
        output = attend(query, key, value, **words, backend="torch")
    check({"output": output}, *truth_and_peer((query, key, value), words))
    assert set(ran) == {"forward"}


def test_a_large_lse_is_left_to_the_blocks(ran):
    """The kernel's backward makes the weights again from the LSE, whose rounding is their relative error."""
    query, key, value = attention_inputs(1, 2, LENGTH, LENGTH, 16, seed=2)
    leaves = [t.requires_grad_() for t in (100.0 * query.detach(), key, value)]
    d_output = random_tensor(1, 2, LENGTH, 16, seed=3)
    output = attend(*leaves, window=(20, 20), return_lse=True, backend="torch")[0]
    gradients = torch.autograd.grad(output, leaves, d_output)
    assert set(ran) == {"forward"}
    truth, peer = truth_and_peer(leaves, {"window": (20, 20)}, d_output)
    check(dict(zip(truth, (output, *gradients))), truth, peer)


@pytest.mark.parametrize("where", ["key", "value"])
def test_garbage_at_hidden_pairs_leaves_the_call_to_the_careful_blocks(where, ran):
    query, key, value = attention_inputs(1, 2, LENGTH, LENGTH, 16, seed=4)
    words = {"window": (20, 20)}
    with torch.no_grad():
        clean = attend(query, key, value, **words, backend="torch")
        (key if where == "key" else value)[:, :, :10] = float("nan")
        output = attend(query, key, value, **words, backend="torch")
    assert bool(output[:, :, :30].isnan().all())
    torch.testing.assert_close(output[:, :, 30:], clean[:, :, 30:])


def test_parts_tell_a_mask_mod_which_heads_and_entries_they_are(monkeypatch, ran):
    """Each part of a call that runs in float32 was a call of heads and batch entries that begin at 0."""
    monkeypatch.setattr(flash, "_MOST_WIDE", 1)
    monkeypatch.setattr(flash, "widens", lambda dtype, *_: dtype == torch.float16)
    for limit in ("MOST", "MOST_TO_EVALUATE"):
        monkeypatch.setattr(as_words, limit, 0)  # else the function is a mask by then
    reach = torch.tensor([0, 9, 20, 3])

    def near(batch, head, query_index, key_index):
        return (query_index - key_index).abs() <= reach[head] + 40 * batch

    leaves = [t.requires_grad_() for t in attention_inputs(2, 4, 64, 64, 16, kv_heads=2, dtype=torch.float16, seed=6)]
    d_output = random_tensor(2, 4, 64, 16, seed=7, dtype=torch.float16)
    output, _ = attend(*leaves, mask_mod=near, return_lse=True, backend="torch")
    gradients = torch.autograd.grad(output, leaves, d_output)
    assert set(ran) == {"forward", "backward"}
    mask = near(*torch.meshgrid(*(torch.arange(size) for size in (2, 4, 64, 64)), indexing="ij"))
    truth, peer = truth_and_peer(leaves, {"attn_mask": mask}, d_output)
    check(dict(zip(truth, (output, *gradients))), truth, peer)


@pytest.mark.parametrize("length", [20, LENGTH])
def test_output_lies_as_the_query_does(length):
    packed = torch.randn(2, length, 4, 16).transpose(1, 2)
    for query in (packed, packed.contiguous()):
        with torch.no_grad():
            output = attend(query, query, query, window=(8, 0), backend="torch")
        assert output.stride() == query.stride()
