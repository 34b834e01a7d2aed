"""How one kernel of any family is launched, and what a choice of tiles depends on."""

from typing import Literal, NamedTuple

import torch
from triton import next_power_of_2

# What a tile of scores carries beside itself, which is what fills the registers. plain: nothing (a diagonal is free);
# masked: something that hides keys; biased: something added to the scores, too; heavy: a softcap, random numbers or the
# gradient of returned weights, too; modified: a user's function of scores, too.
Load = Literal["plain", "masked", "biased", "heavy", "modified"]


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile: keys, or elements of a row.
        num_warps: warps of a program.
        num_stages: tiles in shared memory at a time.
        pipelined: whether queries are multiplied with the next tile's keys before weights with this tile's values, so
            that exponentials run beside products. Only attention's forward knows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pipelined: bool = False

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({"PIPELINED": True} if self.pipelined else {}),
        }


def head_block(head_dim: int) -> int:
    """Columns of a tile that holds a head: ``tl.dot`` wants a power of two, at least 16."""
    return max(16, int(next_power_of_2(head_dim)))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: float32 follows ``torch.set_float32_matmul_precision``, old spelling or new.
    AMD has no TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"
