"""Which tile the kernel over a cache has, and among how many programs the slots are divided."""

import torch
import triton

from fastattn_kernels.common.config import Config, head_block
from fastattn_kernels.common.device import target_of

# Slots of room that a program has at least: less is read in the time that the merge's launch takes.
_FEWEST_SLOTS = 256
_MOST_SPLITS = 128
_PROGRAMS_AT_ONCE = 2  # on a multiprocessor


def decode_config(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, rows: int) -> Config:
    """The tile for a device, dtype, head sizes, and so many rows that share a head of keys."""
    target = target_of(device)
    if target.backend == "interpreter":
        return Config(16, 32, 4, 1)
    block = max(head_block(head_dim), head_block(value_dim))
    tile_bytes = 16384
    block_n = min(max(tile_bytes // (block * dtype.itemsize), 16), 128)
    block_m = min(max(16, triton.next_power_of_2(rows)), 64)
    return Config(block_m, block_n, 4, 2)


def splits_for(tiles: int, room: int, multiprocessors: int) -> int:
    """Among how many programs the slots of each of so many tiles of rows are divided."""
    most = max(1, min(room // _FEWEST_SLOTS, _MOST_SPLITS))
    places = multiprocessors * _PROGRAMS_AT_ONCE

    def time(splits: int) -> float:
        return triton.cdiv(tiles * splits, places) / splits

    best = min(map(time, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if time(splits) <= 1.1 * best)
