"""Programs as source text of Triton functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fastattn.ops.attention.functions.program import Program, needed, read
from fastattn.ops.attention.functions.vocabulary import INTEGER, SPELLINGS
from fastattn.ops.attention.functions.writing import INDICES, NotUnderstood

_LARGEST_POWER = 8  # integer powers up to this are products


def source(program: Program, name: str, result: int = 0) -> str:
    """A ``@triton.jit`` function of this name that computes one of the results of a program.

    Its arguments are those of the program, the captured tensors as one tuple, ``captured``, of pointers, sizes and
    strides. A place outside of a captured tensor reads as NaN, or as 0 of an integer tensor, and never touches memory.
    """
    lines: list[str] = []
    names: dict[fx.Node, str] = {}
    wanted = needed([program.results[result]])
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.target)
        elif node in wanted:
            names[node] = f"v{len(lines)}"
            lines.append(f"{names[node]} = {_spelled(program, node, names)}")
    returned = _operand(program.results[result], names)
    own = program.arguments[: len(program.arguments) - len(program.kinds)]
    tile = next((argument for argument in ("d", "score") if argument in own), None)
    if tile is not None and tile not in program.results[result].meta["depends"]:
        returned = f"{returned} + tl.zeros_like({tile})"  # as large as a tile of scores
    body = "\n    ".join([f'"""Written from a {program.name} of the caller\'s."""', *lines, f"return {returned}"])
    return f"@triton.jit\ndef {name}({', '.join([*own, 'captured'])}):\n    {body}\n"


def check(program: Program) -> None:
    """Raise NotUnderstood where a program, or a gradient of what it reads, cannot be written."""
    for result in range(len(program.results)):
        source(program, "function", result)
    if program.name == "score_mod":
        program.check_places()


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _operand(value: Any, names: dict[fx.Node, str]) -> str:
    return names[value] if isinstance(value, fx.Node) else _literal(value)


def _kind(value: Any) -> str:
    """``real``, ``integer`` or ``boolean``."""
    dtype = value.meta["dtype"] if isinstance(value, fx.Node) else None
    if isinstance(value, bool) or dtype == torch.bool:
        return "boolean"
    if isinstance(value, float) or (dtype is not None and dtype.is_floating_point):
        return "real"
    return "integer"


def _type(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "tl.int1"
    return "tl.float32" if dtype.is_floating_point else f"tl.{str(dtype).removeprefix('torch.')}"


def _spelled(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.target is read:
        return _read(program, node, names)
    name, kind = str(node.target), _kind(node)
    operands = [_operand(each, names) for each in node.args]
    if name in _BY_HAND:
        return _BY_HAND[name](node, operands)
    template = SPELLINGS[name]
    assert template is not None
    if kind == "integer" and name in INTEGER:
        template = INTEGER[name]
    if kind == "boolean" and name in ("aten.add.Tensor", "aten.mul.Tensor"):
        template = "({0} | {1})" if "add" in name else "({0} & {1})"
    if kind != "boolean" and name in _ARITHMETIC:  # Triton's booleans are numbers of one bit
        operands = [
            f"{o}.to({_type(node.meta['dtype'])})" if _is_boolean(a) else o for o, a in zip(operands, node.args)
        ]
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        operands[1] = f"({operands[1]} * {_operand(alpha, names)})"
    return template.format(*operands)


_ARITHMETIC = {f"aten.{name}.{form}" for name in ("add", "sub", "mul") for form in ("Tensor", "Scalar")}


def _is_boolean(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["dtype"] == torch.bool


def _read(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    number = program.captured.index(str(node.args[0]))
    indices: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    kind = program.kinds[number].split()[0]
    place = f"captured[{number}]"
    offset, inside, other = "", [], 'float("nan")' if kind == "float" else "0"
    for axis, index in enumerate(indices):
        at = _operand(index, names)
        if not (isinstance(index, fx.Node) and index.target in INDICES):  # which are never negative
            at = f"index_on_axis({at}, {place}.sizes[{axis}])"
        offset += f" + {at}.to(tl.int64) * {place}.strides[{axis}]"
        inside.append(f"is_on_axis({at}, {place}.sizes[{axis}])")
    mask = f", mask={' & '.join(inside)}, other={other}" if inside else ""
    loaded = f"tl.load({place}.ptr{offset}{mask})"
    if kind == "float":
        return f"{loaded}.to(tl.float32)"
    return f"({loaded} != 0)" if kind == "bool" else loaded


def _converted(node: fx.Node, operands: list[str]) -> str:
    dtype = node.meta["dtype"]
    if dtype == torch.bool:
        return f"({operands[0]} != 0)"
    return f"{operands[0]}.to({_type(dtype)})"


def _inverted(node: fx.Node, operands: list[str]) -> str:
    return f"({operands[0]} == 0)" if _is_boolean(node) else f"(~{operands[0]})"


def _clamped(node: fx.Node, operands: list[str]) -> str:
    found = operands[0]
    is_real = _kind(node) == "real"
    nan = ", propagate_nan=tl.PropagateNan.ALL" if is_real else ""
    for bound, function in zip((*operands[1:], "None", "None"), ("maximum", "minimum")):
        if bound != "None":
            found = f"tl.{function}({found}, {bound}{nan})"
    return found


def _divided(node: fx.Node, operands: list[str]) -> str:
    mode, is_real = node.kwargs["rounding_mode"], _kind(node) == "real"
    if is_real:
        quotient = f"({operands[0]} / {operands[1]})"
        return (
            f"tl.floor({quotient})"
            if mode == "floor"
            else f"tl.where({quotient} < 0, tl.ceil({quotient}), tl.floor({quotient}))"
        )
    return f"divided_{'down' if mode == 'floor' else 'to_zero'}({operands[0]}, {operands[1]})"


def _constant(node: fx.Node, operands: list[str]) -> str:
    return f"tl.full([], {operands[-1]}, {_type(node.meta['dtype'])})"


def _power(node: fx.Node, operands: list[str]) -> str:
    base, exponent = operands[:2]
    power = node.args[1]
    if isinstance(power, (int, float)) and power == int(power) and 0 < abs(power) <= _LARGEST_POWER:
        product = f"({' * '.join([base] * abs(int(power)))})"
        return product if power > 0 else f"(1.0 / {product})"
    if isinstance(power, (int, float)) and abs(power) == 0.5:
        root = f"tl.sqrt_rn({base})"
        return root if power > 0 else f"(1.0 / {root})"
    if _kind(node) == "integer":
        return f"(1 << {exponent})" if base == "2" else _refused(node)
    # whole numbers of the text would be integers in Triton, of which there are no logarithms
    base, exponent = (_literal(float(a)) if isinstance(a, int) else o for a, o in zip(node.args, operands))
    return f"power({base}, {exponent})"


def _refused(node: fx.Node) -> str:
    raise NotUnderstood(f"it uses {node.target} of integers, which has no exact form in Triton: make them floating")


_BY_HAND = {
    "aten._to_copy.default": _converted,
    "aten.bitwise_not.default": _inverted,
    "aten.clamp.default": _clamped,
    "aten.clamp.Tensor": _clamped,
    "aten.div.Scalar_mode": _divided,
    "aten.div.Tensor_mode": _divided,
    "aten.full_like.default": _constant,
    "aten.pow.Scalar": _power,
    "aten.pow.Tensor_Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
}
