"""Arithmetic, logic, comparisons and conversions, 32 lanes at once.

Products with an addend are computed in double precision and rounded once, as fused ones are. ``ex2``, ``lg2``,
``tanh``, ``rcp`` and the like are numpy's: more exact than the hardware's. ``.ftz`` is ignored: subnormal numbers stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.machines.soft_gpu.operands import (
    BITS,
    UNSIGNED,
    Array,
    Instruction,
    Read,
    Step,
    bits_of_halves,
    halves,
    numbers,
)

Function = Callable[..., Array]
_HALVES = ("bf16", "f16", "bf16x2", "f16x2")
# Modifiers that change nothing here, or that a builder below reads. Anything else is refused: .sat, .rz, .cc, ...
_KNOWN = {"rn", "ftz", "approx", "full", "lo", "hi", "wide", "NaN", "relu", "wrap", "clamp", "l", "r"}

_FLOATS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs, "div": np.divide,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "rcp": np.reciprocal, "rsqrt": lambda a: np.reciprocal(np.sqrt(a)),
    "fma": lambda a, b, c: a.astype(np.float64) * b.astype(np.float64) + c,
    "mad": lambda a, b, c: a.astype(np.float64) * b.astype(np.float64) + c,
}  # fmt: skip
_INTEGERS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": lambda a: np.invert(a) + a.dtype.type(1),
}  # fmt: skip
_COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_PREDICATES: dict[str, Function] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip
_ROUND: dict[str, Function] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}

NAMES = (
    *_FLOATS, *_INTEGERS, "min", "max", "shl", "shr", "rem", "bfe", "bfi", "popc", "clz", "brev", "prmt", "lop3", "shf",
)  # fmt: skip


def arithmetic(instruction: Instruction) -> Step:
    """The step of an instruction that computes one register from others."""
    name, kind = instruction.name, instruction.type
    unknown = [part for part in instruction.parts[1:-1] if part not in _KNOWN | BITS.keys()]
    if unknown and name != "lop3":
        raise instruction.unknown(f".{unknown[0]}")
    destination, *sources = instruction.operands
    put = instruction.write(destination)
    if kind == "pred":
        predicates = [instruction.predicate(token) for token in sources]
        combine = _PREDICATES[name]
        return lambda warp: put(warp, combine(*(read(warp) for read in predicates)))
    if kind in _HALVES:
        return _of_halves(instruction, put)
    bits = BITS[kind]
    reads = [instruction.read(token, bits) for token in sources]
    if kind in ("f32", "f64"):
        return _of_floats(instruction, put, reads)
    if name in ("mul", "mad", "min", "max", "div", "rem", "abs"):
        return _of_signed(instruction, put, reads)
    if name in _INTEGERS:
        function = _INTEGERS[name]
        return lambda warp: put(warp, function(*(read(warp) for read in reads)))
    if name in _BIT_FIELDS:
        return _BIT_FIELDS[name](instruction, put)
    raise instruction.unknown("this arithmetic")


def _of_floats(instruction: Instruction, put: Any, reads: list[Read]) -> Step:
    name, kind = instruction.name, instruction.type
    dtype = np.float32 if kind == "f32" else np.float64
    raw = UNSIGNED[BITS[kind]]
    if name in ("min", "max"):
        spreads = "NaN" in instruction.parts
        one = {"min": np.minimum if spreads else np.fmin, "max": np.maximum if spreads else np.fmax}[name]

        def extreme(warp: Any) -> None:
            result = reads[0](warp).view(dtype)
            for read in reads[1:]:
                result = one(result, read(warp).view(dtype))
            put(warp, result.view(raw))

        return extreme
    if name not in _FLOATS:
        raise instruction.unknown("this arithmetic of floats")
    function = _FLOATS[name]

    def compute(warp: Any) -> None:
        put(warp, np.asarray(function(*(read(warp).view(dtype) for read in reads)), dtype).view(raw))

    return compute


def _of_halves(instruction: Instruction, put: Any) -> Step:
    """bfloat16 and float16, one or two a register."""
    name, kind = instruction.name, instruction.type
    function = {"min": np.fmin, "max": np.fmax, **_FLOATS}.get(name)
    if function is None:
        raise instruction.unknown("this arithmetic of halves")
    if "NaN" in instruction.parts and name in ("min", "max"):
        function = np.minimum if name == "min" else np.maximum
    bits = BITS[kind]
    reads = [instruction.read(token, bits) for token in instruction.operands[1:]]

    def compute(warp: Any) -> None:
        values = [halves(np.ascontiguousarray(read(warp)).view(np.uint16), kind) for read in reads]
        result = np.asarray(function(*values), np.float32)
        put(warp, np.ascontiguousarray(bits_of_halves(result, kind)).view(UNSIGNED[bits]))

    return compute


def _of_signed(instruction: Instruction, put: Any, reads: list[Read]) -> Step:
    """Integer arithmetic that depends on whether numbers have a sign."""
    name, kind, parts = instruction.name, instruction.type, instruction.parts
    bits = BITS[kind]
    if name in ("mul", "mad"):
        if "wide" in parts:
            wide = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}[kind]
            addend = instruction.read(instruction.operands[3], 2 * bits) if name == "mad" else None

            def widen(warp: Any) -> None:
                left, right = (numbers(read(warp), kind).astype(wide) for read in reads[:2])
                product = left * right
                put(warp, (product if addend is None else product + addend(warp).view(wide)).view(UNSIGNED[2 * bits]))

            return widen
        if "hi" in parts:
            if name == "mad":
                raise instruction.unknown("mad.hi")

            def high(warp: Any) -> None:
                pairs = zip(*(numbers(read(warp), kind).tolist() for read in reads))
                put(warp, np.array([(a * b >> bits) & ((1 << bits) - 1) for a, b in pairs], UNSIGNED[bits]))

            return high
        if name == "mul":
            return lambda warp: put(warp, reads[0](warp) * reads[1](warp))
        return lambda warp: put(warp, reads[0](warp) * reads[1](warp) + reads[2](warp))
    function = {"min": np.minimum, "max": np.maximum, "div": _quotient, "rem": _remainder, "abs": np.abs}[name]
    relu = "relu" in parts

    def compute(warp: Any) -> None:
        result = function(*(numbers(read(warp), kind) for read in reads))
        put(warp, (np.maximum(result, result.dtype.type(0)) if relu else result).view(UNSIGNED[bits]))

    return compute


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; of a division by zero, something: PTX does not define it."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    wide, by = a.astype(np.int64), b.astype(np.int64)
    return (np.abs(wide) // np.abs(by) * np.sign(wide) * np.sign(by)).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _quotient(a, b) * b).astype(a.dtype)


# ---------------------------------------------------------------------------------------------------------- bit fields


def _shift(instruction: Instruction, put: Any) -> Step:
    kind, left = instruction.type, instruction.name == "shl"
    bits = BITS[kind]
    value, by = instruction.read(instruction.operands[1], bits), instruction.read(instruction.operands[2], 32)

    def shift(warp: Any) -> None:
        number = numbers(value(warp), kind)
        distance = by(warp)
        far = distance >= bits
        distance = np.where(far, bits - 1, distance).astype(number.dtype)
        result = number << distance if left else number >> distance
        if left or number.dtype.kind == "u":
            result = np.where(far, number.dtype.type(0), result)
        put(warp, result.view(UNSIGNED[bits]))

    return shift


def _extract(instruction: Instruction, put: Any) -> Step:
    kind = instruction.type
    bits = BITS[kind]
    value = instruction.read(instruction.operands[1], bits)
    start, length = (instruction.read(token, 32) for token in instruction.operands[2:])

    def extract(warp: Any) -> None:
        first, count = (read(warp).astype(np.uint64) & np.uint64(255) for read in (start, length))
        mask = (np.uint64(1) << count) - np.uint64(1)
        field = (value(warp).astype(np.uint64) >> first) & mask
        if kind[0] == "s":
            negative = (field >> (count - np.uint64(1))) & np.uint64(1) == 1
            field = np.where(negative, field | ~mask, field)
        put(warp, field.astype(UNSIGNED[bits]))

    return extract


def _insert(instruction: Instruction, put: Any) -> Step:
    bits = BITS[instruction.type]
    field, base = (instruction.read(token, bits) for token in instruction.operands[1:3])
    start, length = (instruction.read(token, 32) for token in instruction.operands[3:])

    def insert(warp: Any) -> None:
        first, count = (read(warp).astype(np.uint64) & np.uint64(255) for read in (start, length))
        mask = ((np.uint64(1) << count) - np.uint64(1)) << first
        result = (base(warp).astype(np.uint64) & ~mask) | ((field(warp).astype(np.uint64) << first) & mask)
        put(warp, result.astype(UNSIGNED[bits]))

    return insert


def _count(instruction: Instruction, put: Any) -> Step:
    bits = BITS[instruction.type]
    read = instruction.read(instruction.operands[1], bits)
    count: Any = {
        "popc": lambda x: x.bit_count(),
        "clz": lambda x: bits - x.bit_length(),
        "brev": lambda x: int(f"{x:0{bits}b}"[::-1], 2),
    }[instruction.name]
    kind = UNSIGNED[bits] if instruction.name == "brev" else np.uint32
    return lambda warp: put(warp, np.array([count(x) for x in read(warp).tolist()], kind))


def _permute(instruction: Instruction, put: Any) -> Step:
    if instruction.parts != ["prmt", "b32"]:
        raise instruction.unknown("this mode of prmt")
    low, high, selector = (instruction.read(token, 32) for token in instruction.operands[1:])
    lanes = np.arange(32)

    def permute(warp: Any) -> None:
        source = np.stack([low(warp), high(warp)], 1).view(np.uint8)
        chosen = selector(warp)
        result = np.empty((32, 4), np.uint8)
        for i in range(4):
            nibble = (chosen >> (4 * i)) & 15
            byte = source[lanes, nibble & 7]
            result[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 255, 0), byte)
        put(warp, result.view(np.uint32)[:, 0])

    return permute


def _look_up(instruction: Instruction, put: Any) -> Step:
    """lop3: any function of three bits, as a table of eight."""
    if len(instruction.operands) != 5:
        raise instruction.unknown("this form of lop3")
    reads = [instruction.read(token, 32) for token in instruction.operands[1:4]]
    table = int(instruction.operands[4], 0)

    def look_up(warp: Any) -> None:
        a, b, c = (read(warp) for read in reads)
        result = np.zeros(32, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        put(warp, result)

    return look_up


def _funnel(instruction: Instruction, put: Any) -> Step:
    low, high, by = (instruction.read(token, 32) for token in instruction.operands[1:])
    left, wraps = instruction.parts[1] == "l", "wrap" in instruction.parts

    def funnel(warp: Any) -> None:
        distance = (by(warp) & 31 if wraps else np.minimum(by(warp), 32)).astype(np.uint64)
        both = (high(warp).astype(np.uint64) << np.uint64(32)) | low(warp)
        result = (both << distance) >> np.uint64(32) if left else both >> distance
        put(warp, result.astype(np.uint32))

    return funnel


_BIT_FIELDS: dict[str, Callable[[Instruction, Any], Step]] = {
    "shl": _shift, "shr": _shift, "bfe": _extract, "bfi": _insert, "popc": _count, "clz": _count, "brev": _count,
    "prmt": _permute, "lop3": _look_up, "shf": _funnel,
}  # fmt: skip


# ------------------------------------------------------------------------------------------ comparisons and conversions


def compare(instruction: Instruction) -> Step:
    """``setp``: one predicate, or it and its negation; of packed halves, one for each."""
    kind, comparison = instruction.type, instruction.parts[1]
    targets, left, right, *further = instruction.operands
    puts = [instruction.write(token) for token in targets.split("|")]
    reads = [instruction.read(token, BITS[kind]) for token in (left, right)]
    combine = _PREDICATES[instruction.parts[2]] if further else None
    other = instruction.predicate(further[0]) if further else None
    floating = kind in ("f32", "f64", *_HALVES)
    # gtu and the like hold where a number is NaN, gt and the like do not.
    unordered = floating and comparison in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    if comparison not in ("num", "nan") and comparison[:2] not in _COMPARE:
        raise instruction.unknown("this comparison")
    function = _COMPARE.get(comparison[:2], np.equal)

    def holds(a: Array, b: Array) -> Array:
        if not floating:
            return function(a, b)
        nan = np.isnan(a) | np.isnan(b)
        if comparison in ("num", "nan"):
            return nan if comparison == "nan" else ~nan
        return function(a, b) | nan if unordered else function(a, b) & ~nan

    def step(warp: Any) -> None:
        if kind in _HALVES:
            a, b = (halves(np.ascontiguousarray(read(warp)).view(np.uint16), kind) for read in reads)
        else:
            a, b = (numbers(read(warp), kind) for read in reads)
        result = holds(a, b)
        if kind.endswith("x2"):
            for i, put in enumerate(puts):
                put(warp, result[i::2])
            return
        if combine is not None and other is not None:
            result = combine(result, other(warp))
        puts[0](warp, result)
        if len(puts) > 1:
            puts[1](warp, ~result)

    return step


def convert(instruction: Instruction) -> Step:
    """``cvt``: between integers, floats and halves."""
    put = instruction.write(instruction.operands[0])
    to, *source = [part for part in instruction.parts[1:] if part in BITS or part == "tf32"]
    modifiers = {part for part in instruction.parts[1:] if part not in BITS and part != "tf32"}
    if unknown := modifiers - {"rn", "rna", "ftz", *_ROUND}:
        raise instruction.unknown(f".{min(unknown)}")
    if to in ("bf16x2", "f16x2"):
        high, low = (instruction.read(token, 32) for token in instruction.operands[1:])

        def pack(warp: Any) -> None:
            pair = [bits_of_halves(read(warp).view(np.float32), to).astype(np.uint32) for read in (high, low)]
            put(warp, (pair[0] << 16) | pair[1])

        return pack
    kind = source[0]
    read = instruction.read(instruction.operands[1], BITS[kind])
    if to == "tf32":  # to nearest, ties away from zero
        return lambda warp: put(warp, (read(warp) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to in ("bf16", "f16") and kind == "f32":
        return lambda warp: put(warp, bits_of_halves(read(warp).view(np.float32), to))
    if to == "f32" and kind in ("bf16", "f16"):
        return lambda warp: put(warp, halves(read(warp), kind).view(np.uint32))
    if to == "bf16" and kind[0] in "su":

        def from_integers(warp: Any) -> None:
            exact = numbers(read(warp), kind)
            rounded = exact.astype(np.float32)
            if (rounded.astype(np.float64) != exact).any():  # it would be rounded twice
                raise instruction.unknown("this conversion of an integer beyond 2^24")
            put(warp, bits_of_halves(rounded, to))

        return from_integers
    if "bf16" in (to, kind):
        raise instruction.unknown("this conversion")
    bits = BITS[to]
    target: Any = {
        "u": UNSIGNED, "b": UNSIGNED, "s": {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64},
        "f": {16: np.float16, 32: np.float32, 64: np.float64},
    }[to[0]][bits]  # fmt: skip
    rounding = next((_ROUND[part] for part in modifiers if part in _ROUND), None)
    if kind[0] == "f" and to[0] != "f" and rounding is None:
        raise instruction.unknown("a conversion to integers without a rounding")

    def step(warp: Any) -> None:
        value = numbers(read(warp), kind)
        if rounding is not None:
            value = rounding(value.astype(np.float64))
            if to[0] != "f":  # NaN becomes 0, what is too large the largest
                limits = np.iinfo(target)
                value = np.clip(np.nan_to_num(value, nan=0.0), limits.min, limits.max)
        put(warp, value.astype(target).view(UNSIGNED[bits]))

    return step
