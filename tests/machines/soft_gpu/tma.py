"""Bulk tensor copies: boxes of a tensor map into swizzled shared memory and back, which land late and in any order.

What a load writes is NaN until it lands; what a store reads is read as late as the program allows: when it waits.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu.barriers import barrier_at
from tests.machines.soft_gpu.operands import PARAMETERS, SHARED_BASE, Array, Instruction, Step, numbers

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp

_MAGIC = 0x50F7AB1E  # driver.c
_ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
_FLOAT32 = 7
_PATTERN = (16, 256, 512, 1024)  # bytes after which a swizzle repeats


class TensorMap(NamedTuple):
    """What driver.c encodes; the innermost dimension comes first, strides are in bytes and begin with the second."""

    base: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_bytes: int
    type: int
    swizzle: int


@functools.lru_cache(maxsize=256)
def _decode(raw: bytes) -> TensorMap:
    magic, _, base, *rest = struct.unpack_from("<3Q5Q4Q5IHBB", raw)
    if magic != _MAGIC:
        raise Finding("undefined", "what should be a tensor map is none")
    rank, kind, swizzle = rest[14:]
    return TensorMap(
        base,
        tuple(rest[:rank]),
        tuple(rest[5 : 4 + rank]),
        tuple(rest[9 : 9 + rank]),
        _ELEMENT_BYTES[kind],
        kind,
        swizzle,
    )


def _elements(map: TensorMap, corner: list[int]) -> tuple[Array, Array]:
    """The address of each element of the box at ``corner``, and whether it lies inside the tensor."""
    addresses, inside = np.array(map.base, np.int64), np.array(True)
    for size, length, stride, first in zip(map.box, map.dims, (map.element_bytes, *map.strides), corner):
        index = np.arange(first, first + size, dtype=np.int64)
        # The dimension before this one is the faster: it comes behind in the flattened box.
        addresses = (index * stride)[:, None] + addresses.reshape(-1)
        inside = ((index >= 0) & (index < length))[:, None] & inside.reshape(-1)
    return addresses.ravel(), inside.ravel()


@functools.lru_cache(maxsize=1024)
def _places(offset: int, elements: int, element_bytes: int, swizzle: int, unit: int) -> tuple[Array, Array]:
    """Where each byte of a box lies in shared memory, ``[elements, element_bytes]``, and the units it covers."""
    address = SHARED_BASE + offset + np.arange(elements, dtype=np.int64) * element_bytes
    address ^= ((address >> 7) & ((1 << swizzle) - 1)) << 4
    units = np.arange(offset // unit, (offset + elements * element_bytes) // unit)
    return (address - SHARED_BASE)[:, None] + np.arange(element_bytes), units


class _Box(NamedTuple):
    map: TensorMap
    corner: list[int]
    size: int
    places: Array
    units: Array


def _box(warp: Warp, parameter: int, corner: list[int], offset: int) -> _Box:
    if not 0 <= parameter - PARAMETERS < len(warp.block.parameters):
        raise Finding("undefined", "a tensor map that is no parameter of the kernel")
    map = _decode(warp.block.parameters[parameter - PARAMETERS])
    if len(corner) != len(map.dims):
        raise Finding("undefined", f"{len(corner)} coordinates for a tensor map of {len(map.dims)} dimensions")
    elements = int(np.prod(map.box))
    size = elements * map.element_bytes
    if (offset + SHARED_BASE) % max(128, _PATTERN[map.swizzle]):
        raise Finding(
            "undefined", f"a box at shared byte {offset}: no multiple of its pattern's {_PATTERN[map.swizzle]} bytes"
        )
    if offset < 0 or offset + size > len(warp.block.shared):
        raise Finding("out of bounds", f"a box in shared bytes {offset} to {offset + size} of {len(warp.block.shared)}")
    return _Box(map, corner, size, *_places(offset, elements, map.element_bytes, map.swizzle, warp.block.watch.unit))


def copy(instruction: Instruction) -> Step:
    """``cp.async.bulk`` and ``cp.reduce.async.bulk``: tensors, and the groups that stores wait in."""
    opcode = instruction.opcode
    if opcode == "cp.async.bulk.commit_group":
        return _commit(instruction)
    if opcode.startswith("cp.async.bulk.wait_group"):
        return _wait(instruction)
    if ".tensor." not in opcode or "multicast" in opcode or "im2col" in opcode:
        raise instruction.unknown("this form of a bulk copy")
    if ".shared::cluster.global." in opcode or ".shared::cta.global." in opcode:
        return _load(instruction)
    if opcode.startswith("cp.reduce.") and ".add." not in opcode:
        raise instruction.unknown("a reduction that is no addition")
    return _store(instruction)


def _operands(
    instruction: Instruction, shared: str, tensor: str
) -> Callable[[Warp], list[tuple[int, int, int, list[int]]]]:
    """A function of a warp: each lane that copies, its place in shared memory, its map and its coordinates."""
    found = re.match(r"\[(%\w+),\s*\{(.*)\}\]$", tensor)
    if found is None:
        raise instruction.unknown(f"the operand {tensor}")
    map = instruction.read(found[1], 64)
    coordinates = [instruction.read(token.strip(), 32) for token in found[2].split(",")]
    offset, lanes = instruction.shared(shared), instruction.lanes()

    def operands(warp: Warp) -> list[tuple[int, int, int, list[int]]]:
        return [
            (
                lane,
                int(offset(warp)[lane]),
                int(map(warp)[lane]),
                [int(numbers(c(warp), "s32")[lane]) for c in coordinates],
            )
            for lane in np.nonzero(lanes(warp))[0].tolist()
        ]

    return operands


def _load(instruction: Instruction) -> Step:
    target, tensor, arrives = instruction.operands[:3]
    operands, barrier_address = _operands(instruction, target, tensor), instruction.address(arrives)
    where = instruction.where

    def begin(warp: Warp) -> None:
        block = warp.block
        for lane, offset, parameter, corner in operands(warp):
            box = _box(warp, parameter, corner, offset)
            barrier = barrier_at(warp, int(barrier_address(warp)[lane]))
            by = barrier.begin_load()
            block.watch.write(warp, box.units, "async", by=by)
            block.shared[box.places] = 0xFF

            def land(box: _Box = box, barrier: Any = barrier, tick: int = by[1]) -> None:
                addresses, inside = _elements(box.map, box.corner)
                block.shared[box.places] = block.memory.load(warp, addresses, inside, box.map.element_bytes, where)
                barrier.land(box.size, tick, where)

            block.landing.append(land)

    return begin


def _store(instruction: Instruction) -> Step:
    tensor, source = instruction.operands[:2]
    operands = _operands(instruction, source, tensor)
    adds, where = instruction.opcode.startswith("cp.reduce."), instruction.where

    def begin(warp: Warp) -> None:
        block = warp.block
        for lane, offset, parameter, corner in operands(warp):
            box = _box(warp, parameter, corner, offset)
            if adds and box.map.type != _FLOAT32:
                raise instruction.unknown("an addition of other elements than float32")
            block.watch.read(warp, box.units, "async")
            block.watch.hold(warp, box.units)

            def finish(box: _Box = box) -> None:
                data = block.shared[box.places]
                addresses, inside = _elements(box.map, box.corner)
                if adds:
                    block.memory.add(warp, addresses, inside, data.view(np.float32)[:, 0], where)
                else:
                    block.memory.store(warp, addresses, inside, data, where)
                block.watch.release(warp, box.units)

            warp.stores[lane].append(finish)

    return begin


def _commit(instruction: Instruction) -> Step:
    lanes = instruction.lanes()

    def commit(warp: Warp) -> None:
        for lane in np.nonzero(lanes(warp))[0].tolist():
            if lane in warp.stores:
                warp.store_groups[lane].append(warp.stores.pop(lane))

    return commit


def _wait(instruction: Instruction) -> Step:
    """Groups belong to the lane that committed them; a wait by others does not wait for them."""
    left, lanes = int(instruction.operands[0]), instruction.lanes()

    def wait(warp: Warp) -> None:
        on = lanes(warp)
        for lane, groups in warp.store_groups.items():
            while on[lane] and len(groups) > left:
                for finish in groups.popleft():
                    finish()

    return wait
