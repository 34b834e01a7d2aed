"""One instruction's operands as functions of a warp: registers, immediates, special registers, addresses, guards.

A register holds an array of 32 unsigned integers, one a lane, or 32 bools. A reader gives such an array; a writer puts
one, where the guard holds and, in a warp that has diverged, in the lanes that are at this instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.machines.soft_gpu.program import Program, split_operands

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp

Array = Any  # of numpy
Read = Callable[["Warp"], Array]
Write = Callable[["Warp", Array], None]
Step = Callable[["Warp"], Any]  # None: go on behind; an int: go on there; BLOCKED or FINISHED
BLOCKED, FINISHED = object(), object()

# What a register holds that was never written: NaN as a float. Compilers do read such registers, for a half that they
# then throw away.
UNWRITTEN = np.full(32, -1, np.int64).view(np.uint64)
LANES = np.arange(32, dtype=np.uint32)
ALL_LANES = np.ones(32, bool)
SHARED_BASE = 1024  # the address of `global_smem`: shared memory's first byte is not at 0 on a GPU, either
PARAMETERS = 1 << 40  # the address of parameter i is this plus i: kernels hand them on to TMA and read them by ld.param
UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip


def _constant(value: int) -> Array:
    return np.full(32, value, np.uint32)


_SPECIAL: dict[str, Read] = {
    "%laneid": lambda warp: LANES,
    "%tid.x": lambda warp: warp.thread_ids,
    "%ntid.x": lambda warp: _constant(warp.block.program.threads),
    **{f"%ctaid.{axis}": lambda warp, i=i: _constant(warp.block.place[i]) for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": lambda warp, i=i: _constant(warp.block.grid[i]) for i, axis in enumerate("xyz")},
}


class Instruction:
    """A statement taken apart: opcode and its parts, operands, guard; and the readers and writers of the operands."""

    def __init__(self, program: Program, index: int) -> None:
        self.program, self.index = program, index
        statement = program.statements[index]
        self.scopes = statement.scopes
        text = statement.text
        guarded = re.match(r"@(!?%?\w+)\s+(.*)$", text)
        self.guard = guarded[1] if guarded else None
        self.text = guarded[2] if guarded else text
        self.opcode, _, rest = self.text.partition(" ")
        self.parts = self.opcode.split(".")
        self.name, self.type = self.parts[0], self.parts[-1]
        self.operands = split_operands(rest)

    @property
    def where(self) -> str:
        return self.program.where(self.index)

    def unknown(self, what: str) -> NotImplementedError:
        """The error for something that this machine does not execute."""
        return NotImplementedError(f"{what}: {self.where}")

    def vector(self) -> int:
        """How many registers a load or store moves."""
        return next((int(part[1:]) for part in self.parts if part in ("v2", "v4", "v8")), 1)

    # --------------------------------------------------------------------------------------------------- readers

    def read(self, token: str, bits: int) -> Read:
        """The reader of a register, an immediate, a special register, or an address by name."""
        if token in _SPECIAL:
            return _SPECIAL[token]
        if token.startswith("global_smem"):
            value = np.full(32, SHARED_BASE + int(token[len("global_smem") :] or 0), UNSIGNED[bits])
            return lambda warp: value
        if token in self.program.parameter_index:
            value = np.full(32, PARAMETERS + self.program.parameter_index[token], np.uint64)
            return lambda warp: value
        if re.match(r"-?\d", token):
            value = np.full(32, _immediate(token, bits), UNSIGNED[bits])
            return lambda warp: value
        slot, kind = self.program.slot(token), UNSIGNED[bits]
        if bits == 1:
            return lambda warp: warp.registers[slot]
        size = bits // 8

        def register(warp: Warp) -> Array:
            value = warp.registers[slot]
            if value.dtype == kind:
                return value
            return value.view(kind) if value.itemsize == size else value.astype(kind)

        return register

    def predicate(self, token: str) -> Read:
        """The reader of a predicate, negated or not."""
        read = self.read(token.lstrip("!"), 1)
        return (lambda warp: ~read(warp)) if token.startswith("!") else read

    def address(self, token: str) -> Read:
        """The reader of ``[register+offset]`` or ``[symbol+offset]``: int64."""
        found = re.match(r"\[\s*([^\s+\]-]+)\s*((?:[+-]\s*-?\d+)?)\s*\]$", token)
        if found is None:
            raise self.unknown(f"the address {token}")
        offset = int(found[2].replace(" ", "").replace("+-", "-") or 0)
        base = self.read(found[1], 64 if found[1] in self.program.parameter_index else 32)
        if found[1].startswith("global_smem"):
            value = base(None).astype(np.int64) + offset  # type: ignore[arg-type]  # a constant needs no warp
            return lambda warp: value
        slot = self.program.slot(found[1])
        return lambda warp: warp.registers[slot].astype(np.int64) + offset

    def shared(self, token: str) -> Read:
        """The reader of an address in shared memory: bytes from its beginning."""
        address = self.address(token)
        return lambda warp: address(warp) - SHARED_BASE

    def lanes(self) -> Read:
        """The lanes that the instruction is for: where the guard holds, at this place of a diverged warp."""
        if self.guard is None:
            return lambda warp: ALL_LANES if warp.active is None else warp.active
        guard = self.predicate(self.guard)
        return lambda warp: guard(warp) if warp.active is None else guard(warp) & warp.active

    # --------------------------------------------------------------------------------------------------- writers

    def write(self, token: str) -> Write:
        """The writer of a register; ``_`` swallows."""
        if token == "_":
            return lambda warp, value: None
        slot = self.program.slot(token)
        if self.guard is None:

            def put(warp: Warp, value: Array) -> None:
                warp.registers[slot] = (
                    value if warp.active is None else _blend(warp.active, value, warp.registers[slot])
                )

            return put
        lanes = self.lanes()

        def put_where(warp: Warp, value: Array) -> None:
            on = lanes(warp)
            warp.registers[slot] = value if on.all() else _blend(on, value, warp.registers[slot])

        return put_where


def _blend(on: Array, value: Array, old: Array) -> Array:
    if old.dtype != value.dtype:
        old = old.view(value.dtype) if old.itemsize == value.itemsize else old.astype(value.dtype)
    return np.where(on, value, old)


def _immediate(token: str, bits: int) -> int:
    if token[:2] in ("0f", "0d"):  # the bits of a float or a double
        return int(token[2:], 16)
    return int(token.rstrip("U"), 0) & ((1 << bits) - 1)


def registers_of(token: str) -> list[str]:
    """``{a, b}`` or ``a``."""
    return split_operands(token[1:-1]) if token.startswith("{") else [token]


# -------------------------------------------------------------------------------------------- what the bits stand for


def numbers(raw: Array, kind: str) -> Array:
    """The bits of a register as signed integers or floats, by the type of an instruction."""
    if kind[0] == "s":
        return raw.view({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[raw.itemsize])
    if kind in ("f16", "f32", "f64"):
        return raw.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])
    return raw


def halves(raw: Array, kind: str) -> Array:
    """The bits of bfloat16 (``bf16``, ``bf16x2``) or float16 numbers as float32."""
    if kind.startswith("bf"):
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16).astype(np.float32)


def bits_of_halves(values: Array, kind: str) -> Array:
    """float32 rounded to the nearest bfloat16 or float16, as bits."""
    if not kind.startswith("bf"):
        return values.astype(np.float16).view(np.uint16)
    raw = values.view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
