"""Packed sequences against the float64 reference: features alone, in pairs, and in random combinations."""

import dataclasses
import random
from typing import Any

import pytest
import torch

import fastattn
from tests.ops.varlen_cases import AXES, Case, check, make_problem
from tests.pairwise import pairwise

pytestmark = [pytest.mark.parity]

ALONE = [Case()] + [
    dataclasses.replace(Case(), **{axis: level}) for axis in AXES for level in AXES[axis] if level != AXES[axis][0]
]
PAIRS = [Case(**levels) for levels in pairwise(AXES, lambda levels: True)]


@pytest.mark.parametrize("case", [*ALONE, *PAIRS], ids=lambda case: case.id)
def test_varlen_grad_matches_reference(case, device):
    check("packed", case, "torch", device)


def test_varlen_grad_of_random_combinations_matches_reference(device):
    rng = random.Random(0)
    for _ in range(20):
        check("packed", Case(**{axis: rng.choice(levels) for axis, levels in AXES.items()}), "torch", device)


# What once was wrong, by what it was.
FOUND = {
    # The gradient of a bias for no rows was shared among no programs: a division by zero.
    "bias_of_no_rows": Case(lengths=([0], [55], 38), bias="pairs"),
}


@pytest.mark.parametrize("name", FOUND)
def test_varlen_grad_of_found_cases_matches_reference(name, backend, device):
    check("found cases", FOUND[name], backend, device)


OF_ALL_SEQUENCES = [Case(alibi="heads"), Case(alibi="each"), Case(sinks=True, causal=True)] + [
    Case(bias=bias, heads=(4, 2)) for bias in ("pairs", "each", "keys")
]


@pytest.mark.parametrize("case", OF_ALL_SEQUENCES, ids=lambda case: case.id)
def test_gradients_that_sequences_share_match_the_reference(case, device):
    """Those of slopes, sinks and biases, which the kernels, or sums behind them, add up over sequences."""
    check("packed", case, "triton", device)


@pytest.mark.parametrize("case", PAIRS[::4], ids=lambda case: case.id)
def test_operators_match_reference(case, device):
    """Graphs, and devices whose numbers are not read, go by the operators."""
    compiled: Any = torch.compile(fastattn.attention_varlen, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    check("packed", case, "torch", device, compiled)


# Triton's interpreter is slow, and the kernels have tests of their own; in plain torch the reference is held against.
BY_BACKEND = [("triton", case) for case in (*ALONE[:8], *PAIRS[::3])] + [("torch", case) for case in PAIRS[::6]]


@pytest.mark.parametrize(("backend", "case"), BY_BACKEND, ids=lambda value: getattr(value, "id", value))
def test_sequences_are_calls_of_attention(backend, case, device):
    """To the last bit: nothing of another sequence takes part. How exact those calls are, their own tests say."""
    problem = make_problem(case, device)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.leaves.items()}
    query, key, value, *_ = leaves.values()
    own: dict[str, Any] = {name: t for name, t in leaves.items() if name not in ("query", "key", "value")}
    words: dict[str, Any] = {**problem.words, **own, "return_lse": True, "backend": backend}
    cu_q, cu_k = (offsets.tolist() for offsets in problem.cu_seqlens)
    output, lse = fastattn.attention_varlen(query, key, value, *problem.cu_seqlens, **words)
    d_output, d_lse = (problem.gradient_of(t) for t in (output, lse))
    found = torch.autograd.grad((output, lse), (query, key, value), (d_output, d_lse))
    used, mask = words.pop("seqused_k", None), words.pop("attn_mask", None)
    for number in range(len(cu_q) - 1):
        rows, last = slice(cu_q[number], cu_q[number + 1]), cu_k[number + 1]
        keys = slice(cu_k[number], last if used is None else cu_k[number] + int(used[number]))
        if rows.start == rows.stop:
            continue
        own = {**words, "attn_mask": mask_of(mask, number, rows.stop - rows.start, keys.stop - keys.start)}
        for name in ("prefix", "alibi_slopes"):
            each = own.get(name)
            if isinstance(each, torch.Tensor) and (name == "prefix" or each.dim() == 2):
                own[name] = each[number : number + 1]
        tensors = [t.transpose(0, 1)[None] for t in (query[rows], key[keys], value[keys])]
        alone, its_lse = fastattn.attention(*tensors, **own)
        assert torch.equal(output[rows], alone[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], its_lse[0])
        gradients = (d_output[rows].transpose(0, 1)[None], d_lse[None, :, rows])
        expected = torch.autograd.grad((alone, its_lse), tensors, gradients)
        for packed, of_sequence, part in zip(found, expected, (rows, keys, keys)):
            assert torch.equal(packed[part], of_sequence[0].transpose(0, 1))


def mask_of(mask, number, rows, keys):
    """What a sequence has of an ``attn_mask``. A boolean one of packed sequences is added, as a bias is."""
    if mask is None:
        return None
    own = mask[(None,) * (4 - mask.dim())]
    own = (own[number : number + 1] if own.shape[0] > 1 else own)[:, :, :rows, :keys]
    return torch.where(own, 0.0, -torch.inf) if own.dtype == torch.bool else own
