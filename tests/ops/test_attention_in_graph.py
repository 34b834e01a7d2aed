"""The formula in graphs of torch.compile for a CPU: which calls it takes, and that it keeps what operators promise."""

import math
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastattn.ops.attention import in_graph
from fastattn.ops.attention.contract import AttentionCall
from fastattn.reference import visibility
from fastattn.testing import attention_inputs, random_tensor
from tests.ops.attention_cases import attend

B, H, L, S, D = 2, 2, 5, 7, 8
ROWS = torch.arange(L)
CALLS: dict[str, dict[str, Any]] = {
    "lse": {"return_lse": True},
    "weights": {"need_weights": True, "is_causal": True},
    "softcap": {"softcap": 2.0},
    "window": {"window": (2, 1)},
    "sinks": {"sinks": random_tensor(H, seed=4), "return_lse": True},
    "alibi": {"alibi_slopes": random_tensor(H, seed=5).abs(), "causal_alignment": "bottom_right"},
    "documents": {"document_ids": (ROWS.div(2).int()[None], torch.arange(S).div(2).int()[None])},
    "prefix": {"window": (1, 0), "prefix": 2},
}


class Graphs:
    """A backend of torch.compile that notes the names of the operators in its forward graphs."""

    def __init__(self):
        self.names: list[str] = []
        self.compiler = aot_autograd(fw_compiler=self._note, inference_compiler=self._note)

    def _note(self, graph, inputs):
        self.names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward

    @property
    def hold_operators(self) -> bool:
        return any("attention_forward" in name for name in self.names)


def compiled(function, *tensors, dynamic=False):
    torch._dynamo.reset()
    graphs = Graphs()
    found = torch.compile(function, backend=graphs.compiler, fullgraph=True, dynamic=dynamic)(*tensors)
    return found, graphs


def results(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CALLS)
def test_formula_is_in_the_graph_and_computes_what_the_operators_do(name):
    tensors = [t.requires_grad_() for t in attention_inputs(B, H, L, S, D, seed=1)]
    function = lambda *t: attend(*t, **CALLS[name], backend="torch")  # noqa: E731
    found, graphs = compiled(function, *tensors)
    assert graphs.names
    assert not graphs.hold_operators
    expected = function(*tensors)
    gradients = []
    for each in (results(found), results(expected)):
        gradients.append(torch.autograd.grad(torch.stack([t.square().sum() for t in each]).sum(), tensors))
    for actual, wanted in zip((*results(found), *gradients[0]), (*results(expected), *gradients[1]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", ["many scores", "sizes left open", "a window in a long sequence"])
def test_operators_stay_in_the_graph(why, monkeypatch):
    tensors = attention_inputs(B, H, L, S, D, seed=1)
    call: dict[str, Any] = {"return_lse": True}
    if why == "many scores":
        monkeypatch.setattr(in_graph, "MOST_EVALUATED", B * H * L * S - 1)
    if why == "a window in a long sequence":
        monkeypatch.setattr(in_graph, "MOST_EVALUATED", B * H * L * S)
        call["window"] = (0, 0)
    with torch.no_grad():
        _, graphs = compiled(lambda *t: attend(*t, **call, backend="torch"), *tensors, dynamic=why == "sizes left open")
    assert graphs.hold_operators


def test_length_that_is_marked_dynamic_within_bounds_is_left_open():
    tensors = attention_inputs(B, H, L, S, D, seed=1)
    for tensor, most in zip(tensors, (16, 32, 32)):
        torch._dynamo.mark_dynamic(tensor, 2, min=2, max=most)
    found, _ = compiled(lambda *t: attend(*t, is_causal=True, return_lse=True, backend="torch"), *tensors, dynamic=None)
    for actual, wanted in zip(found, attend(*tensors, is_causal=True, return_lse=True, backend="torch")):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 3e38])
def test_what_nobody_sees_takes_no_part_in_the_graph(garbage):
    """Padding, and a row that a mask leaves without keys: results, and gradients too where garbage comes in for that
    row."""
    query, key, value = attention_inputs(B, H, L, S, D, seed=1)
    padding = (torch.arange(S) >= 4).expand(B, S)
    mask = (ROWS != 2)[:, None].expand(L, S)

    def step(function, garbage):
        leaves = [t.detach().clone() for t in (query, key, value)]
        leaves[0][:, :, 2] = leaves[1][:, :, 4:] = leaves[2][:, :, 4:] = garbage
        output, lse = function(*[t.requires_grad_() for t in leaves])
        d_output, d_lse = random_tensor(B, H, L, D, seed=7), random_tensor(B, H, L, seed=8)
        d_output[:, :, 2] = d_lse[:, :, 2] = garbage
        return output, lse, *torch.autograd.grad((output, lse), leaves, (d_output, d_lse))

    def function(*tensors):
        return attend(*tensors, key_padding_mask=padding, attn_mask=mask, return_lse=True, backend="torch")

    torch._dynamo.reset()
    graphs = Graphs()
    found = step(torch.compile(function, backend=graphs.compiler, fullgraph=True), garbage)
    assert not graphs.hold_operators
    for actual, wanted in zip(found, step(function, 1.0)):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_band_in_which_all_is_seen_is_known_by_its_bounds():
    """Beside the definition: every query sees a key, and every key is seen."""
    bounds = (None, *range(-4, 5))
    for length, keys in ((1, 1), (3, 3), (2, 4), (4, 2)):
        query, key, value = attention_inputs(1, 1, length, keys, 2)
        for lower in bounds:
            for upper in bounds:
                seen = visibility(length, keys, lower=lower, upper=upper)
                call = AttentionCall(query, key, value, lower=lower, upper=upper)
                everything = bool(seen.any(-1).all() and seen.any(-2).all())
                assert in_graph.sees_all(call) == everything, (length, keys, lower, upper)
