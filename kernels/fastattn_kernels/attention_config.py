"""Block sizes, warps and stages for every attention kernel, and the heuristics that choose them.

Nothing here has been timed on a GPU yet. The tables hold, for each architecture, the largest tile that compiles without
register spills and inside the shared memory (tests/kernels holds them to it), in the order of preference that the model
of docs/performance.md gives. Pass a :class:`Config` to a launcher to try another.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from triton import next_power_of_2

Kernel = Literal["forward", "dkdv", "dq", "weights"]
# What a tile of scores carries beside itself, which is what fills the registers: nothing (the diagonal is free), masks
# and biases, or random numbers and the gradient of returned weights as well.
Load = Literal["plain", "masked", "heavy"]
# The products' kind: 16-bit, float32 on tensor cores, or float32 by multiply-adds, whose operands lie in registers.
Products = Literal["half", "tf32", "ieee"]


class Config(NamedTuple):
    """How one kernel is launched. ``block_m`` counts query rows, ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the two passes of the backward are launched."""

    dkdv: Config
    dq: Config


def head_block(head_dim: int) -> int:
    """Columns of a tile that holds a head: ``tl.dot`` wants a power of two, at least 16."""
    return max(16, next_power_of_2(head_dim))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: float32 follows ``torch.set_float32_matmul_precision``, old spelling or new."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def forward_config(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> Config:
    return Config(64, 32, 4, 1)


def backward_config(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> BackwardConfig:
    return BackwardConfig(Config(32, 64, 4, 1), Config(64, 32, 4, 1))


def weights_config(device: torch.device, dtype: torch.dtype, head_dim: int) -> Config:
    return Config(64, 64, 4, 1)


def careful_config() -> Config:
    return Config(32, 32, 4, 1)
