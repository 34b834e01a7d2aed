"""The careful launches of the backward: rows of dQ and keys are marked, and only tiles with such are computed again."""

import math
from typing import Any

import pytest
import torch

from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, random_tensor
from tests import machines
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention import backward, backward_one_pass, forward
from fastattn_kernels.attention.config import BackwardConfig, careful_config
from fastattn_kernels.attention.hopper import backward as hopper
from fastattn_kernels.common import marks as _marks
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.delta import launch_delta
from fastattn_kernels.common.gradients import Gradients
from fastattn_kernels.common.marks import GradientMarks, empty_gradient_marks
from fastattn_kernels.common.problem import Problem

pytestmark = pytest.mark.usefixtures("poisoned")

# Rows and keys that fill no tile. The last keys are seen by nobody, and share a tile with keys that are.
B, H, HK, L, S, D = 2, 6, 3, 90, 140, 64
# Batch entry 0: the gradient of this row of head 1 is NaN. The keys of its group that it sees get NaN.
SPOILT_ROW = 10
# And so is the query in this row of head 3. Of keys that it does not see, dK is spoilt at first, and dV is not.
SPOILT_QUERY = 20
# Batch entry 1: this key is NaN. Rows that see it get NaN, and so do all keys that these see.
SPOILT_KEY = 40


def problem_with_nan(device, *, hides=True) -> tuple[Problem, Any]:
    """A problem under causality, and the gradient of its output."""
    query, key, value = attention_inputs(B, H, L, S, D, kv_heads=HK, dtype=torch.float16, device=device, seed=1)
    d_out = random_tensor(B, H, L, D, dtype=torch.float16, device=device, seed=2)
    key[1, :, SPOILT_KEY] = math.nan
    d_out[0, 1, SPOILT_ROW] = math.nan
    query[0, 3, SPOILT_QUERY] = math.nan
    return Problem(query, key, value, 1 / math.sqrt(D), upper=0 if hides else None), d_out


def arguments_of(problem, d_out) -> tuple[Any, ...]:
    """What every launcher takes: the forward's statistics, delta, and gradients to be written, which hold 7."""
    out = torch.empty_like(problem.query)
    statistics = torch.empty(B, H, 2, L, device=out.device)
    forward.launch_attention_fwd(problem, out, torch.empty(B, H, L, device=out.device), statistics)
    delta = launch_delta(out, d_out, None)
    return problem, d_out, statistics, delta, *(torch.full_like(x, 7.0) for x in gradients_are_like(problem))


def gradients_are_like(problem) -> tuple[Any, ...]:
    return problem.query, problem.key, problem.value


def launch_plain(problem, d_out, statistics, delta, *gradients):
    tile = Config(32, 64, 4, 1)
    config = BackwardConfig(tile, tile)
    backward.launch_attention_bwd(problem, d_out, statistics, delta, None, Gradients(*gradients), config=config)


def launch_one_pass(problem, d_out, statistics, delta, *gradients):
    tile = Config(32, 64, 4, 1)
    backward_one_pass.launch_attention_bwd_one_pass(
        problem, d_out, statistics, delta, None, Gradients(*gradients), config=tile
    )


def launch_hopper(problem, d_out, statistics, delta, *gradients, deterministic=True):
    written = Gradients(*gradients)
    hopper.launch_attention_bwd(problem, d_out, statistics, delta, written, deterministic=deterministic)


def launch_hopper_one_pass(*arguments):
    launch_hopper(*arguments, deterministic=False)


LAUNCHERS = {
    "triton": launch_plain,
    "triton-one-pass": launch_one_pass,
    "gluon": launch_hopper,
    "gluon-one-pass": launch_hopper_one_pass,
}
MODULES = (backward, backward_one_pass, hopper)


@pytest.fixture(params=quick(LAUNCHERS, "gluon", "gluon-one-pass"))
def launch(request):
    if "gluon" in request.param and not machines.RUNS_GLUON:
        pytest.skip(machines.NO_GLUON)
    return LAUNCHERS[request.param]


@pytest.fixture
def careful_launches(monkeypatch):
    """The marks that each careful launch got."""
    seen = []
    original = backward.launch_careful_bwd

    def noted(*arguments):
        seen.append(next(argument for argument in arguments if isinstance(argument, GradientMarks)))
        original(*arguments)

    for module in MODULES:
        monkeypatch.setattr(module, "launch_careful_bwd", noted)
    return seen


def not_finite(tensor):
    return ~tensor.isfinite().all(3)


def test_backward_marks_the_rows_and_keys_that_are_not_finite(launch, device, monkeypatch):
    """All of them, and no other; what it finds in the marks' memory does not matter."""
    of_rows, of_keys = (torch.full(shape, 77, dtype=torch.int8, device=device) for shape in ((B, H, L), (B, HK, S)))
    for module in MODULES:
        monkeypatch.setattr(module, "launch_careful_bwd", lambda *arguments: None)
        monkeypatch.setattr(module, "empty_gradient_marks", lambda problem: GradientMarks(of_rows, of_keys))
    arguments = arguments_of(*problem_with_nan(device))
    launch(*arguments)
    dq, dk, dv = arguments[4:]
    rows, keys = not_finite(dq), not_finite(dk) | not_finite(dv)
    assert rows[0].any() and not rows.all() and keys[0].any() and not keys.all()
    assert torch.equal(of_rows, rows.to(torch.int8))
    assert torch.equal(of_keys, keys.to(torch.int8))


def test_careful_launch_leaves_only_gradients_not_finite_that_depend_on_nan(
    launch, careful_launches, device, monkeypatch
):
    """A program looks after several tiles."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: 2)
    problem, d_out = problem_with_nan(device)
    arguments = arguments_of(problem, d_out)
    launch(*arguments)
    assert len(careful_launches) == 1
    clean = [tensor.nan_to_num(0.0).double().requires_grad_() for tensor in gradients_are_like(problem)]
    output = reference(*clean, scale=problem.scale, upper=0).output
    truths = torch.autograd.grad(output, clean, d_out.nan_to_num(0.0).double())
    rows, keys = torch.arange(L, device=device), torch.arange(S, device=device)
    spoilt_rows = torch.zeros(B, H, L, dtype=torch.bool, device=device)
    spoilt_rows[0, 1, SPOILT_ROW] = True
    spoilt_rows[0, 3, SPOILT_QUERY] = True
    spoilt_rows[1] = rows >= SPOILT_KEY
    spoilt_keys = torch.zeros(B, HK, S, dtype=torch.bool, device=device)
    spoilt_keys[0, 0] = keys <= SPOILT_ROW
    spoilt_keys[0, 1] = keys <= SPOILT_QUERY
    spoilt_keys[1] = keys < L
    for actual, truth, spoilt in zip(arguments[4:], truths, (spoilt_rows, spoilt_keys, spoilt_keys), strict=True):
        assert actual[spoilt].isnan().all()
        torch.testing.assert_close(actual[~spoilt].double(), truth[~spoilt], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("marked", [None, "rows", "keys"])
@pytest.mark.parametrize("programs_at_once", [1, 3, 1000])
def test_careful_launch_writes_only_tiles_with_a_mark(marked, programs_at_once, device, monkeypatch):
    """Where nothing is marked it writes nothing at all, whatever the gradients hold."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: programs_at_once)
    problem, d_out = problem_with_nan(device)
    arguments = arguments_of(problem, d_out)
    of_rows, of_keys = (torch.zeros(shape, dtype=torch.int8, device=device) for shape in ((B, H, L), (B, HK, S)))
    rows_written, keys_written = of_rows.bool(), of_keys.bool()
    tile = careful_config(problem.query.dtype, D, D)
    if marked == "rows":
        of_rows[1, 2, 80] = 1
        start = 80 // tile.block_m * tile.block_m
        rows_written[1, 2, start : start + tile.block_m] = True
    elif marked == "keys":
        of_keys[0, 1, 70] = 1
        start = 70 // tile.block_n * tile.block_n
        keys_written[0, 1, start : start + tile.block_n] = True
    _, _, statistics, delta, dq, dk, dv = arguments
    marks = GradientMarks(of_rows, of_keys)
    backward.launch_careful_bwd(problem, d_out, statistics, delta, None, Gradients(dq, dk, dv), marks)
    assert torch.equal((dq != 7.0).any(3), rows_written)
    assert torch.equal((dk != 7.0).any(3), keys_written)
    assert torch.equal((dv != 7.0).any(3), keys_written)


def test_backward_that_hides_nothing_has_no_careful_launch(launch, careful_launches, device):
    problem, d_out = problem_with_nan(device, hides=False)
    launch(*arguments_of(problem, d_out))
    assert empty_gradient_marks(problem) == (None, None)
    assert careful_launches == []
