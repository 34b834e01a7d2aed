"""The backward in one pass: its gradients, in the same budgets as the two passes', and where it refuses."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import triton

import fastattn
from benchmarks.laboratory.cases import LOADS
from benchmarks.laboratory.compile import ROOT
from benchmarks.laboratory.targets import SHARED_MEMORY
from fastattn_kernels.attention import backward
from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass, one_pass_refusals
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.problem import Problem
from tests.compat import locked
from tests.ops.attention_cases import Case, attend, check


@pytest.fixture
def one_pass(monkeypatch):
    """Every backward goes in one pass, in plain Triton on Hopper too; counts them."""
    launches = []

    def launch(
        problem,
        d_out,
        statistics,
        delta,
        d_weights,
        gradients,
        tile_map=None,
        config=None,
        only_if=None,
    ):
        assert not one_pass_refusals(problem, needs_alibi_slopes=gradients.d_alibi_slopes is not None)
        launch_attention_bwd_one_pass(problem, d_out, statistics, delta, d_weights, gradients, tile_map, config)
        launches.append(problem)

    monkeypatch.setattr(backward, "launch_attention_bwd", launch)
    with fastattn.use_kernels("triton"):
        yield launches


CASES = [
    Case(),
    Case(dtype="bf16", causal=True, heads=(4, 2), seqlen_k=97),
    Case(dtype="fp16", causal=True, alignment="bottom_right", head_dim=128, heads=(1, 1)),
    Case(window=(5, 3), value="smaller", layout="heads_inside", heads=(1, 1)),
    Case(dtype="bf16", mask="bool-blocks", padding=True, batch=2, heads=(2, 1), seqlen_k=257),  # has a tile map
    Case(causal=True, prefix="tensor", batch=2, documents="self", heads=(1, 1), seqlen_q=130),
    Case(dtype="fp16", mask="additive-ragged", softcap=1.5, sinks="own"),
    Case(dropout=0.3, outputs="average", scale=-0.2, heads=(2, 2)),
    Case(head_dim=59, layout="every_other", seqlen_q=1, seqlen_k=3),
    Case(outputs="lse", layout="feature_map", heads=(1, 1), causal=True, seqlen_q=200, seqlen_k=3),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
@pytest.mark.usefixtures("poisoned")
def test_attention_grad_in_one_pass_matches_reference(case, device, one_pass):
    check("one pass", case, "triton", device)
    assert one_pass


def test_attention_in_one_pass_leaks_no_nan(device, one_pass):
    """What is masked out may be NaN or inf; 0 * NaN must not come out of the products, dQ's included."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 64, device=device) for length in (70, 100, 100))
    mask = torch.rand(1, 1, 70, 100, device=device) < 0.5
    mask[..., 40] = False
    gradients = []
    for hidden in (0.0, float("nan")):
        key[..., 40, :], value[..., 40, :] = hidden, hidden
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        attend(*leaves, attn_mask=mask, backend="triton").sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for clean, dirty in zip(*gradients, strict=True):
        torch.testing.assert_close(dirty, clean)
    assert len(one_pass) == 2


def test_one_pass_without_keys_gives_zeros(device):
    empty, query = torch.empty(1, 1, 0, 16, device=device), torch.randn(1, 1, 5, 16, device=device)
    problem = Problem(query, empty, empty, scale=1.0)
    statistics, delta = torch.zeros(1, 1, 2, 5, device=device), torch.zeros(1, 1, 5, device=device)
    d_query, d_empty = torch.full_like(query, float("nan")), torch.empty_like(empty)
    launch_attention_bwd_one_pass(problem, query, statistics, delta, None, Gradients(d_query, d_empty, d_empty))
    assert torch.equal(d_query, torch.zeros_like(query))


def test_one_pass_refuses_with_reasons(monkeypatch):
    query, wide = torch.empty(1, 2, 4, 64), torch.empty(1, 2, 4, 512)
    plain = Problem(query, query, query, scale=1.0)
    sloped = Problem(query, query, query, scale=1.0, alibi_slopes=torch.ones(1, 2))
    assert (
        one_pass_refusals(plain, needs_alibi_slopes=False) == one_pass_refusals(sloped, needs_alibi_slopes=False) == []
    )
    assert "slopes" in one_pass_refusals(sloped, needs_alibi_slopes=True)[0]
    assert "512" in one_pass_refusals(Problem(wide, wide, query, scale=1.0), needs_alibi_slopes=False)[0]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in one_pass_refusals(plain, needs_alibi_slopes=False)[0]


# What compiles for a GPU that is not here has a process of its own: triton decides at import whether it interprets.
COMPILE = """
import json, sys
import torch
from benchmarks.laboratory import launch_case, stand_in
from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.tile_map import tile_map_for
target, rows = sys.argv[1], []
compiled = stand_in.Compiled(target)
for case in json.loads(sys.argv[2]):
    problem = launch_case.attention_problem(case)
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, length = query.shape[:3]
    d_weights = WeightsGradient(query.new_empty(batch, length, key.shape[2]), heads) if case.get("weights") else None
    launch_attention_bwd_one_pass(
        problem, query, torch.empty(batch, heads, 2, length), torch.empty(batch, heads, length), d_weights,
        Gradients(query, key, value), tile_map_for(problem),
    )
for kernel in compiled.kernels:
    row = stand_in.resources(kernel, target)
    rows.append({name: row[name] for name in ("kernel", "registers", "spilled", "shared", "products")})
print(json.dumps(rows))
"""


@pytest.mark.parametrize(
    ("target", "head_dim"),
    [
        pytest.param(*case, marks=() if case == ("cuda:90", 128) else pytest.mark.resources)
        for case in itertools.product(("cuda:80", "cuda:90", "cuda:120", "hip:gfx942"), (64, 128, 256))
    ],
)
def test_one_pass_compiles_without_spills(target, head_dim):
    if triton.__version__ != locked("triton"):
        pytest.skip("tiles are chosen for the locked triton; `make resources-pairs` compiles with others")
    cases = [{"dtype": "bfloat16", "head_dim": head_dim, **features} for features in LOADS.values()]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", COMPILE, target, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {"_attention_bwd_dkdv_kernel", "_finish_dq_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= SHARED_MEMORY[target], row
        assert row["products"] > 0 or row["kernel"] != "_attention_bwd_dkdv_kernel", row
