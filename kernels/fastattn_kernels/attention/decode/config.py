"""Which tile the kernel over a cache has, and among how many programs the slots are divided.

The kernel moves each key and value once and multiplies it with a handful of rows, so that what counts is how many bytes
are on their way from memory. By Little's law an H200 needs its 4.8 TB/s times some 1.1 us: 40 KB on each of 132
multiprocessors. A program has the keys and values of ``stages - 1`` tiles on their way:

=========  ============  =====  ======  ========  ========  =================================
head size  tile of keys  warps  stages  on their  programs  issued a tile: contiguous, pages
                                        way       resident  of 64, of 16, and cycles there are
=========  ============  =====  ======  ========  ========  =================================
64         64 x 128 B    4      4       48 KB     4         300, 380, 500 of 800
128        64 x 256 B    4      3       64 KB     3         430, 540, 750 of 1600
256        32 x 512 B    4      3       64 KB     2 to 3    420, 520, 690 of 1600
512        16 x 1024 B   8      3       64 KB     2         740, 890, 890 of 1600
=========  ============  =====  ======  ========  ========  =================================

That is bfloat16 on sm_90, up to 16 rows; the figures are read from the binaries. In all of them keys and values are
copied asynchronously, 16 bytes at a time. The last column is what a scheduler issues for a tile, beside the cycles in
which memory delivers one (36 bytes a nanosecond and multiprocessor, 1.755 GHz). One program has enough on its way, two
leave each of them 3200 cycles for its own chain of loads, products and exponentials: by this model memory alone is
waited for, in pages as well. A page that holds a tile takes one look at the block table; smaller ones take one for
each row of a thread, and that is the difference. Nothing here has been timed on a GPU yet.
"""

import torch
import triton

from fastattn_kernels.common.config import Config, Load, head_block
from fastattn_kernels.common.device import Target, target_of

# Slots of room that a program has at least. Keys and values of 256 slots, 128 KB at head size 128, take a
# multiprocessor 4 us, and another launch, the merge's, takes two.
_FEWEST_SLOTS = 256
# Programs that a multiprocessor takes to be busy: one has enough bytes on their way, but waits for its own products.
_PROGRAMS_AT_ONCE = 2
# How much longer than the best division one may take that has fewer shares: a merge is not for free, and caches are
# seldom full.
_SLACK = 1.25
# Shares that even out the last round, where there are more tiles than places for them.
_TO_EVEN_OUT = 8

# Of 16 bits: the most rows by columns of a head's tile. With more, the accumulator would spill.
_MOST_ROWS = {64: 64, 128: 64, 256: 32, 512: 16}


def decode_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, rows: int, load: Load
) -> Config:
    """The tile for a device, dtype, head sizes, so many rows that share a head of keys, and what a score carries."""
    target = target_of(device)
    if target.backend == "interpreter":
        return Config(16, 32, 4, 1)
    has_stages = _has_room_for_stages(target)
    block = max(64, head_block(head_dim), head_block(value_dim))
    if dtype == torch.float32:  # products are multiply-adds, whose operands fill the registers
        block_m, block_n = 16, 64 if block == 64 else 16
        warps, stages = 4 if block <= 128 else 8, 3 if block <= 256 else 2
    else:
        block_m = min(max(16, triton.next_power_of_2(rows)), _MOST_ROWS[block])
        block_n = min(64, 8192 // block)
        if load == "heavy" and not has_stages:
            block_n = max(block_n // 2, 16)  # else the loop would spill (sm_120 at 256 columns, gfx942 at 128)
        # with 4 warps 32 rows would spill under a bias or a softcap, and 64 in any case
        is_wide = block_m == 64 or (block_m == 32 and (load == "heavy" or block == 256)) or block == 512
        warps, stages = 8 if is_wide else 4, 4 if block == 64 else 3
    return Config(block_m, block_n, warps, stages if has_stages else min(stages, 2))


def _has_room_for_stages(target: Target) -> bool:
    """Whether a multiprocessor's shared memory holds two programs of three stages: where it has 164 KB."""
    return target.backend == "cuda" and (int(target.arch) in (80, 90) or 100 <= int(target.arch) < 120)


def splits_for(tiles: int, room: int, multiprocessors: int) -> int:
    """Among how many programs the slots of each of so many tiles of rows are divided: by the fewest that fill the
    machine.

    The model: programs on one multiprocessor share its part of the bandwidth, and all of them read as much, a share of
    a full cache; so a call takes as long as the multiprocessor with most programs, each of which brings ``1 / splits``
    of a tile's bytes. The number need not be a power of two, and a cache that is not full is divided as evenly. Only
    shapes go in, so that nobody waits for lengths, and a CUDA graph can be replayed.
    """
    places = multiprocessors * _PROGRAMS_AT_ONCE
    most = max(1, min(room // _FEWEST_SLOTS, max(triton.cdiv(places, max(tiles, 1)), _TO_EVEN_OUT)))
    times = [
        max(triton.cdiv(tiles * splits, multiprocessors), _PROGRAMS_AT_ONCE) / splits for splits in range(1, most + 1)
    ]
    return next(splits for splits, time in enumerate(times, 1) if time <= _SLACK * min(times))
