"""The norm kernels under tiles and grids of every kind, whatever the heuristics choose for a size."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget, random_tensor
from fastattn_kernels.common.config import Config
from fastattn_kernels.residual_norm.backward import launch_residual_norm_bwd
from fastattn_kernels.residual_norm.config import NormBackwardConfig
from fastattn_kernels.residual_norm.forward import launch_residual_norm_fwd
from fastattn_kernels.residual_norm.problem import NormProblem
from tests.machines.marks import quick

NAMES = ("x", "residual", "weight", "bias", "x_bias", "row_scale")
FORWARD = {
    "one_row": Config(1, 128, 4, 1),
    "many_rows": Config(4, 128, 4, 1),
    "in_a_loop": Config(1, 32, 4, 1),
    "rows_in_a_loop": Config(2, 16, 4, 1),
}
# Tiles, programs, parts of a row, and whether the row's sums come from a kernel of their own.
BACKWARD = {
    "one_program": NormBackwardConfig(Config(2, 128, 4, 1), 1, 1, False),
    "programs_share_rows": NormBackwardConfig(Config(2, 128, 4, 1), 3, 1, False),
    "more_programs_than_rows": NormBackwardConfig(Config(1, 128, 4, 1), 20, 1, False),
    "two_parts": NormBackwardConfig(Config(1, 64, 4, 1), 2, 2, False),
    "four_parts_in_loops": NormBackwardConfig(Config(2, 32, 4, 1), 2, 4, False),
    "four_parts_and_sums_apart": NormBackwardConfig(Config(2, 32, 4, 1), 2, 4, True),
}


@pytest.fixture
def tensors(device):
    shapes = [(11, 100)] * 2 + [(100,)] * 3 + [(11,)]
    return {n: random_tensor(*s, seed=i, device=device) for i, (n, s) in enumerate(zip(NAMES, shapes))}


def problem(tensors: dict[str, torch.Tensor], is_rms: bool) -> NormProblem:
    x, residual, weight, bias, x_bias, row_scale = (tensors[name] for name in NAMES)
    return NormProblem(x, residual, weight, bias, x_bias, row_scale[:, None], is_rms=is_rms, unit_offset=True)


def results(tensors, is_rms, dtype):
    """Norm, sum and gradients by the reference."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    both = reference(**leaves, kind="rms" if is_rms else "layer", unit_offset=True)
    given = [random_tensor(11, 100, seed=20 + i, dtype=dtype, device=t.device) for i, t in enumerate(both)]
    return (*both, *torch.autograd.grad(both, list(leaves.values()), given))


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("tile", quick(FORWARD, "rows_in_a_loop", "many_rows"))
def test_forward_under_any_tile(tile, is_rms, tensors):
    output, total = (torch.full_like(tensors["x"], torch.nan) for _ in range(2))
    statistics = tensors["x"].new_full((3, 11), torch.nan)
    launch_residual_norm_fwd(problem(tensors, is_rms), output, total, statistics, torch.float32, FORWARD[tile])
    truth, peer = (results(tensors, is_rms, dtype) for dtype in (torch.float64, torch.float32))
    for name, actual, t, p in zip(("output", "residual"), (output, total), truth, peer):
        assert_within_budget(actual, truth=t, peer=p, name=name)
    assert statistics[: 1 if is_rms else 3].isfinite().all()


@pytest.mark.parametrize("is_rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("grid", quick(BACKWARD, "programs_share_rows", "two_parts", "four_parts_in_loops"))
def test_backward_under_any_grid(grid, is_rms, tensors, poisoned):
    output, total = (torch.empty_like(tensors["x"]) for _ in range(2))
    statistics = tensors["x"].new_empty(3, 11)
    call = problem(tensors, is_rms)
    launch_residual_norm_fwd(call, output, total, statistics, torch.float32)
    d_output, d_total = (random_tensor(11, 100, seed=20 + i, device=total.device) for i in range(2))
    d_residual, d_x = (torch.empty_like(total) for _ in range(2))
    vectors, d_row_scale = launch_residual_norm_bwd(
        call, d_output, d_total, total, statistics, d_residual, d_x, (True, True, True), True, config=BACKWARD[grid]
    )
    assert d_row_scale is not None
    truth, peer = (results(tensors, is_rms, dtype)[2:] for dtype in (torch.float64, torch.float32))
    for name, actual, t, p in zip(NAMES, (d_x, d_residual, *vectors, d_row_scale), truth, peer):
        # a sum of 100 rounded numbers errs by sqrt(100) units of the sum of their magnitudes, which is below 200
        allowance = 2.0**-24 * 10 * 200 if name == "row_scale" else 0.0
        assert_within_budget(actual, truth=t, peer=p, name=f"d_{name}", allowance=allowance)


def test_rows_of_all_programs_are_summed(device):
    """More programs than the sum of their parts takes at once, each with a row of its own."""
    x, d_output = (random_tensor(300, 20, seed=seed, device=device) for seed in (1, 2))
    call = NormProblem(x, is_rms=True, eps=0.0)
    output, total, d_x = (torch.empty_like(x) for _ in range(3))
    statistics = x.new_empty(1, 300)
    launch_residual_norm_fwd(call, output, total, statistics, torch.float32)
    (d_weight, d_bias), _ = launch_residual_norm_bwd(
        call, d_output, None, total, statistics, None, d_x, (True, True, False), False,
        config=NormBackwardConfig(Config(1, 32, 4, 1), 300, 1, False),
    )  # fmt: skip
    torch.testing.assert_close(d_bias.double(), d_output.double().sum(0), rtol=0, atol=1e-4)
    normal = x.double() * x.double().square().mean(1, keepdim=True).rsqrt()
    torch.testing.assert_close(d_weight.double(), (d_output * normal).sum(0), rtol=0, atol=1e-4)


def test_sums_do_not_depend_on_what_is_wanted(tensors):
    """Leaving out gradients changes none of the others by a bit."""
    output, total = (torch.empty_like(tensors["x"]) for _ in range(2))
    statistics = tensors["x"].new_empty(3, 11)
    call = problem(tensors, False)
    launch_residual_norm_fwd(call, output, total, statistics, torch.float32)
    found = {}
    for wanted in ((True, True, True), (True, False, False), (False, False, True)):
        d_x = torch.empty_like(total)
        vectors, _ = launch_residual_norm_bwd(call, output, None, total, statistics, None, d_x, wanted, False)
        assert torch.equal(found.setdefault("x", d_x), d_x)
        given = iter(vectors)
        for name in (n for n, w in zip(("weight", "bias", "x_bias"), wanted) if w):
            vector = next(given)
            assert torch.equal(found.setdefault(name, vector), vector)
