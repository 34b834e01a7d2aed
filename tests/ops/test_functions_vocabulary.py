"""Every word of programs by itself: what the kernels compute beside torch in float64, and its derivative."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastattn.ops.attention.functions.in_triton import source
from fastattn.ops.attention.functions.memory import traced
from fastattn.ops.attention.functions.program import Program
from fastattn.testing import random_tensor
from tests.machines import INTERPRETING
from tests.ops.functions_calls import numbers_of_python_in

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from fastattn_kernels.common.functions import compiled

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="a kernel for each word would have to be compiled")


@triton.jit
def _score_kernel(score_ptr, found_ptr, FUNCTION: tl.constexpr):
    """A function of 16 rows and 16 keys."""
    rows, keys = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    batch = tl.program_id(0)
    score = tl.load(score_ptr + rows * 16 + keys)
    tl.store(found_ptr + rows * 16 + keys, FUNCTION(score, batch, batch, rows, keys, ()))


@triton.jit
def _gradient_kernel(score_ptr, found_ptr, FUNCTION: tl.constexpr):
    """Its derivative."""
    rows, keys = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    batch = tl.program_id(0)
    score = tl.load(score_ptr + rows * 16 + keys)
    d = tl.full([16, 16], 1.0, tl.float32)
    tl.store(found_ptr + rows * 16 + keys, FUNCTION(d, score, batch, batch, rows, keys, ()))


REAL: dict[str, Any] = {
    **{f.__name__: f for f in (
        torch.sin, torch.cos, torch.tan, torch.sinh, torch.cosh, torch.tanh, torch.exp, torch.exp2, torch.expm1,
        torch.sigmoid, torch.erf, torch.erfc, torch.ceil, torch.floor, torch.trunc, torch.round, torch.frac, torch.sign,
        torch.abs, torch.square, torch.reciprocal, torch.neg, torch.nan_to_num,
        F.gelu, F.silu, F.elu, F.selu, F.celu, F.leaky_relu, F.hardtanh, F.relu, F.relu6, F.hardsigmoid, F.hardswish,
        F.mish, F.logsigmoid, F.softplus, F.softsign, F.softshrink, F.hardshrink, F.tanhshrink,
    )},
    "log": lambda s: torch.log(s.abs()), "log1p": lambda s: torch.log1p(s.abs() * 1e-4) * 1e4,
    "log2": lambda s: torch.log2(s.abs()), "log10": lambda s: torch.log10(s.abs()),
    "small expm1": lambda s: torch.expm1(s * 1e-4) * 1e4, "small sinh": lambda s: torch.sinh(s * 1e-4) * 1e4,
    "sqrt": lambda s: s.abs().sqrt(), "rsqrt": lambda s: s.abs().rsqrt(), "acosh": lambda s: torch.acosh(s.abs() + 1.1),
    "tanh of gelu": lambda s: F.gelu(s, approximate="tanh"), "threshold": lambda s: F.threshold(s, 0.1, 0.2),
    "remainder": lambda s: s % 0.3, "remainder by a negative number": lambda s: s % -0.3,
    "fmod": lambda s: torch.fmod(s, 0.3),
    "division down": lambda s: torch.div(s, -0.3, rounding_mode="floor"),
    "division towards zero": lambda s: torch.div(s, 0.3, rounding_mode="trunc"),
    "cube": lambda s: s**3, "inverse cube": lambda s: s**-3, "root as power": lambda s: s.abs() ** 0.5,
    "power": lambda s: (s + 9) ** -1.5, "power of a number": lambda s: 3.0**s,
    "power of a negative number": lambda s: (-s.abs()) ** 11,
    "power of both": lambda s: (s.abs() + 1) ** s, "float_power": lambda s: torch.float_power(s.abs() + 1, 1.5),
    "hypot": lambda s: torch.hypot(s, s + 1), "logaddexp": lambda s: torch.logaddexp(s, 2 * s),
    "xlogy": lambda s: torch.xlogy(s, s.abs()),
    "addcmul": lambda s: torch.addcmul(s, s, s, value=0.5), "rsub": lambda s: torch.rsub(s, 2, alpha=3),
    "where": lambda s: torch.where(s > 0, s * s, 0.5), "masked_fill": lambda s: s.masked_fill(s > 0, 0.5),
    "clamp": lambda s: s.clamp(-0.5, 0.7), "clamp from below": lambda s: s.clamp(min=0.1),
    "clamp by numbers": lambda s: torch.clamp(s, -s.abs(), s * s), "maximum": lambda s: torch.maximum(s, s * s),
    "minimum": lambda s: torch.minimum(s, s * s), "fmax": lambda s: torch.fmax(s, s * s),
    "fmin": lambda s: torch.fmin(s, s * s), "isinf": lambda s: s * torch.isinf(s).logical_not(),
    "isnan": lambda s: torch.where(torch.isnan(s), 1.0, s), "cast": lambda s: s + (s * 3).int() - (s * 5).long(),
}  # fmt: skip

WHOLE: dict[str, Any] = {
    "division": lambda q, k: (q - k) // 3, "division by a negative number": lambda q, k: (q - k) // -3,
    "remainder": lambda q, k: (q - k) % 4, "remainder by a negative number": lambda q, k: (q - k) % -4,
    "remainder by a number": lambda q, k: (q - 4) % (k + 1), "fmod": lambda q, k: torch.fmod(q - k, 3),
    "towards zero": lambda q, k: torch.div(q - k, 3, rounding_mode="trunc"),
    "towards zero by a negative number": lambda q, k: torch.div(q - k, -3, rounding_mode="trunc"),
    "fmod by a negative number": lambda q, k: torch.fmod(q - k, -3), "true division": lambda q, k: q / (k + 1),
    "shift to the right": lambda q, k: (q - k) >> 1, "shift to the left": lambda q, k: q << 2,
    "and": lambda q, k: q & k, "or": lambda q, k: q | k, "xor": lambda q, k: q ^ k, "not": lambda q, k: ~q,
    "abs": lambda q, k: (q - k).abs(), "sign": lambda q, k: torch.sign(q - k), "cube": lambda q, k: (q - k) ** 3,
    "power of 2": lambda q, k: 2**k, "root": lambda q, k: q**0.5, "power of a number": lambda q, k: 0.5**k,
    "clamp": lambda q, k: (q - k).clamp(-2, 3), "maximum": lambda q, k: torch.maximum(q, k),
    "minimum": lambda q, k: torch.minimum(q, k), "floor": lambda q, k: torch.floor(q * 0.3) + torch.ceil(k * 0.3),
    "halves": lambda q, k: torch.round((q - k) * 0.5), "logical_and": lambda q, k: torch.logical_and(q > 1, k),
    "logical_xor": lambda q, k: torch.logical_xor(q > 1, k > 2), "logical_not": lambda q, k: torch.logical_not(q),
    "booleans": lambda q, k: (q > k) + 2 * (q > 2) * (k != 3), "relu": lambda q, k: torch.relu(q - k),
    "a narrow integer": lambda q, k: (q * 100).to(torch.int8), "a remainder of both kinds": lambda q, k: (q - k) % 2.5,
}  # fmt: skip


ROUNDED = ("true division", "root", "power of a number")


def of_kernels(text, kernel, score):
    found = torch.full_like(score, torch.nan)
    kernel[(1,)](score, found, compiled(text, "function"))
    return found


@pytest.mark.parametrize("name", REAL)
def test_floating_word_and_its_derivative(name):
    """The kernels' error is a few roundings of the largest number around."""
    function = REAL[name]
    program = Program.of(traced("score_mod", lambda s, b, h, q, k: function(s), ())[0].text)
    score = random_tensor(16, 16, seed=1)
    exact = score.double().requires_grad_()
    truth = function(exact)
    (derivative,) = torch.autograd.grad(truth.sum(), exact) if truth.requires_grad else (torch.zeros_like(exact),)
    texts = source(program, "function"), source(program.gradient, "function")
    for text, kernel, expected in zip(texts, (_score_kernel, _gradient_kernel), (truth.detach(), derivative)):
        found = of_kernels(text, kernel, score).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_word_of_whole_numbers_is_exact(name):
    function = WHOLE[name]
    text = traced("score_mod", lambda s, b, h, q, k: function(q, k), ())[0].text
    rows, keys = torch.arange(16, dtype=torch.int32)[:, None], torch.arange(16, dtype=torch.int32)
    with numbers_of_python_in(torch.float64):
        expected = function(rows, keys).double().expand(16, 16)
    found = of_kernels(source(Program.of(text), "function"), _score_kernel, torch.zeros(16, 16)).double()
    torch.testing.assert_close(found, expected, rtol=1e-6 if name in ROUNDED else 0, atol=0)
