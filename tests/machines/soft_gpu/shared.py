"""Shared memory: ordinary loads and stores, matrices of eight rows, and cp.async from global memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu.memory import widened
from tests.machines.soft_gpu.operands import ALL_LANES, BITS, UNSIGNED, Array, Instruction, Step, registers_of

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp


def load(instruction: Instruction) -> Step:
    """``ld.shared``."""
    kind = instruction.type
    bits = BITS[kind]
    tokens = registers_of(instruction.operands[0])
    size = bits // 8 * instruction.vector()
    puts = [instruction.write(token) for token in tokens]
    address, lanes = instruction.shared(instruction.operands[1]), instruction.lanes()
    # A register of 32 bits takes a byte or two as well.
    wide = bits < 32 and re.match(r"%r\d", tokens[0]) is not None

    def step(warp: Warp) -> None:
        on = lanes(warp)
        offsets = _inside(warp, address(warp), on, size)
        if on.any():
            warp.block.watch.read(warp, warp.block.watch.units(offsets[on], size), "generic")
        data = warp.block.shared[offsets[:, None] + np.arange(size)].view(UNSIGNED[bits])
        for i, put in enumerate(puts):
            value = widened(data[:, i], kind)
            put(
                warp,
                value.view(np.int16).astype(np.int32).view(np.uint32)
                if wide and kind[0] == "s"
                else value.astype(np.uint32)
                if wide
                else value,
            )

    return step


def store(instruction: Instruction) -> Step:
    """``st.shared``."""
    bits = BITS[instruction.type]
    size = bits // 8 * instruction.vector()
    address, lanes = instruction.shared(instruction.operands[0]), instruction.lanes()
    reads = [instruction.read(token, bits) for token in registers_of(instruction.operands[1])]

    def step(warp: Warp) -> None:
        on = lanes(warp)
        if not on.any():
            return
        offsets = _inside(warp, address(warp), on, size)[on]
        values = np.stack([read(warp) for read in reads], 1).astype(UNSIGNED[bits]).view(np.uint8)[on]
        _write(warp, offsets, values)

    return step


def _write(warp: Warp, offsets: Array, rows: Array) -> None:
    """Rows of bytes to their places. Where several lanes write to one, any of them may win.

    Threads that hold copies of one number all store it, and the copies may differ in the last bit, when a sum over
    lanes began with a fused multiply-add: what is there is the same if it is what one of the lanes writes.
    """
    places = offsets[:, None] + np.arange(rows.shape[1])
    equal = (warp.block.shared[places] == rows).all(1)
    same = bool(equal.all()) or len(np.unique(offsets[equal])) == len(np.unique(offsets))
    warp.block.watch.write(warp, warp.block.watch.units(offsets, rows.shape[1]), "generic", same=same)
    warp.block.shared[places] = rows


def _inside(warp: Warp, offsets: Array, on: Array, size: int) -> Array:
    """The offsets of the lanes that are on, 0 for the others."""
    offsets = np.where(on, offsets, 0)
    if (offsets < 0).any() or (offsets + size > len(warp.block.shared)).any():
        raise Finding(
            "out of bounds",
            f"shared bytes {int(offsets.min())} to {int(offsets.max()) + size} of {len(warp.block.shared)}",
        )
    if (offsets % size).any():
        raise Finding("undefined", f"an access of {size} bytes of shared memory that is not aligned")
    return offsets


# ---------------------------------------------------------------------------------------------------------- matrices


def matrix(instruction: Instruction) -> Step:
    """``ldmatrix`` and ``stmatrix``: each eight lanes name the rows of a matrix of 8 by 8 elements of two bytes."""
    if instruction.guard is not None or "b16" not in instruction.parts:
        raise instruction.unknown("this form of a matrix access")
    count = next(int(part[1]) for part in instruction.parts if part in ("x1", "x2", "x4"))
    transposed, loads = "trans" in instruction.parts, instruction.name == "ldmatrix"
    registers, target = instruction.operands if loads else reversed(instruction.operands)
    address = instruction.shared(target)
    tokens = registers_of(registers)

    def rows_of(warp: Warp) -> Array:
        return _inside(warp, address(warp), ALL_LANES if count == 4 else np.arange(32) < 8 * count, 16)[: 8 * count]

    if loads:
        puts = [instruction.write(token) for token in tokens]

        def step(warp: Warp) -> None:
            offsets = rows_of(warp)
            warp.block.watch.read(warp, warp.block.watch.units(offsets, 16), "generic")
            matrices = warp.block.shared[offsets[:, None] + np.arange(16)].view(np.uint16).reshape(count, 8, 8)
            for put, one in zip(puts, matrices):
                put(warp, np.ascontiguousarray(one.T if transposed else one).view(np.uint32).reshape(32))

        return step
    reads = [instruction.read(token, 32) for token in tokens]

    def write(warp: Warp) -> None:
        matrices = [np.ascontiguousarray(read(warp)).view(np.uint16).reshape(8, 8) for read in reads]
        rows = np.concatenate([np.ascontiguousarray(one.T if transposed else one) for one in matrices])
        _write(warp, rows_of(warp), rows.view(np.uint8))

    return write


# ----------------------------------------------------------------------------------------------------------- cp.async


def copy(instruction: Instruction) -> Step:
    """``cp.async``: what it copies is NaN until it is waited for."""
    opcode = instruction.opcode
    if opcode == "cp.async.commit_group":

        def commit(warp: Warp) -> None:
            warp.copy_groups.append(warp.copies)
            warp.copies = []

        return commit
    if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        left = int(instruction.operands[0]) if instruction.operands else 0

        def wait(warp: Warp) -> None:
            while len(warp.copy_groups) > left:
                for land in warp.copy_groups.popleft():
                    land()

        return wait
    if not re.match(r"cp\.async\.c[ag]\.shared", opcode):
        raise instruction.unknown("this form of cp.async")
    to, source, size = (*instruction.operands[:2], int(instruction.operands[2], 0))
    target, address, lanes = instruction.shared(to), instruction.address(source), instruction.lanes()
    # Fewer bytes than the size: zeros follow them.
    count = instruction.read(instruction.operands[3], 32) if len(instruction.operands) > 3 else None
    where = instruction.where

    def begin(warp: Warp) -> None:
        on = lanes(warp).copy()
        if not on.any():
            return
        offsets, addresses = _inside(warp, target(warp), on, size)[on], address(warp)[on]
        bytes_read = count(warp)[on].astype(np.int64) if count else np.full(len(offsets), size)
        if (addresses[bytes_read > 0] % size).any():
            raise Finding("undefined", f"cp.async of {size} bytes from an address that is not aligned")
        places = offsets[:, None] + np.arange(size)
        warp.block.watch.write(warp, warp.block.watch.units(offsets, size), "copy")
        warp.block.shared[places] = 0xFF

        def land() -> None:
            data = warp.block.memory.load(warp, addresses, bytes_read > 0, size, where)
            warp.block.shared[places] = np.where(np.arange(size) < bytes_read[:, None], data, 0)

        warp.copies.append(land)

    return begin
