"""Packed sequences with functions on scores and masks, beside each sequence by itself in float64."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend
from tests.ops.varlen_cases import TENSORS, Case, make_problem, results_of

pytestmark = pytest.mark.usefixtures("poisoned")
attend_varlen: Any = fastattn.attention_varlen


def functions_of(leaves, first=0):
    """Of sequence, head, and positions in the sequence; the first sequence of the call has the number ``first``."""
    table, factors, reach = leaves["table"], leaves["factors"], torch.tensor([9, 2, 30, 5, 3, 4])

    def score_mod(score, batch, head, query_index, key_index):
        near = (key_index - query_index).clamp(-4, 4) + 4
        return score * factors[head].exp() + table[batch + first, near] - 0.1 * table[0, key_index % 9]

    def mask_mod(batch, head, query_index, key_index):
        distance = (key_index - query_index).abs()
        return (distance <= reach[batch + first] + head) | (key_index == 1)

    return {"score_mod": score_mod, "mask_mod": mask_mod}


def each_by_itself(problem, leaves, names):
    """Output and LSE of the rows that belong to a sequence, one call of ``attention`` after the other."""
    words, outputs, lses = problem.words, [], []
    cu_q, cu_k = (offsets.tolist() for offsets in problem.cu_seqlens)
    used = words.get("seqused_k")
    for number, (row, key) in enumerate(zip(cu_q[:-1], cu_k[:-1])):
        rows = slice(row, cu_q[number + 1])
        keys = slice(key, cu_k[number + 1] if used is None else key + int(used[number]))
        own = {name: word for name, word in words.items() if name != "seqused_k"}
        own |= {name: leaves[name] for name in ("sinks", "alibi_slopes", "attn_mask") if name in leaves}
        for name in ("prefix", "alibi_slopes"):
            each = own.get(name)
            if isinstance(each, torch.Tensor) and (name == "prefix" or each.dim() == 2):
                own[name] = each[number : number + 1]
        if "attn_mask" in own:
            own["attn_mask"] = own["attn_mask"][number : number + 1, :, : rows.stop - row, : keys.stop - key]
        own |= {name: function for name, function in functions_of(leaves, number).items() if name in names}
        tensors = (leaves[name][part].transpose(0, 1)[None] for name, part in zip(TENSORS, (rows, keys, keys)))
        output, lse = attend(*tensors, **own, return_lse=True, backend="torch")
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1)


def check(case, backend, names=("score_mod", "mask_mod")):
    """Every result and gradient of a call, and that nothing of what lies behind the sequences takes part: it is NaN."""
    problem = make_problem(case, "cpu")
    heads, count = case.heads[0], len(case.parts[0])
    dtype = problem.leaves["query"].dtype
    problem.leaves |= {"table": random_tensor(count, 9, seed=1), "factors": 0.3 * random_tensor(heads, seed=2)}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.leaves.items()}
    words = {name: function for name, function in functions_of(leaves).items() if name in names}
    words |= {name: t for name, t in leaves.items() if name not in (*TENSORS, "table", "factors")}
    qkv = (leaves[name] for name in TENSORS)
    output, lse = attend_varlen(*qkv, *problem.cu_seqlens, **problem.words, **words, return_lse=True, backend=backend)
    assert output.dtype == dtype
    found = results_of(problem, output, lse, leaves)
    wide = {name: t.detach().double().requires_grad_() for name, t in problem.leaves.items()}
    truth = results_of(problem, *each_by_itself(problem, wide, names), wide)
    allowed = 4 * max(torch.finfo(dtype).eps, 1e-6)
    for name, tensor in found.items():
        if name.startswith("d_"):
            assert tensor.dtype == problem.leaves[name[2:]].dtype
        size = truth[name].nan_to_num(neginf=0.0).abs().amax().item() if truth[name].numel() else 0.0
        torch.testing.assert_close(tensor.double(), truth[name], rtol=0, atol=allowed * max(1.0, size))


# Behind the last sequence lies NaN, over which the interpreter takes its time: in two cases only.
SAME, MORE_KEYS = ([3, 9, 1], [3, 9, 1], 2), ([3, 9, 1], [5, 21, 7], 0)
MORE_ROWS, EMPTY = ([12, 4, 6], [5, 4, 1], 0), ([0, 5, 0, 4], [3, 5, 0, 0], 0)
CASES = [
    Case(SAME, heads=(1, 1), dtype="bf16", causal=True),
    Case(MORE_KEYS, causal=True, alignment="bottom_right", heads=(2, 1)),
    Case(MORE_KEYS, heads=(1, 1), window=(4, 2), alignment="bottom_right", prefix="each"),
    Case(MORE_ROWS, heads=(1, 1), causal=True, prefix=2, softcap=1.5, scale=-0.3),
    Case(MORE_KEYS, heads=(1, 1), bias="each", used=True),
    Case(MORE_KEYS, alibi="each", sinks=True, alignment="bottom_right"),
    Case(EMPTY, heads=(1, 1), alibi="heads", causal=True, bias="each", used=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_functions_of_packed_sequences_are_those_of_each_by_itself(case, backend):
    check(case, backend)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
def test_one_function_alone(name, backend):
    check(Case(MORE_KEYS, heads=(1, 1), causal=True, sinks=True), backend, (name,))


@pytest.mark.parametrize("lengths", [([], [], 3), ([0, 0], [0, 0], 0), ([0, 3], [4, 0], 2)], ids=str)
def test_empty_sequences(lengths, backend):
    problem = make_problem(Case(lengths=lengths), "cpu")
    leaves = {name: t.requires_grad_() for name, t in problem.leaves.items()}
    leaves["table"] = torch.ones(1, 9, requires_grad=True)
    leaves["factors"] = torch.zeros(2, requires_grad=True)
    output, lse = attend_varlen(
        *(leaves[name] for name in TENSORS),
        *problem.cu_seqlens,
        **functions_of(leaves),
        return_lse=True,
        backend=backend,
    )
    assert output.shape == problem.leaves["query"].shape[:2] + (16,)
    rows = problem.rows
    assert not output[:rows].any() and (lse[:, :rows] == -torch.inf).all()
    found = torch.autograd.grad(output[:rows].sum(), list(leaves.values()), materialize_grads=True)
    for name, d in zip(leaves, found):
        assert not d.any(), name
