"""The machine ttgir on kernels of a few lines: what it finds, where it says that is, and what its repairs are worth."""

import re

import pytest
import torch

from tests import machines

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(machines.NAME != "ttgir", reason=f"of the machine ttgir: this is {machines.NAME}"),
]
triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from tests.machines.findings import Finding  # noqa: E402


@triton.jit
def _double(x_ptr, y_ptr, size, BLOCK: tl.constexpr, GUARDED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if GUARDED:
        tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < size), mask=at < size)
    else:
        tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < size))


@triton.jit
def _sum(x_ptr, total_ptr, ATOMIC: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(total_ptr, x)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + x)


@triton.jit
def _divide(x_ptr, y_ptr, by):
    tl.store(y_ptr, tl.load(x_ptr) // by)


def line_of(text: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if text in line)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_are_right_and_stay_in_place(dtype):
    x = torch.arange(70, dtype=dtype)
    y = torch.full((80,), -1, dtype=dtype)
    _double[(3,)](x, y[5:], 70, BLOCK=32, GUARDED=True)
    assert torch.equal(y[5:75], 2 * x) and torch.all(y[:5] == -1) and torch.all(y[75:] == -1)


def test_access_out_of_bounds_is_found_with_its_line():
    x = torch.ones(70)
    with pytest.raises(Finding, match="out of bounds: a write of 26 elements") as found:
        _double[(3,)](x, torch.empty(70), 70, BLOCK=32, GUARDED=False)
    assert found.value.kind == "out of bounds"
    assert f"test_ttgir.py:{line_of('mask=at < size))')}" in found.value.where


def test_race_between_programs_is_found_and_an_atomic_is_none():
    x = torch.arange(5.0)
    total = torch.zeros(1)
    _sum[(5,)](x, total, ATOMIC=True)
    assert total.item() == 10
    with pytest.raises(Finding, match=r"race: .* by programs \(\d, 0, 0\) and \(\d, 0, 0\)") as found:
        _sum[(5,)](x, total, ATOMIC=False)
    assert f"test_ttgir.py:{line_of('tl.load(total_ptr)')}" in found.value.where


def test_operation_without_a_result_is_found():
    x, y = torch.tensor([7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _divide[(1,)](x, y, 2)
    assert y.item() == 3
    with pytest.raises(Finding, match="undefined"):
        _divide[(1,)](x, y, 0)


def test_packed_pairs_hold_the_first_operand_low():
    from tests.machines.ttgir.repairs import FRAGMENTS

    low, high = torch.tensor([1.00390625, -3.0]), torch.tensor([0.1, float("inf")])
    for name, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        words = torch.from_numpy(FRAGMENTS[f"cvt.rn.{name}.f32 $0, $2, $1;"](low.numpy(), high.numpy()))
        assert torch.equal(words.view(dtype), torch.stack((low, high), 1).to(dtype).flatten())


def test_approximate_tanh_is_as_far_off_as_it_may_be():
    from tests.machines.ttgir.repairs import FRAGMENTS

    x = torch.linspace(-3, 3, 1001)
    off = torch.from_numpy(FRAGMENTS["tanh.approx.f32 $0, $1;"](x.numpy())).double() / torch.tanh(x.double()) - 1
    off = off[x != 0].abs()
    assert off.max() < 2**-10.98 and off.min() > 2**-11.01


def test_partitions_that_wait_for_each_other_are_named():
    import random

    from tests.machines.ttgir.partitions import Partitions

    both = Partitions(random.Random(0), [])
    for name, other in (("one", "the other"), ("the other", "one")):
        both.start(name, lambda other=other: both.wait(lambda: False, lambda: other))
    with pytest.raises(Finding, match=re.escape("deadlock: one waits for the other; the other waits for one")):
        both.run()
