"""Global memory: the tensors that a launch was given, element by element, and what blocks do to each other's elements.

An access outside every element of every tensor is out of bounds: gaps that strides leave count as outside. Blocks run
in any order and side by side on a GPU, so an element that one block writes and another reads or writes is a race, and
so are two warps of a block that no barrier orders. Atomic additions are ordered by the hardware; writing what is there
already, as flags are written, does no harm.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.machines.findings import Finding
from tests.machines.soft_gpu.operands import BITS, UNSIGNED, Array, Instruction, Step, numbers, registers_of

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp

_NOBODY, _MANY, _ATOMIC = -1, -2, -3  # in the place of a block


class Region:
    """One storage: its bytes, which of its elements belong to a tensor, who wrote and read each."""

    def __init__(self, begin: int, tensors: list[torch.Tensor]) -> None:
        size = tensors[0].untyped_storage().nbytes()
        self.begin, self.end = begin, begin + size
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
        self.unit = min(tensor.itemsize for tensor in tensors)
        elements = size // self.unit
        self.inside = np.zeros(elements, bool)
        for tensor in tensors:
            units = torch.from_numpy(self.inside).view(-1, tensor.itemsize // self.unit) if elements else None
            if units is not None and tensor.numel():
                units.as_strided(
                    (*tensor.shape, units.shape[1]),
                    (*(stride * units.shape[1] for stride in tensor.stride()), 1),
                    tensor.storage_offset() * units.shape[1],
                ).fill_(True)
        self.all_inside = bool(self.inside.all())
        self.written = False
        self.writer, self.reader = np.full(elements, _NOBODY, np.int32), np.full(elements, _NOBODY, np.int32)
        self.writing_warp, self.writing_tick = np.zeros(elements, np.int16), np.zeros(elements, np.int32)


class GlobalMemory:
    """What one launch may touch."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._regions = [Region(begin, storages[begin]) for begin in sorted(storages)]
        self._begins = np.array([region.begin for region in self._regions], np.int64)

    def load(self, warp: Warp, addresses: Array, on: Array, size: int, where: str = "") -> Array:
        """``size`` bytes at each address where ``on`` holds, zeros elsewhere: ``[n, size]``."""
        result = np.zeros((len(addresses), size), np.uint8)
        for region, lanes, offsets in self._by_region(addresses, on, size, where):
            units = self._units(region, offsets, size, where)
            self._note_read(warp, region, units, where)
            result[lanes] = region.bytes[offsets[:, None] + np.arange(size)]
        return result

    def store(self, warp: Warp, addresses: Array, on: Array, data: Array, where: str = "") -> None:
        """Rows of ``data``, uint8, to the addresses where ``on`` holds."""
        size = data.shape[1]
        for region, lanes, offsets in self._by_region(addresses, on, size, where):
            units = self._units(region, offsets, size, where)
            places = offsets[:, None] + np.arange(size)
            changed = (region.bytes[places] != data[lanes]).reshape(len(offsets), -1, min(region.unit, size)).any(2)
            self._note_write(warp, region, units, where, changed)
            region.bytes[places] = data[lanes]

    def update(self, warp: Warp, addresses: Array, on: Array, values: Array, operation: Any, where: str = "") -> Array:
        """Atomically, lane after lane, the result of ``operation(old, value)``; the old values."""
        old = np.zeros_like(values)
        for region, lanes, offsets in self._by_region(addresses, on, values.itemsize, where):
            self._note_atomic(warp, region, self._units(region, offsets, values.itemsize, where), where)
            whole = region.bytes[: len(region.bytes) // values.itemsize * values.itemsize].view(values.dtype)
            for lane, place in zip(lanes.tolist(), (offsets // values.itemsize).tolist()):
                old[lane] = whole[place]
                whole[place] = operation(whole[place], values[lane])
        return old

    def add(self, warp: Warp, addresses: Array, on: Array, values: Array, where: str = "") -> None:
        """Atomic additions whose old values nobody wants."""
        for region, lanes, offsets in self._by_region(addresses, on, values.itemsize, where):
            self._note_atomic(warp, region, self._units(region, offsets, values.itemsize, where), where)
            whole = region.bytes[: len(region.bytes) // values.itemsize * values.itemsize].view(values.dtype)
            np.add.at(whole, offsets // values.itemsize, values[lanes])

    # ----------------------------------------------------------------------------------------------- which elements

    def _by_region(self, addresses: Array, on: Array, size: int, where: str) -> Any:
        """The lanes that are on, by the region they touch, with their offsets in it."""
        lanes = np.nonzero(on)[0]
        if not len(lanes):
            return
        aimed = addresses[lanes].astype(np.int64)
        indices = np.searchsorted(self._begins, aimed, side="right") - 1
        for index in np.unique(indices).tolist():
            chosen = indices == index
            if index < 0:
                raise self._outside(int(aimed[chosen][0]), size, where)
            region, offsets = self._regions[index], aimed[chosen] - self._begins[index]
            if (offsets + size > region.end - region.begin).any():
                raise self._outside(int(aimed[chosen].max()), size, where)
            yield region, lanes[chosen], offsets

    def _units(self, region: Region, offsets: Array, size: int, where: str) -> Array:
        units = offsets[:, None] // region.unit + np.arange(max(1, size // region.unit))
        if not region.all_inside and not region.inside[units].all():
            bad = int((~region.inside[units]).any(1).argmax())
            raise self._outside(region.begin + int(offsets[bad]), size, where)
        return units

    def _outside(self, address: int, size: int, where: str) -> Finding:
        near = min(self._regions, key=lambda region: max(region.begin - address, address - region.end), default=None)
        how = f"byte {address - near.begin} of a storage of {near.end - near.begin}" if near else "no tensor at all"
        return Finding(
            "out of bounds", f"{size} bytes at {address:#x}: {how}, in no element of the launch's tensors", where
        )

    # ------------------------------------------------------------------------------------------------ who comes first

    def _note_read(self, warp: Warp, region: Region, units: Array, where: str) -> None:
        block = warp.block.id
        if region.written:
            self._check_writers(warp, region, units, where, "reads")
        readers = region.reader[units]
        region.reader[units] = np.where((readers == _NOBODY) | (readers == block), block, _MANY)

    def _note_write(self, warp: Warp, region: Region, units: Array, where: str, changed: Array) -> None:
        block = warp.block.id
        touched = units[changed]
        if region.written:
            self._check_writers(warp, region, touched, where, "writes")
        self._check_readers(region, touched, block, where)
        region.written = True
        region.writer[units] = block
        region.writing_warp[units], region.writing_tick[units] = warp.id, warp.clock[warp.id]

    def _note_atomic(self, warp: Warp, region: Region, units: Array, where: str) -> None:
        if region.written:
            self._check_writers(warp, region, units[region.writer[units] != _ATOMIC], where, "adds to")
        self._check_readers(region, units, warp.block.id, where)
        region.written = True
        region.writer[units] = _ATOMIC

    def _check_writers(self, warp: Warp, region: Region, units: Array, where: str, does: str) -> None:
        writers = region.writer[units]
        block = warp.block.id
        others = (writers != _NOBODY) & (writers != block)
        if others.any():
            writer = int(writers[others].flat[0])
            who = "atomics change" if writer == _ATOMIC else f"block {writer} writes"
            raise Finding("race", f"block {block} {does} an element that {who} in the same launch", where)
        unordered = (writers == block) & (region.writing_tick[units] > warp.clock[region.writing_warp[units]])
        if unordered.any():
            writer = int(region.writing_warp[units][unordered].flat[0])
            raise Finding(
                "race", f"warp {warp.id} {does} an element that warp {writer} writes at any time before or after", where
            )

    def _check_readers(self, region: Region, units: Array, block: int, where: str) -> None:
        readers = region.reader[units]
        others = (readers != _NOBODY) & (readers != block)
        if others.any():
            raise Finding("race", f"block {block} writes an element that another block reads in the same launch", where)


# --------------------------------------------------------------------------------------------------------- instructions


def load(instruction: Instruction) -> Step:
    """``ld.global``."""
    kind = instruction.type
    bits, vector = BITS[kind], instruction.vector()
    size = bits // 8 * vector
    puts = [instruction.write(token) for token in registers_of(instruction.operands[0])]
    address, lanes = instruction.address(instruction.operands[1]), instruction.lanes()

    def step(warp: Warp) -> None:
        on = lanes(warp)
        if not on.any():
            return
        addresses = address(warp)
        _aligned(addresses[on], size)
        values = warp.block.memory.load(warp, addresses, on, size).view(UNSIGNED[bits])
        for i, put in enumerate(puts):
            put(warp, widened(values[:, i], kind))

    return step


def store(instruction: Instruction) -> Step:
    """``st.global``."""
    bits, vector = BITS[instruction.type], instruction.vector()
    size = bits // 8 * vector
    address, lanes = instruction.address(instruction.operands[0]), instruction.lanes()
    reads = [instruction.read(token, bits) for token in registers_of(instruction.operands[1])]

    def step(warp: Warp) -> None:
        on = lanes(warp)
        if not on.any():
            return
        addresses = address(warp)
        _aligned(addresses[on], size)
        values = np.stack([read(warp) for read in reads], 1).view(np.uint8)
        warp.block.memory.store(warp, addresses, on, values)

    return step


def widened(values: Array, kind: str) -> Array:
    """Bytes as the registers of 16 bits that they are loaded into."""
    if kind == "s8":
        return values.view(np.int8).astype(np.int16).view(np.uint16)
    return values.astype(np.uint16) if values.itemsize == 1 else np.ascontiguousarray(values)


def _aligned(addresses: Array, size: int) -> None:
    if (addresses % size).any():
        raise Finding(
            "undefined", f"an access of {size} bytes at {int(addresses[addresses % size != 0][0]):#x}: not aligned"
        )


_ATOMICS: dict[str, Any] = {
    "add": lambda old, value: old + value, "min": min, "max": max, "exch": lambda old, value: value,
    "and": lambda old, value: old & value, "or": lambda old, value: old | value, "xor": lambda old, value: old ^ value,
}  # fmt: skip


def atomic(instruction: Instruction) -> Step:
    """``atom`` and ``red``, on global memory."""
    parts, kind = instruction.parts, instruction.type
    name = next((part for part in parts if part in _ATOMICS), None)
    if name is None or "global" not in parts or BITS[kind] < 32 or kind.endswith("x2"):
        raise instruction.unknown("this atomic operation")
    bits = BITS[kind]
    *result, target, value = instruction.operands
    puts = [instruction.write(token) for operand in result for token in registers_of(operand)]
    address, lanes = instruction.address(target), instruction.lanes()
    reads = [instruction.read(token, bits) for token in registers_of(value)]

    def step(warp: Warp) -> None:
        on = lanes(warp)
        if not on.any():
            return
        for i, read in enumerate(reads):
            addresses, values = address(warp) + i * bits // 8, numbers(read(warp), kind)
            _aligned(addresses[on], bits // 8)
            if not puts and name == "add":
                warp.block.memory.add(warp, addresses, on, values)
                continue
            old = warp.block.memory.update(warp, addresses, on, values, _ATOMICS[name])
            if puts:
                puts[i](warp, old.view(UNSIGNED[bits]))

    return step
