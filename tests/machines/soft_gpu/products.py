"""Matrix products: wgmma, whose results and operands are under way until they are waited for, and mma.

Sums are in float32, in numpy's order. A result that is read before it is waited for is NaN; an operand in shared memory
that is written before is a finding. tf32 drops the lowest 13 bits of each operand, as the hardware does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu.operands import LANES, SHARED_BASE, Array, Instruction, Step, halves, registers_of

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp

_UNDER_WAY = np.full(32, 0x7FC0DEAD, np.uint32)  # a NaN
_GROUP, _MEMBER = (LANES // 4).astype(np.int64), (LANES % 4).astype(np.int64)  # of a lane in a fragment


def wgmma(instruction: Instruction) -> Step:
    """``wgmma.fence``, ``.commit_group``, ``.wait_group``, ``.mma_async``."""
    kind = instruction.parts[1]
    if instruction.guard is not None:
        raise instruction.unknown("a guarded wgmma")
    if kind == "fence":  # orders registers, which are in order here
        return lambda warp: None
    if kind == "commit_group":

        def commit(warp: Warp) -> None:
            warp.product_groups.append(warp.products)
            warp.products = []

        return commit
    if kind == "wait_group":
        left = int(instruction.operands[0])

        def wait(warp: Warp) -> None:
            finished: set[int] = set()
            while len(warp.product_groups) > left:
                for product in warp.product_groups.popleft():
                    product.finish()
                    finished.update(product.slots)
            for group in (warp.products, *warp.product_groups):
                finished.difference_update(*(product.slots for product in group))
            for slot in finished:
                warp.registers[slot] = warp.accumulators.pop(slot)

        return wait
    return _multiply_async(instruction)


class Product(NamedTuple):
    """A product under way: what computes it, and the registers it writes."""

    finish: Callable[[], None]
    slots: list[int]


# ------------------------------------------------------------------------------------------------- operands of wgmma


@functools.lru_cache(maxsize=4096)
def _operand_places(
    descriptor: int, rows: int, depth: int, rows_inside: bool, size: int, unit: int
) -> tuple[Array, Array]:
    """Which elements of shared memory an operand ``[rows, depth]`` is by its descriptor, and which units that are.

    ``rows_inside``: rows are the contiguous dimension ("MN-major"), not the depth.
    """
    start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62 & 3  # how it is swizzled
    width = (16, 128, 64, 32)[mode]
    row, column = np.arange(rows, dtype=np.int64)[:, None], np.arange(depth, dtype=np.int64)[None, :]
    if rows_inside:
        across = row * size % width + row * size // width * (leading if mode else stride)
        along = column % 8 * width + column // 8 * (stride if mode else leading)
    else:
        across = row % 8 * width + row // 8 * stride
        along = column * size if mode else column * size % 16 + column * size // 16 * leading
    address = start + across + along
    address ^= ((address >> 7) & (0, 7, 3, 1)[mode]) << 4
    address -= SHARED_BASE
    parts = address[..., None] + np.arange(0, size, unit) if size > unit else address
    return address // size, np.unique(parts // unit)


def _in_shared(warp: Warp, descriptor: int, rows: int, depth: int, rows_inside: bool, size: int) -> tuple[Array, Array]:
    if descriptor >> 49 & 7:
        raise NotImplementedError("wgmma descriptors with a base offset")
    places, units = _operand_places(descriptor, rows, depth, rows_inside, size, warp.block.watch.unit)
    first, last = int(places.min()) * size, int(places.max() + 1) * size
    if first < 0 or last > len(warp.block.shared):
        raise Finding("out of bounds", f"a wgmma operand in shared bytes {first} to {last} of {len(warp.block.shared)}")
    return places, units


def _values(raw: Array, kind: str) -> Array:
    """The bits of elements as float32."""
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    return halves(raw, kind)


def _fragment(registers: list[Array], depth: int, kind: str) -> Array:
    """The left operand of a warp, ``[16, depth]``, from its registers."""
    result = np.empty((16, depth), np.float32)
    if kind == "tf32":
        for i, register in enumerate(registers):
            result[_GROUP + 8 * (i % 2), _MEMBER + 4 * (i // 2)] = _values(register, kind)
        return result
    for i, register in enumerate(registers):
        pair = halves(register.view(np.uint16), kind).reshape(32, 2)
        for e in range(2):
            result[_GROUP + 8 * (i % 2), 2 * _MEMBER + e + 8 * (i // 2)] = pair[:, e]
    return result


@functools.cache
def _accumulator(columns: int) -> tuple[Array, Array]:
    """Row and column of each register ``[columns / 2]`` of each lane in a warp's part of a result."""
    register = np.arange(columns // 2)[:, None]
    return _GROUP + 8 * (register // 2 % 2), register // 4 * 8 + 2 * _MEMBER + register % 2


def _multiply_async(instruction: Instruction) -> Step:
    found = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3$", instruction.opcode)
    if found is None:
        raise instruction.unknown("this wgmma")
    columns, depth, kind = int(found[1]), int(found[2]), found[3]
    size = 4 if kind == "tf32" else 2
    results, left, right, accumulates, *flags = instruction.operands
    slots = [instruction.program.slot(token) for token in registers_of(results)]
    if len(slots) != columns // 2 or flags[:2] != ["1", "1"]:
        raise instruction.unknown("this form of wgmma")
    in_registers = left.startswith("{")
    majors = [flag == "1" for flag in flags[2:]] if kind != "tf32" else [False, False]
    left_inside, right_inside = (False, majors[-1]) if in_registers else majors
    left_reads = [instruction.read(token, 32) for token in registers_of(left)] if in_registers else []
    left_descriptor = None if in_registers else instruction.read(left, 64)
    right_descriptor, adds = instruction.read(right, 64), instruction.predicate(accumulates)
    rows, cols = _accumulator(columns)

    def begin(warp: Warp) -> None:
        block = warp.block
        add = bool(adds(warp)[0])
        right_places, units = _in_shared(warp, int(right_descriptor(warp)[0]), columns, depth, right_inside, size)
        operands = [units]
        if left_descriptor is None:
            known = _fragment([read(warp) for read in left_reads], depth, kind)
        else:
            left_places, left_units = _in_shared(warp, int(left_descriptor(warp)[0]), 64, depth, left_inside, size)
            left_places = left_places[warp.id % 4 * 16 :][:16]
            operands.append(left_units)
        for units in operands:
            block.watch.read(warp, units, "async")
            block.watch.hold(warp, units)
        for slot in slots:
            value = warp.registers[slot]
            if value is not _UNDER_WAY:
                warp.accumulators[slot] = value.astype(np.uint32) if value.itemsize > 4 else value
            elif slot not in warp.accumulators:
                raise Finding("in flight", "a product is added to a copy of a result that was not waited for")
            warp.registers[slot] = _UNDER_WAY

        def finish() -> None:
            elements = block.shared.view(f"u{size}")
            a = known if left_descriptor is None else _values(elements[left_places], kind)
            product = (a @ _values(elements[right_places], kind).T)[rows, cols]
            for i, slot in enumerate(slots):
                value = product[i]
                if add:
                    value = value + warp.accumulators[slot].view(np.float32)
                warp.accumulators[slot] = value.view(np.uint32)
            for units in operands:
                block.watch.release(warp, units)

        warp.products.append(Product(finish, slots))

    return begin


# ---------------------------------------------------------------------------------------------------------------- mma


def mma(instruction: Instruction) -> Step:
    """``mma.sync.m16n8``: of 16 by 8 results by one warp, at once."""
    found = re.search(r"\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32$", instruction.opcode)
    if found is None or instruction.guard is not None:
        raise instruction.unknown("this mma")
    depth, kind = int(found[1]), found[2]
    results, *sources = map(registers_of, instruction.operands)
    puts = [instruction.write(token) for token in results]
    left, right, addend = ([instruction.read(token, 32) for token in tokens] for tokens in sources)
    rows, cols = _accumulator(8)

    def step(warp: Warp) -> None:
        a = _fragment([read(warp) for read in left], depth, kind)
        b = np.empty((depth, 8), np.float32)
        for i, read in enumerate(right):
            if kind == "tf32":
                b[_MEMBER + 4 * i, _GROUP] = _values(read(warp), kind)
                continue
            pair = halves(read(warp).view(np.uint16), kind).reshape(32, 2)
            for e in range(2):
                b[2 * _MEMBER + e + 8 * i, _GROUP] = pair[:, e]
        product = (a @ b)[rows, cols]
        for i, put in enumerate(puts):
            put(warp, (product[i] + addend[i](warp).view(np.float32)).view(np.uint32))

    return step
