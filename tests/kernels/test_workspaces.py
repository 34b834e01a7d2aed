"""The workspaces of a plan that hands over addresses: side by side in one allocation, and none in another's memory."""

import ctypes
import types

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.common import plans, workspaces
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.recording import Launched, Made

SIZE = 5  # no multiple of what workspaces are aligned to


def _numbers(address):
    return (ctypes.c_float * SIZE).from_address(address)


class _AddOne:
    """Stands for a kernel: ``out = x + 1``. Like a compiled one it can be launched on addresses, at once."""

    def fn(self, out, x):
        """Has the signature of the kernel."""

    function, packed_metadata = None, None

    def __getitem__(self, grid):
        def launched(out, x):
            out[:SIZE] = x[:SIZE] + 1
            return self

        return launched

    @staticmethod
    def run(x_grid, y_grid, z_grid, stream, function, metadata, a, b, c, out, x):
        _numbers(out)[:] = [number + 1 for number in _numbers(x)]


@pytest.fixture
def written(monkeypatch):
    """Writes the plan of a function of one tensor: its recording, and a function that runs it."""
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=lambda device: 0))
    monkeypatch.setattr(plans.triton.runtime, "driver", driver)
    monkeypatch.setattr(plans, "HAND_OVER_ADDRESSES", True)
    kept = []
    monkeypatch.setattr(
        plans,
        "pooled",
        lambda *arguments: kept.append(workspaces.pooled(*arguments)) or kept[-1],
    )

    def write(function):
        x = torch.arange(float(SIZE))
        result, plan = plans.record(function, (x,))
        assert plan is not None
        steps, views = kept.pop()
        return result, plan, steps, views

    return write


def _chain(x):
    """``x + 4`` through three workspaces, one of them behind the beginning of its memory, and ``x + 2``."""
    kernel = _AddOne()
    first, second, third = x.new_empty(SIZE), x.new_empty(2, SIZE), x.new_empty(SIZE + 3)
    returned, seen, out = x.new_empty(SIZE), x.new_zeros(SIZE), x.new_empty(SIZE)
    for to, of in ((first, x), (second[1], first), (third, second[1]), (out, third), (seen, x), (returned, seen)):
        launch(kernel, (1,), x, to, of)
    return out, returned, seen.sum()


def test_workspaces_share_one_allocation_and_keep_out_of_each_other_s_way(written):
    result, plan, steps, views = written(_chain)
    pool, *others = [step for step in steps if isinstance(step, Made)]
    assert pool.dtype == torch.uint8
    assert len(others) == 2  # what is returned; what operators of torch read is made by one
    for seed in range(3):
        x = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        out, returned, total = plan.run(x)
        torch.testing.assert_close((out, returned, total), (x + 4, x + 2, (x + 1).sum()))
    torch.testing.assert_close(result[0], torch.arange(4.0, 4.0 + SIZE))
    places = sorted({view.offset for view in views.values() if view.base == pool.made})
    # the three, and the second row of one of them
    assert places == [0, 256, 256 + 4 * SIZE, 512]
    assert sum(isinstance(step, Launched) for step in steps) == 6


def test_large_workspaces_are_freed_one_by_one(written, monkeypatch):
    monkeypatch.setattr(workspaces, "_BYTES", 4 * SIZE)
    _, plan, steps, _ = written(_chain)
    assert [step.dtype for step in steps if isinstance(step, Made)] == [torch.float32] * 5
    x = torch.ones(SIZE)
    torch.testing.assert_close(plan.run(x)[0], x + 4)
