"""Careful tiles: what of a forward's output is not finite is computed again, by the kernel itself in plain Triton, and
in Gluon by a launch of its own, which finds the rows by their marks."""

import math
from typing import Any

import pytest
import torch

from tests import machines
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs
from fastattn_kernels.attention import forward
from fastattn_kernels.attention.config import again_options, careful_config
from fastattn_kernels.attention.hopper import forward as hopper
from fastattn_kernels.common import marks as _marks
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.problem import Problem

pytestmark = pytest.mark.usefixtures("poisoned")

# Rows that fill no tile, and keys of which causality hides more and more from the rows above.
B, H, L, S, D = 2, 3, 150, 200, 64
HIDDEN_FROM = 40  # the key that holds NaN: this row and those below it see it


def problem_with_nan(device, *, hides=True) -> Problem:
    """Under causality; the value of one key of batch entry 1 is NaN, and every tile of rows that reads it is spoilt."""
    query, key, value = attention_inputs(B, H, L, S, D, dtype=torch.float16, device=device, seed=1)
    value[1, :, HIDDEN_FROM] = math.nan
    return Problem(query, key, value, 1 / math.sqrt(D), upper=0 if hides else None)


def results_of(problem) -> Any:
    rows = problem.query.shape[:3]
    out = torch.full_like(problem.query, math.nan)
    lse, statistics = (torch.full(shape, math.nan, device=out.device) for shape in ((*rows,), (*rows[:2], 2, rows[2])))
    return out, lse, statistics


def launch_plain(problem, out, lse, statistics):
    forward.launch_attention_fwd(problem, out, lse, statistics, None, Config(64, 32, 4, 1))


def launch_hopper(problem, out, lse, statistics):
    hopper.launch_attention_fwd(problem, out, lse, statistics)


@pytest.fixture(params=quick(["triton", "gluon"], "gluon"))
def launch(request):
    if request.param == "gluon" and not machines.RUNS_GLUON:
        pytest.skip(machines.NO_GLUON)
    return {"triton": launch_plain, "gluon": launch_hopper}[request.param]


@pytest.fixture
def launches(monkeypatch):
    """Every launch of a forward: the kernel, and how many programs it has."""
    seen = []
    for module in (forward, hopper):
        original = module.launch

        def noted(kernel, grid, *arguments, original=original, **constants):
            seen.append((kernel, grid))
            original(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(module, "launch", noted)
    return seen


@pytest.mark.machine
@pytest.mark.skipif(not machines.RUNS_GLUON, reason=machines.NO_GLUON)
def test_forward_in_gluon_marks_the_rows_that_are_not_finite(device, monkeypatch):
    """All of them, and no other; what it finds in the marks' memory does not matter."""
    found = []
    monkeypatch.setattr(hopper, "launch_careful_fwd", lambda *arguments: found.append(arguments[-1]))
    monkeypatch.setattr(hopper, "empty_marks", lambda *_: torch.full((B, H, L), 77, dtype=torch.int8, device=device))
    problem = problem_with_nan(device)
    out, lse, statistics = results_of(problem)
    launch_hopper(problem, out, lse, statistics)
    (marks,) = found
    expected = ~out.isfinite().all(3)
    assert expected[1].any() and not expected[0].any()
    assert torch.equal(marks, expected.to(torch.int8))


@pytest.mark.parametrize("programs_at_once", [1, 2, 1000])
def test_careful_launch_leaves_only_rows_not_finite_that_see_it(launch, programs_at_once, device, monkeypatch):
    """However many tiles a program looks after."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: programs_at_once)
    problem = problem_with_nan(device)
    results = results_of(problem)
    launch(problem, *results)
    sees = torch.arange(L, device=device) >= HIDDEN_FROM
    assert results[0][1][:, sees].isnan().all()
    clean = Problem(problem.query, problem.key, problem.value.nan_to_num(0.0), problem.scale, upper=0)
    truth = reference(clean.query.double(), clean.key.double(), clean.value.double(), scale=clean.scale, upper=0)
    right = torch.ones(B, 1, L, 1, dtype=torch.bool, device=device)
    right[1, :, sees] = False
    torch.testing.assert_close(
        torch.where(right, results[0], 0).double(), torch.where(right, truth.output, 0), rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(results[1].double(), truth.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("marked", [None, (1, 2, 100)], ids=str)
@pytest.mark.parametrize("programs_at_once", [1, 4, 1000])  # 4: tiles that programs cannot share evenly
def test_careful_launch_writes_only_tiles_with_a_marked_row(marked, programs_at_once, device, monkeypatch):
    """Where no row is marked it writes nothing at all, whatever the output holds."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: programs_at_once)
    problem = problem_with_nan(device)
    marks = torch.zeros(B, H, L, dtype=torch.int8, device=device)
    written = torch.zeros(B, H, L, dtype=torch.bool, device=device)
    if marked is not None:
        marks[marked] = 1
        tile = careful_config(problem.query.dtype, D, D).block_m
        start = marked[2] // tile * tile
        written[marked[0], marked[1], start : start + tile] = True
    out, lse, statistics = results_of(problem)
    out.fill_(7.0)
    lse.fill_(7.0)
    statistics.fill_(7.0)
    forward.launch_careful_fwd(problem, out, lse, statistics, marks)
    assert torch.equal(lse != 7.0, written)
    assert torch.equal((out != 7.0).any(3), written)
    assert torch.equal((statistics != 7.0).any(2), written)


@pytest.mark.parametrize("marked", [0, 2400, 4999])
def test_careful_launch_finds_a_mark_wherever_it_is_in_a_long_share(marked, device, monkeypatch):
    """A program that looks after 2500 rows reads their marks in three turns."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: 1)
    query, key, value = attention_inputs(1, 1, 5000, 40, D, dtype=torch.float16, device=device, seed=1)
    marks = torch.zeros(1, 1, 5000, dtype=torch.int8, device=device)
    marks[..., marked] = 1
    lse, statistics = (torch.full(shape, 7.0, device=device) for shape in ((1, 1, 5000), (1, 1, 2, 5000)))
    problem = Problem(query, key, value, 1 / math.sqrt(D), upper=0)
    forward.launch_careful_fwd(problem, torch.empty_like(query), lse, statistics, marks)
    assert lse[..., marked] != 7.0


CAREFUL = forward._attention_fwd_careful_kernel


def test_forward_in_plain_triton_is_one_launch(launches, device):
    """What is not finite is computed again within it."""
    launch_plain(problem_with_nan(device), *results_of(problem_with_nan(device)))
    assert launches == [(forward._attention_fwd_kernel, (B * H * 3,))]


@pytest.mark.machine
@pytest.mark.skipif(not machines.RUNS_GLUON, reason=machines.NO_GLUON)
def test_forward_in_gluon_is_followed_by_one_careful_launch_where_it_hides(launches, device):
    launch_hopper(problem_with_nan(device), *results_of(problem_with_nan(device)))
    assert [kernel for kernel, _ in launches].count(CAREFUL) == 1
    assert launches[-1][0] is CAREFUL


def test_forward_that_hides_nothing_is_one_launch(launch, launches, device):
    problem = problem_with_nan(device, hides=False)
    launch(problem, *results_of(problem))
    assert _marks.empty_marks(problem, problem.query) is None
    assert len(launches) == 1
    assert launches[0][0] is not CAREFUL


@pytest.mark.parametrize("hides", [False, True])
def test_forward_in_plain_triton_has_careful_loops_only_where_it_hides(hides, device):
    problem = problem_with_nan(device, hides=hides)
    options = again_options(problem, Config(64, 16, 4, 1))
    assert options == ({"AGAIN_M": 32, "AGAIN_N": 16} if hides else {"AGAIN_M": 0, "AGAIN_N": 0})


def test_careful_launch_has_few_programs(launches, device, monkeypatch):
    """Thousands of programs that only look would take tens of microseconds to come and go."""
    monkeypatch.setattr(_marks, "multiprocessors", lambda _: 2)
    problem = problem_with_nan(device)
    marks = torch.zeros(B, H, L, dtype=torch.int8, device=device)
    out, lse, statistics = results_of(problem)
    forward.launch_careful_fwd(problem, out, lse, statistics, marks)
    assert launches == [(CAREFUL, (2 * _marks._CAREFUL_PROGRAMS,))]
