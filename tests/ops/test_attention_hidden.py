"""What nobody may see may hold anything, on every path that a call can take, forward and backward.

The parity tests draw such garbage too (the axis ``garbage``), for each backend as a whole. Here every path of the torch
backend is made to take the same calls, and beside them stand the places that a random draw seldom meets.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastattn.ops.attention.call import make_call
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, random_tensor
from tests.ops.attention_cases import PATHS, Case, attend, check, hidden_places, hiding, make_problem, run_path

# Calls that hide whole rows, whole keys and single pairs, one kind of rule after the other, and together.
CASES = {
    "mask": Case(mask="bool-full", seqlen_q=12, seqlen_k=7),
    "mask_of_keys": Case(mask="bool-query", batch=2, seqlen_q=9, seqlen_k=30),
    "mask_of_rows": Case(mask="bool-key", batch=2, seqlen_q=30, seqlen_k=9),
    "bias_under_causality": Case(mask="additive-full", causal=True, seqlen_q=20, seqlen_k=30),
    "bias_of_keys_under_padding": Case(mask="additive-query", padding=True, batch=2, seqlen_q=20, seqlen_k=30),
    "wide_bias_under_a_window": Case(mask="additive-wide", window=(3, 2), dtype="bf16", seqlen_q=40, seqlen_k=30),
    "bias_under_documents": Case(mask="additive-2d", documents="cross", batch=2, seqlen_q=40, seqlen_k=90),
    "bottom_right": Case(causal=True, alignment="bottom_right", seqlen_q=40, seqlen_k=25),
    "causal_padding": Case(causal=True, padding=True, batch=2, seqlen_q=30, seqlen_k=40),
    "window_with_sinks": Case(window=(0, 0), sinks="own", seqlen_q=40, seqlen_k=25, outputs="lse"),
    "documents_of_queries_alone": Case(documents="cross", alibi="batch", batch=2, seqlen_q=40, seqlen_k=40),
    "prefix": Case(causal=True, prefix="tensor", batch=2, softcap=5.0, seqlen_q=10, seqlen_k=60),
    "weights": Case(mask="bool-full", padding=True, batch=2, outputs="average", seqlen_q=30, seqlen_k=20),
    "weights_of_heads": Case(mask="additive-full", causal=True, outputs="heads", dtype="fp16", seqlen_q=9, seqlen_k=9),
    "grouped_heads": Case(mask="bool-key", heads=(4, 2), batch=2, outputs="lse", seqlen_q=20, seqlen_k=6),
    "long": Case(mask="bool-blocks", causal=True, heads=(1, 1), seqlen_q=400, seqlen_k=400, head_dim=8),
    "long_padding": Case(padding=True, causal=True, batch=2, heads=(1, 1), seqlen_q=400, seqlen_k=257, head_dim=8),
}  # fmt: skip


@pytest.mark.parametrize("garbage", ["nan", "huge"])  # inf of both signs: in the parity tests, and by `make fuzz`
@pytest.mark.parametrize("path", ["torch", *PATHS])
@pytest.mark.parametrize("name", CASES)
def test_attention_garbage_in_hidden_places_stays_there_on_every_path(name, path, garbage, device):
    """Results and gradients are those of the call without the garbage, within the budget of any other call."""
    if path in PATHS and path != "blocks" and device.type != "cpu":
        pytest.skip("the paths that look at numbers are for CPUs")
    check("garbage in hidden places", dataclasses.replace(CASES[name], garbage=garbage), path, device)


def test_attention_hidden_places_are_there_to_be_spoiled(device):
    """The cases above hide places of every kind, so that the test above does not pass for want of garbage."""
    spoiled = set()
    for case in CASES.values():
        case = dataclasses.replace(case, garbage="nan")
        problem = make_problem(case, device, 1)
        dirty = hiding(problem)
        for name, place in hidden_places(problem).items():
            if bool(place.any()):
                assert getattr(dirty, name).isnan().any(), name
                spoiled.add(name)
    assert spoiled >= {"query", "key", "value", "attn_mask", "d_output", "d_weights", "d_lse"}


def test_attention_every_path_takes_some_of_the_calls(device):
    """A path that declined all of them would not have been tested."""
    if device.type != "cpu":
        pytest.skip("the paths that look at numbers are for CPUs")
    taken = set()
    for case in CASES.values():
        problem = make_problem(case, device, 1)
        arguments: dict[str, Any] = {
            "attn_mask": problem.attn_mask, "key_padding_mask": problem.key_padding_mask, "is_causal": case.causal,
            "causal_alignment": case.alignment, "need_weights": case.weights != "none",
        }  # fmt: skip
        call = make_call(problem.query, problem.key, problem.value, **arguments)
        with torch.no_grad():
            taken |= {path for path in PATHS if run_path(path, call) is not None}
    assert taken == set(PATHS)


B, H, L, S, D = 1, 2, 20, 24, 8


def spoiled_pairs(kind, device):
    """Query, key, value and a call in which row 5 and keys 3 and 15 hold numbers near the end of float32's range, seen
    by others, while no row sees a key with which its product would overflow."""
    query, key, value = (t.clone() for t in attention_inputs(B, H, L, S, D, device=device, seed=3))
    query[:, :, 5] *= 1e25
    key[:, :, 3] *= 1e25
    value[:, :, 15] *= 1e37
    visible = torch.ones(L, S, dtype=torch.bool, device=device)
    visible[5], visible[:, 3], visible[:, 15] = False, False, False
    visible[5, 6], visible[7, 3], visible[8, 15] = True, True, True
    query[:, :, 7] *= 1e-25
    key[:, :, 6] *= 1e-25
    if kind == "bias":
        return query, key, value, {"attn_mask": torch.zeros(L, S, device=device).masked_fill(~visible, -math.inf)}
    return query, key, value, {"attn_mask": visible}


@pytest.mark.parametrize("outputs", ["plain", "weights", "lse"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_attention_products_that_overflow_at_hidden_pairs_reach_nobody(kind, outputs, backend, device):
    """Each row and key holds finite numbers and is seen by somebody; the product of two that do not see one another is
    inf, and ``inf - inf`` is NaN. So is that of a huge value with a huge gradient."""
    query, key, value, arguments = spoiled_pairs(kind, device)
    d_output = random_tensor(B, H, L, D, seed=9, device=device)
    d_output[:, :, 9] *= 1e30  # a row that does not see key 15
    leaves = [t.requires_grad_() for t in (query, key, value)]
    more = {"weights": {"need_weights": True}, "lse": {"return_lse": True}, "plain": {}}[outputs]
    results: Any = attend(*leaves, **arguments, **more, backend=backend)
    output = results[0] if isinstance(results, tuple) else results
    found = (output, *torch.autograd.grad(output, leaves, d_output))
    truths = [t.detach().double().requires_grad_() for t in leaves]
    rule = arguments["attn_mask"]
    words: dict[str, Any] = {"mask": rule} if kind == "mask" else {"bias": rule}
    truth = reference(*truths, **words).output
    expected = (truth, *torch.autograd.grad(truth, truths, d_output.double()))
    for name, ours, theirs in zip(("output", "d_query", "d_key", "d_value"), found, expected):
        # by rows, whose magnitudes are 30 orders apart; gradients of a row that sees one key cancel
        scale = theirs.abs().amax(dim=-1, keepdim=True).clamp_min(theirs.abs().median())
        error = ((ours.double() - theirs) / scale).abs().amax()
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("derivative", ["forward mode", "second", "vmap"])
@pytest.mark.parametrize(
    "name", ["mask_of_rows", "mask_of_keys", "bias_under_causality", "causal_padding", "bottom_right"]
)
def test_attention_garbage_in_hidden_places_reaches_no_other_derivative(name, derivative, backend, device):
    """Tangents, second derivatives and per-sample gradients go through the formula, which hides what it must before
    anything is multiplied."""

    def run(problem):
        case, leaves = problem.case, problem.leaves
        fixed = {
            "key_padding_mask": problem.key_padding_mask,
            "is_causal": case.causal, "causal_alignment": case.alignment,
            **({} if problem.is_additive else {"attn_mask": problem.attn_mask}),
        }  # fmt: skip
        names = list(leaves)

        def function(*tensors):
            return attend(**dict(zip(names, tensors)), **fixed, backend=backend)

        if derivative == "forward mode":
            tangents = tuple(random_tensor(*t.shape, seed=i, device=device) for i, t in enumerate(leaves.values()))
            return torch.func.jvp(function, tuple(leaves.values()), tangents)
        if derivative == "second":
            output = function(*leaves.values())
            first = torch.autograd.grad(output, list(leaves.values()), problem.d_output, create_graph=True)
            return torch.autograd.grad([g.square().sum() for g in first], list(leaves.values()))
        stacked = [torch.stack([t, t]) for t in leaves.values()]
        return torch.vmap(lambda *tensors: torch.func.vjp(function, *tensors)[1](problem.d_output))(*stacked)

    case = dataclasses.replace(CASES[name], dtype="fp32")
    clean = make_problem(case, device, 5)
    dirty = hiding(dataclasses.replace(clean, case=dataclasses.replace(case, garbage="nan")))
    hidden = hidden_places(clean)
    # clean is what the hidden places hold elsewhere: their own derivatives are zero either way
    assert any(bool(place.any()) for place in hidden.values())
    for ours, theirs in zip(run(dirty), run(clean)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
