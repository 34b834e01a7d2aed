"""What one multiprocessor of a target has, and how many blocks of a kernel it holds at once."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (AMD: compute unit).

    Attributes:
        block_shared_bytes: what one block may take, which the compiler does not check.
        shared_bytes: what all blocks share.
        reserved_shared_bytes: what the driver takes of that for every block.
        warps: that are resident at once.
        blocks: that are resident at once.
    """

    block_shared_bytes: int
    shared_bytes: int
    reserved_shared_bytes: int
    warps: int
    blocks: int


_KIB = 1024
_AMD = Limits(65536, 65536, 0, 32, 32)
LIMITS = {
    "cuda:75": Limits(65536, 64 * _KIB, 0, 32, 16),
    "cuda:80": Limits(166912, 164 * _KIB, _KIB, 64, 32),
    "cuda:86": Limits(101376, 100 * _KIB, _KIB, 48, 16),
    "cuda:89": Limits(101376, 100 * _KIB, _KIB, 48, 24),
    "cuda:90": Limits(232448, 228 * _KIB, _KIB, 64, 32),
    "cuda:100": Limits(232448, 228 * _KIB, _KIB, 64, 32),
    "cuda:120": Limits(101376, 100 * _KIB, _KIB, 48, 24),
    "hip:gfx90a": _AMD,
    "hip:gfx942": _AMD,
}
SHARED_MEMORY = {target: limits.block_shared_bytes for target, limits in LIMITS.items()}

MOST_REGISTERS = {"cuda": 255, "hip": 512}
_SUB_PARTITIONS = 4
_NVIDIA_REGISTERS_PER_SUB_PARTITION = 16384  # of 32 bits
_AMD_REGISTERS_PER_LANE = 512


def blocks_resident(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of a kernel one multiprocessor holds: what registers, shared memory, warps and blocks allow."""
    limits = LIMITS[target]
    if target.startswith("hip"):
        waves = min(limits.warps // _SUB_PARTITIONS, _AMD_REGISTERS_PER_LANE // _rounded_up(max(registers, 1), 8))
    else:  # registers are handed out to a warp 256 at a time, and a warp lives in one sub-partition
        waves = _NVIDIA_REGISTERS_PER_SUB_PARTITION // _rounded_up(32 * max(registers, 1), 256)
    by_registers = waves * _SUB_PARTITIONS // warps
    by_shared = limits.shared_bytes // max(shared_bytes + limits.reserved_shared_bytes, 1)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
