"""The launchers of additive attention: any tile, any strides, padding that nobody reads, and every target."""

from typing import Any

import pytest
import torch

from fastattn.reference import additive_attention as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests import machines
from tests.kernels.cross_compile import SHARED_MEMORY
from tests.kernels.test_cross_compile import TARGETS, compile_for
from tests.machines.marks import quick

triton = pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.additive_attention.backward import launch_additive_bwd  # noqa: E402
from fastattn_kernels.additive_attention.config import AdditiveBackwardConfig, ColumnsConfig  # noqa: E402
from fastattn_kernels.additive_attention.forward import launch_additive_fwd  # noqa: E402
from fastattn_kernels.additive_attention.pairs import launch_additive_weights  # noqa: E402
from fastattn_kernels.additive_attention.problem import AdditiveProblem, columns, padded  # noqa: E402
from fastattn_kernels.common.config import Config  # noqa: E402
from fastattn_kernels.common.delta import launch_delta  # noqa: E402
from fastattn_kernels.common.gradients import Gradients  # noqa: E402
from fastattn_kernels.common.tile_map import TileMap  # noqa: E402

B, H, L, S, A, DV = 1, 2, 70, 90, 3, 6
FORWARD = {"small": Config(16, 16, 4, 1), "wide": Config(16, 64, 4, 1), "tall": Config(64, 16, 4, 1)}
BACKWARD = {
    "small": AdditiveBackwardConfig(Config(16, 16, 4, 1), ColumnsConfig(16, 16, 1, 4), ColumnsConfig(16, 16, 4, 4)),
    "wide": AdditiveBackwardConfig(Config(16, 64, 4, 1), ColumnsConfig(16, 64, 2, 4), ColumnsConfig(64, 16, 8, 4)),
    "tall": AdditiveBackwardConfig(Config(64, 16, 4, 1), ColumnsConfig(64, 16, 8, 4), ColumnsConfig(16, 64, 2, 4)),
}


def problem(device: torch.device, upper: int | None = None, mask: torch.Tensor | None = None) -> AdditiveProblem:
    """Tensors of odd strides: nothing is contiguous, and the weight has gaps."""
    query, key = (random_tensor(B, n, 2 * A, H, seed=i, device=device).permute(0, 3, 1, 2)[..., ::2]
                  for i, n in enumerate((L, S)))  # fmt: skip
    value = random_tensor(B, H, DV, S, seed=2, device=device).mT
    weight = random_tensor(H, 3 * A, seed=3, device=device)[:, ::3]
    return AdditiveProblem(query, key, value, 1.0, mask=mask, upper=upper, weight=weight)


def results(call: AdditiveProblem, d_out: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in (call.query, call.key, call.value, call.weight)]
    found = reference(*leaves, mask=call.mask, upper=call.upper)
    return [*(t.detach() for t in found), *torch.autograd.grad(found.output, leaves, d_out.to(dtype))]


def run(call: AdditiveProblem, d_out: torch.Tensor, name: str, tile_map: TileMap | None = None) -> list[torch.Tensor]:
    """Output, weights and gradients, into buffers of NaN with strides of their own."""

    def poisoned(*shape: int) -> torch.Tensor:
        buffer = torch.full((*shape[:-2], shape[-1], 2 * shape[-2]), torch.nan, device=d_out.device)
        return buffer.mT[..., ::2, :]

    output, weights = poisoned(B, H, L, DV), poisoned(B, H, L, S)
    statistics = torch.full((B, H, 2, L), torch.nan, device=d_out.device)
    launch_additive_fwd(call, output, statistics, tile_map, FORWARD[name])
    launch_additive_weights(call, statistics, weights, FORWARD[name])
    d_query, d_key, d_value = (poisoned(*t.shape) for t in (call.query, call.key, call.value))
    delta = launch_delta(output, d_out, None)
    d_weight, d_scores = launch_additive_bwd(
        call, d_out, statistics, delta, None, None, Gradients(d_query, d_key, d_value), tile_map, BACKWARD[name]
    )
    assert d_scores.shape == (B, H, L, S)
    assert not d_scores[weights == 0].any()
    return [output, weights, d_query, d_key, d_value, d_weight]


@pytest.mark.parametrize("upper", [None, -3], ids="upper_{}".format)
@pytest.mark.parametrize("name", quick(FORWARD, "wide"))
def test_additive_under_any_tile(name, upper, device, poisoned):
    call, d_out = problem(device, upper), random_tensor(B, H, L, DV, seed=4, device=device)
    found = run(call, d_out, name)
    names = ("output", "weights", "d_query", "d_key", "d_value", "d_weight")
    truth, peer = results(call, d_out, torch.float64), results(call, d_out, torch.float32)
    for name, a, t, p in zip(names, found, truth, peer):
        # twelve ulps of the largest sum: of scores of three terms, summed up twice
        allowance = 12 * torch.finfo(torch.float32).eps * t.abs().max().item()
        assert_within_budget(a, truth=t, peer=p, name=name, allowance=allowance)


def test_additive_tile_map_changes_no_bit(device):
    """What no row sees is left out, in whole tiles; the rest is computed in the same order."""
    mask = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)
    mask[..., :64, 64:] = mask[..., 64:, :20] = False
    call, d_out = problem(device, mask=mask), random_tensor(B, H, L, DV, seed=4, device=device)
    for actual, expected in zip(run(call, d_out, "wide", TileMap(call)), run(call, d_out, "wide")):
        if machines.NAME in ("interpreter", "ttgir"):
            assert torch.equal(actual, expected)
        else:  # other multiply-adds are fused in tiles that are seen whole than in those that are not
            torch.testing.assert_close(actual, expected, rtol=2**-18, atol=2**-18)


@pytest.mark.usefixtures("poisoned")
def test_additive_columns_end_in_zeros(device):
    tensor = random_tensor(2, 3, 5, 4, seed=0, device=device)
    tensor[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    copy, finite = columns(tensor), columns(tensor, finite=True)
    assert copy.shape == (2, 3, 4, 64)
    assert copy.is_contiguous()
    assert torch.equal(copy[..., :5].nan_to_num(), tensor.mT.nan_to_num())
    assert not copy[..., 5:].any()
    assert finite.isfinite().all()
    largest = torch.finfo(torch.float32).max
    assert finite[0, 0, :, 0].tolist() == [0.0, largest, -largest, 1.0]
    assert [padded(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


# --------------------------------------------------------------------------------------------------- cross-compilation

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": dict.fromkeys(("causal", "padding", "mask"), True),
    "everything": dict.fromkeys(("causal", "padding", "mask", "bias", "weights"), True),
}
KERNELS = {"_additive_fwd_kernel", "_additive_pairs_kernel", "_additive_bwd_columns_kernel"}
QUICK = [("bfloat16", "cuda:90")]


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        pytest.param(dtype, target, marks=() if (dtype, target) in QUICK else pytest.mark.resources)
        for dtype in ("bfloat16", "float32")
        for target in TARGETS
    ],
)
def test_additive_compiles_without_spills(dtype, target):
    """The configurations, all of them under `make resources`; the tangent is one instruction where there is one."""
    cases = [
        {"dtype": dtype, "attention_dim": 100, "value_dim": value_dim, "length": 100, "keys": 100, **features}
        for value_dim in ((64,) if (dtype, target) in QUICK else (64, 128, 256, 512))
        for features in FEATURES.values()
    ]
    rows = compile_for(target, cases)
    assert {row["kernel"] for row in rows} >= KERNELS
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        assert row["spilled"] == 0, what
        if row["kernel"] in KERNELS and target.startswith("cuda"):
            # Four columns a turn, in two loops of the forward where tiles may be seen whole, and each element once: in
            # some layouts two warps do the same ones, which takes twice the time and shows nowhere else.
            turns = {"_additive_fwd_kernel": 4 if row["case"].get("mask") else 8, "_additive_pairs_kernel": 4}
            expected = turns.get(row["kernel"], 1) * row["tile"] if dtype != "float32" else 0
            assert row["tangents"] * 32 * row["warps"] == expected, what


def test_additive_run_time_values_do_not_recompile():
    """Lengths and numbers of columns, none of which makes a stride a multiple of sixteen, share each kernel."""
    sizes = ((97, 130, 33), (33, 7, 7), (511, 1023, 65))
    cases = [{"dtype": "bfloat16", "attention_dim": a, "length": n, "keys": s, "careful": True, "causal": True}
             for n, s, a in sizes]  # fmt: skip
    compiled: dict[Any, set] = {}
    for row in compile_for("cuda:90", cases):
        compiled.setdefault((row["kernel"], row["careful"]), set()).add(row["hash"])
    # once for queries and once for keys
    expected = {key: 2 if key[0] == "_additive_bwd_columns_kernel" else 1 for key in compiled}
    assert {key: len(hashes) for key, hashes in compiled.items() if key[0] in KERNELS} == {
        key: number for key, number in expected.items() if key[0] in KERNELS
    }
