"""The simulation of the Hopper forward's schedules: what it must keep, and that it numbers tiles as the kernel does."""

import itertools
from typing import get_args

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from benchmarks.__main__ import main
from benchmarks.laboratory.schedule import MASKS, SHAPES, Schedule, Shape, order, simulate, visits
from fastattn_kernels.attention.hopper.config import forward_config
from fastattn_kernels.attention.hopper.schedule import row_tile_at
from fastattn_kernels.common.problem import Problem

SMALL = [Shape(2, 3, 1000, 128), Shape(1, 40, 2048, 128), Shape(3, 2, 130, 64), Shape(1, 7, 16384, 256)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_every_tile_is_computed_once(schedule, mask, shape):
    for programs in (1, 5, 132):
        outcome = simulate(schedule, mask, shape, programs)
        computed = [tile for own in outcome.assigned for tile in own]
        every = set(itertools.product(range(shape.tiles_m), range(shape.batch * shape.heads)))
        assert len(computed) == len(every) and set(computed) == every
        assert len(outcome.assigned) <= programs
        assert 0 < outcome.efficiency < outcome.balance <= 1


def test_one_program_is_in_balance():
    assert simulate("dynamic", "causal", SMALL[0], 1).balance == pytest.approx(1.0)


@pytest.mark.parametrize("mask", MASKS)
def test_visits_are_the_tiles_that_hold_a_visible_pair(mask):
    """Counted pair by pair, under the masks that need no random numbers."""
    shape = Shape(1, 1, 1000, 128)
    row, col = torch.arange(1000)[:, None], torch.arange(1000)
    seen = {
        "full": torch.ones(1000, 1000, dtype=torch.bool),
        "causal": col <= row,
        "window": (col <= row) & (col > row - 1000 // 8),
    }.get(mask)
    if seen is None:
        shape = Shape(2, 1, 1000, 128)
        count = visits(mask, shape)
        counts = [count(tile, 1) for tile in range(shape.tiles_m)]
        assert min(counts) >= 1 and max(counts) <= 8
        assert counts != [visits(mask, shape, seed=1)(tile, 1) for tile in range(shape.tiles_m)]
        return
    count = visits(mask, shape)
    for tile in range(shape.tiles_m):
        rows = seen[tile * 128 : (tile + 1) * 128]
        assert count(tile, 0) == sum(bool(rows[:, n : n + 128].any()) for n in range(0, 1000, 128))


@triton.jit
def _number_tiles(at_ptr, tiles_m, heads_abreast, absent):
    """The place of each program's tile."""
    row_tile, head = row_tile_at(tl.program_id(0), tiles_m, heads_abreast, absent)
    tl.store(at_ptr + 2 * tl.program_id(0), row_tile)
    tl.store(at_ptr + 2 * tl.program_id(0) + 1, head)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_order_is_that_of_the_kernel(shape, device):
    tiles = order(shape)
    found = torch.full((len(tiles), 2), -1, dtype=torch.int32, device=device)
    absent = -(shape.batch * shape.heads) % shape.heads_abreast
    _number_tiles[(len(tiles),)](found, shape.tiles_m, shape.heads_abreast, absent)
    assert [tuple(tile) for tile in found.tolist()] == tiles


def test_the_forward_chooses_as_the_simulation_says(device):
    """The counter where something hides keys, and only there: at L >= 1024 it is as good as any to a twentieth, and
    balances causal tiles to 0.955 at least."""
    x = torch.empty(1, 1, 1024, 128, dtype=torch.bfloat16, device=device)
    assert forward_config(Problem(x, x, x, 1.0)).schedule == "static"
    assert forward_config(Problem(x, x, x, 1.0, upper=0)).schedule == "dynamic"
    padding = torch.zeros(1, 1024, dtype=torch.bool, device=device)
    assert forward_config(Problem(x, x, x, 1.0, key_padding_mask=padding)).schedule == "dynamic"
    for mask, shape in itertools.product(MASKS, SHAPES):
        found = {name: simulate(name, mask, shape) for name in get_args(Schedule)}
        chosen = found["static" if mask == "full" else "dynamic"]
        if mask == "causal":
            assert chosen.balance >= 0.955, shape
        if shape.length >= 1024:
            assert chosen.efficiency >= 0.95 * max(outcome.efficiency for outcome in found.values()), (mask, shape)


def test_command_line_prints_the_simulation(capsys):
    assert main(["laboratory", "--schedules"]) == 0
    printed = capsys.readouterr().out
    assert all(mask in printed for mask in MASKS) and "balance / efficiency" in printed
