"""Block sizes, warps and grids for the norms, and the heuristics that choose them.

Nothing here has been timed on a GPU yet. The numbers are arithmetic: bytes in flight, registers a thread, programs a
multiprocessor; tests/kernels holds them to no register spills.
"""

from typing import NamedTuple

import torch
from triton import next_power_of_2

from fastattn_kernels.common.config import Config
from fastattn_kernels.common.device import multiprocessors, target_of

# The widest row that is one tile in the forward: 32 float32 a thread in 16 warps. Wider rows go by in a loop, whose
# second reading comes from the L2 cache. Less where random numbers and more fill the registers.
_WHOLE_ROW = {False: 16384, True: 4096}
_LOOPED_BLOCK = {False: 8192, True: 4096}
# The backward holds two tiles, the sums of two vectors' gradients, and sometimes a third: at twice this it spills, and
# on NVIDIA's others than sm_90, in float32, already at this. Wider rows are split among programs, each with the
# gradients of its own columns.
_WHOLE_ROW_BACKWARD = {False: 8192, True: 4096}
# Where a row is split in two, each of its two programs reads both halves for the row's sums, the other's half from the
# L2 cache. From three parts on, that is more traffic than a kernel of its own for the sums.
_SPLITS_THAT_LOOP = 2
# Targets whose shared memory holds two tiles: the next row's tile is loaded while one is computed with (3 stages; with
# 2 it is loaded afterwards).
_ROOMY = [("cuda", 90), ("cuda", 100)]
_INTERPRETED_ROW = 1024


class NormBackwardConfig(NamedTuple):
    """How the backward is launched: the tile, the number of programs that share the rows, and whether the sums of a
    row come from a kernel of their own."""

    tile: Config
    groups: int
    splits: int
    sums_apart: bool


def _rows_of_tile(size: int, elements: int) -> int:
    """How many rows make a tile of about ``elements`` elements. It does not depend on how many rows there are: another
    number of rows compiles nothing again."""
    return int(max(1, elements // next_power_of_2(max(size, 16))))


def _warps(elements: int, each: int, device: torch.device) -> int:
    """Warps for a tile of ``elements`` elements, of which a thread has ``each``."""
    threads = 64 if target_of(device).backend == "hip" else 32
    return max(1, min(elements // (threads * each), 1024 // threads, 16))


def norm_forward_config(size: int, device: torch.device, is_heavy: bool) -> Config:
    """The forward's tile for rows of ``size`` elements."""
    if target_of(device).backend == "interpreter":
        block_n = min(_INTERPRETED_ROW, max(16, int(next_power_of_2(size))))
        return Config(_rows_of_tile(size, 4096), block_n, 4, 1)
    if size > _WHOLE_ROW[is_heavy]:
        block_n = _LOOPED_BLOCK[is_heavy]
        return Config(1, block_n, _warps(block_n, 8, device), 2)
    block_n = max(16, int(next_power_of_2(size)))
    # 8 elements a thread, a load of 16 bytes in 16-bit dtypes from each tensor, leave room for 1024 threads and more
    block_m = _rows_of_tile(size, 2048)
    return Config(block_m, block_n, _warps(block_m * block_n, 8, device), 1)


def norm_backward_config(size: int, rows: int, device: torch.device, is_heavy: bool) -> NormBackwardConfig:
    """The backward's tile and grid for ``rows`` rows of ``size`` elements."""
    target = target_of(device)
    if target.backend == "interpreter":
        block_n = min(_INTERPRETED_ROW, max(16, int(next_power_of_2(size))))
        tile = Config(_rows_of_tile(size, 2048), block_n, 4, 1)
        per_multiprocessor = 1
    else:
        whole_row = _WHOLE_ROW_BACKWARD[is_heavy or (target.backend == "cuda" and target.arch != 90)]
        block_n = max(16, int(next_power_of_2(size)))
        while block_n > whole_row:
            block_n //= 2
        block_m = _rows_of_tile(block_n, 1024)
        # 16 elements a thread, of up to six tiles: what was read, the two or three sums, and what is written. Half as
        # many where a tile has many rows, each of which has statistics in registers, or where rows are not aligned:
        # then every element has a pointer.
        warps = _warps(block_m * block_n, 8 if block_m > 4 or size % 16 else 16, device)
        tile = Config(block_m, block_n, warps, 3 if target in _ROOMY else 2)
        # All programs have to run at once, or the last would start when the first end. 512 threads of up to 128
        # registers fill a multiprocessor, half as many if heavy. They have 6 bytes in flight for each of their 8192
        # elements: more than the 25 KiB of each of 132 multiprocessors that keep 4.8 TB/s busy over 700 ns.
        per_multiprocessor = max(1, (256 if is_heavy else 512) // (32 * tile.num_warps))
    splits = -(-size // tile.block_n)
    tiles = -(-rows // tile.block_m)
    groups = max(1, min(tiles, per_multiprocessor * multiprocessors(device) // splits))
    return NormBackwardConfig(tile, groups, splits, splits > _SPLITS_THAT_LOOP)
