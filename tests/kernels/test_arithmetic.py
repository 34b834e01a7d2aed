"""Arithmetic that the text of a user's function may call, against torch, where Triton's own would differ."""

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn_kernels.common.functions import compiled  # noqa: E402

INF, NAN = math.inf, math.nan
TINY, HALF = 2.0**-24, 0.5 - 2.0**-25  # 1 + TINY is 1, and HALF is the largest float32 below 1 / 2
BLOCK = 256


@triton.jit
def _applied_kernel(out_ptr, a_ptr, b_ptr, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """FUNCTION of the elements of two arrays."""
    at = tl.arange(0, BLOCK)
    inside = at < size
    found = FUNCTION(tl.load(a_ptr + at, mask=inside, other=1), tl.load(b_ptr + at, mask=inside, other=1))
    tl.store(out_ptr + at, found, mask=inside)


def applied(expression: str, a, b=None, out=None):
    """An expression of ``a`` and ``b``, one-dimensional tensors of a size, as a kernel computes it."""
    b = a if b is None else b
    found = torch.full_like(a, -77) if out is None else torch.full(a.shape, -77, dtype=out, device=a.device)
    text = f"@triton.jit\ndef function(a, b):\n    return {expression}\n"
    _applied_kernel[(1,)](found, a, b, len(a), FUNCTION=compiled(text, "function"), BLOCK=BLOCK)
    return found


def pairs(*values):
    """Every pair of some values, as two tensors."""
    return torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).T.contiguous().unbind()


def assert_same(actual, expected, ulps: float = 0.0):
    """Equal, NaN where NaN is expected, to so many units in the last place of float32."""
    torch.testing.assert_close(actual, expected, rtol=ulps * 2.0**-23, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 5])
def test_index_on_axis_counts_from_the_end_and_leaves_the_axis(size, device):
    index = torch.arange(-8, 8, dtype=torch.int32, device=device)
    is_inside = (index >= -size) & (index < size)
    place = applied("index_on_axis(a, b)", index, torch.full_like(index, size), torch.int64)
    assert torch.equal(place[is_inside], torch.arange(size, device=device)[index.long()[is_inside]])
    found = applied("is_on_axis(index_on_axis(a, b), b)", index, torch.full_like(index, size), torch.int8)
    assert torch.equal(found != 0, is_inside)


def test_index_on_axis_takes_large_axes(device):
    index = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    found = applied("index_on_axis(a, b)", index, torch.full_like(index, 5000000000, dtype=torch.int64), torch.int64)
    assert found.tolist() == [4999999999, 2**31 - 1, 5000000000 - 2**31]


@pytest.mark.parametrize(("name", "mode"), [("divided_down", "floor"), ("divided_to_zero", "trunc")])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_quotients_of_integers_are_rounded_as_in_torch(name, mode, dtype, device):
    """Of all signs, and with a divisor that stands in the text."""
    a, b = (t.to(device, dtype) for t in pairs(-7, -6, -3, -2, -1, 0, 1, 2, 3, 6, 7, 100))
    a, b = a[b != 0], b[b != 0]
    assert torch.equal(applied(f"{name}(a, b)", a, b), torch.div(a, b, rounding_mode=mode))
    for divisor in (3, -3, 1, -1):
        assert torch.equal(applied(f"{name}(a, {divisor})", a), torch.div(a, divisor, rounding_mode=mode))
        assert torch.equal(applied(f"rest(a, {divisor})", a), torch.remainder(a, divisor))
    assert torch.equal(applied("rest(a, b)", a, b), torch.remainder(a, b))


def test_round_to_even_matches_torch(device):
    halves = torch.arange(-7, 8, device=device) / 2
    special = torch.tensor([HALF, -HALF, 0.0, -0.0, 2.0**23 + 1, 2.0**24, -(2.0**22) - 0.5, 3e38, INF, -INF, NAN])
    x = torch.cat(
        [halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1), special.to(device)]
    )
    assert_same(applied("round_to_even(a)", x), torch.round(x))


SMALL = [0.0, 1e-45, 1e-30, TINY, 1.5 * TINY, 3 * TINY, 1e-6, 1e-3, 0.1, 0.5, 0.9999999]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("log1p", [-1.0, -1.0000001, -2.0, 1.0, 7.0, 1e10, 3e38]),
        ("expm1", [1.0, -1.0, -17.0, -20.0, -90.0, 88.0, 89.0]),
    ],
)
def test_log1p_and_expm1_keep_small_numbers(name, more, device):
    x = torch.tensor([*SMALL, *(-x for x in SMALL), *more, INF, -INF, NAN], device=device)
    expected = getattr(torch, name)(x.double()).float()
    # the exponential of 88 is as exact as 88 * log2(e) is
    assert_same(applied(f"{name}(a)", x), expected, ulps=64.0 if name == "expm1" else 4.0)
    small = x[: 2 * len(SMALL)]
    assert_same(applied(f"{name}(a)", small), expected[: len(small)], ulps=4.0)


def test_power_matches_torch_on_special_values(device):
    """Zero, one, infinite and NaN to the power of each other; negative bases with whole exponents and with others."""
    values = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 2.5, -2.5, INF, -INF, NAN)
    base, exponent = (t.to(device) for t in pairs(*values))
    assert_same(applied("power(a, b)", base, exponent), torch.pow(base, exponent), ulps=16.0)
    for number in (2.0, 1.5, -3.0):
        assert_same(applied(f"power({number}, a)", base), torch.pow(number, base), ulps=16.0)
        assert_same(applied(f"power(a, {number})", base), torch.pow(base, number), ulps=16.0)


def test_power_loses_as_many_digits_as_its_logarithm_has_in_front(device):
    base, exponent = (t.to(device) for t in pairs(1e-3, 0.1, 1.001, 1.7, 30.0, 9.0, 7.3))
    expected = torch.pow(base.double(), exponent.double())
    lost = 4.0 + torch.log2(expected).abs()
    is_normal = (expected > 2.0**-126) & (expected < 2.0**127)
    error = (applied("power(a, b)", base, exponent).double() / expected - 1.0).abs() * 2.0**23
    assert (error <= lost)[is_normal].all() and is_normal.sum() > 40
