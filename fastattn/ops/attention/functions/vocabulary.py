"""The operators of torch that a program may hold, each with the words of Triton that compute the same.

``{0}``, ``{1}`` are the operands. Floating operands are float32; what is integer stays so. Division and remainder of
integers are those of Python and torch, which round down, on every backend; Triton's own round towards zero. Where two
numbers are compared or one is chosen, NaN wins, as in torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_NAN_WINS = "propagate_nan=tl.PropagateNan.ALL"
_MAXIMUM = f"tl.maximum({{0}}, {{1}}, {_NAN_WINS})"
_MINIMUM = f"tl.minimum({{0}}, {{1}}, {_NAN_WINS})"
_MODULO = "({0} - tl.floor({0} / {1}) * {1})"

# Compared in floating numbers if one of the two is one.
COMPARISONS = {f"aten.{name}.{form}": f"({{0}} {sign} {{1}})" for name, sign in (
    ("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="),
) for form in ("Tensor", "Scalar")}  # fmt: skip

# Of operators whose operands and results are floating numbers.
REAL = {
    "aten.acosh.default": "tl.log({0} + tl.sqrt({0} * {0} - 1.0))",
    "aten.cos.default": "tl.cos({0})",
    "aten.cosh.default": "(0.5 * (tl.exp({0}) + tl.exp(-{0})))",
    "aten.div.Scalar": "({0} / {1})",
    "aten.div.Tensor": "({0} / {1})",
    "aten.erf.default": "tl.erf({0})",
    "aten.exp.default": "tl.exp({0})",
    "aten.exp2.default": "tl.exp2({0})",
    "aten.expm1.default": "expm1({0})",
    "aten.log.default": "tl.log({0})",
    "aten.log10.default": "(tl.log2({0}) * 0.30102999566398120)",
    "aten.log1p.default": "log1p({0})",
    "aten.log2.default": "tl.log2({0})",
    "aten.reciprocal.default": "(1.0 / {0})",
    "aten.rsqrt.default": "(1.0 / tl.sqrt_rn({0}))",
    "aten.sigmoid.default": "(1.0 / (1.0 + tl.exp(-{0})))",
    "aten.sin.default": "tl.sin({0})",
    "aten.sqrt.default": "tl.sqrt_rn({0})",
    "aten.tanh.default": "tanh({0})",
}

# Of operators that keep the kind of number that they are given, with a form for integers where it differs.
_ANY = {
    "aten.abs.default": "tl.abs({0})",
    "aten.add.Tensor": "({0} + {1})",
    "aten.add.Scalar": "({0} + {1})",
    "aten.ceil.default": "tl.ceil({0})",
    "aten.detach.default": "{0}",  # a gradient stops here
    "aten.floor.default": "tl.floor({0})",
    "aten.fmax.default": "tl.maximum({0}, {1})",
    "aten.fmin.default": "tl.minimum({0}, {1})",
    "aten.maximum.default": _MAXIMUM,
    "aten.minimum.default": _MINIMUM,
    "aten.mul.Tensor": "({0} * {1})",
    "aten.mul.Scalar": "({0} * {1})",
    "aten.neg.default": "(-{0})",
    "aten.relu.default": "tl.where({0} <= 0, {0} - {0}, {0})",
    "aten.remainder.Scalar": _MODULO,
    "aten.remainder.Tensor": _MODULO,
    "aten.round.default": "round_to_even({0})",
    "aten.sign.default": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))",
    "aten.sub.Tensor": "({0} - {1})",
    "aten.sub.Scalar": "({0} - {1})",
    "aten.trunc.default": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "aten.where.self": "tl.where({0}, {1}, {2})",
}
INTEGER = {
    "aten.ceil.default": "{0}",
    "aten.floor.default": "{0}",
    "aten.maximum.default": "tl.maximum({0}, {1})",
    "aten.minimum.default": "tl.minimum({0}, {1})",
    "aten.remainder.Scalar": "rest({0}, {1})",
    "aten.remainder.Tensor": "rest({0}, {1})",
    "aten.round.default": "{0}",
    "aten.trunc.default": "{0}",
}
_OF_BITS = {
    "aten.__lshift__.Scalar": "({0} << {1})",
    "aten.__lshift__.Tensor": "({0} << {1})",
    "aten.__rshift__.Scalar": "({0} >> {1})",
    "aten.__rshift__.Tensor": "({0} >> {1})",
    "aten.bitwise_and.Tensor": "({0} & {1})",
    "aten.bitwise_and.Scalar": "({0} & {1})",
    "aten.bitwise_left_shift.Tensor": "({0} << {1})",
    "aten.bitwise_left_shift.Tensor_Scalar": "({0} << {1})",
    "aten.bitwise_or.Tensor": "({0} | {1})",
    "aten.bitwise_or.Scalar": "({0} | {1})",
    "aten.bitwise_right_shift.Tensor": "({0} >> {1})",
    "aten.bitwise_right_shift.Tensor_Scalar": "({0} >> {1})",
    "aten.bitwise_xor.Tensor": "({0} ^ {1})",
    "aten.bitwise_xor.Scalar": "({0} ^ {1})",
    "aten.logical_and.default": "(({0} != 0) & ({1} != 0))",
    "aten.logical_not.default": "({0} == 0)",
    "aten.logical_or.default": "(({0} != 0) | ({1} != 0))",
    "aten.logical_xor.default": "(({0} != 0) ^ ({1} != 0))",
}
# Spelled by functions of their own, in ``in_triton``.
_BY_HAND = (
    "aten._to_copy.default", "aten.bitwise_not.default", "aten.clamp.default", "aten.clamp.Tensor",
    "aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.full_like.default", "aten.pow.Scalar",
    "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor",
)  # fmt: skip

SPELLINGS: dict[str, str | None] = {**COMPARISONS, **REAL, **_ANY, **_OF_BITS, **dict.fromkeys(_BY_HAND)}


# ------------------------------------------------------------------------------- operators that are expressed by others


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return torch.where(x > 0, x * scale, torch.expm1(x * input_scale) * (alpha * scale))


def _xlogy(x: Any, y: Any) -> Tensor:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return torch.where(y.isnan(), y, torch.where(x == 0, torch.zeros_like(x), x * torch.log(y)))


def _sinh(x: Tensor) -> Tensor:
    less = torch.expm1(x)  # exp(x) - exp(-x) would cancel near 0
    return 0.5 * (less + less / (less + 1.0))


@functools.cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Torch's decompositions into its core operators, and ours of those core operators that stay composed."""
    from torch._decomp import core_aten_decompositions

    aten = torch.ops.aten
    of_torch = {op: rule for op, rule in core_aten_decompositions().items() if op is not aten.detach.default}
    return {
        **of_torch,
        aten.elu.default: _elu,
        aten.erfc.default: lambda x: 1.0 - torch.erf(x),
        aten.fmod.Scalar: lambda x, y: x - torch.div(x, y, rounding_mode="trunc") * y,
        aten.fmod.Tensor: lambda x, y: x - torch.div(x, y, rounding_mode="trunc") * y,
        aten.gelu.default: _gelu,
        aten.hardtanh.default: lambda x, low=-1.0, high=1.0: torch.clamp(x, low, high),
        aten.hypot.default: lambda x, y: torch.sqrt(x * x + y * y),
        aten.isinf.default: lambda x: torch.abs(x) == math.inf,
        aten.isnan.default: lambda x: x != x,
        aten.leaky_relu.default: lambda x, slope=0.01: torch.where(x > 0, x, x * slope),
        aten.sinh.default: _sinh,
        aten.tan.default: lambda x: torch.sin(x) / torch.cos(x),
        aten.xlogy.Tensor: _xlogy,
    }
