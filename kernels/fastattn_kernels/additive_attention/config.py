"""Block sizes, warps and stages for the kernels of additive attention, and the heuristics that choose them.

Nothing here has been timed on a GPU yet. What bounds the kernels is the rate of hyperbolic tangents, 16 a clock and
multiprocessor. To keep that busy, a thread needs 16 to 32 independent ones of a tile, beside several other warps.
"""

import dataclasses
from typing import NamedTuple

import torch

from fastattn_kernels.common.config import Config, Load, head_block
from fastattn_kernels.common.device import target_of


class ColumnsConfig(NamedTuple):
    """How the kernel is launched that writes dQ (or dK): a program has ``chunk`` columns of ``own`` rows (or keys), and
    meets the others ``other`` at a time."""

    own: int
    other: int
    chunk: int
    num_warps: int

    def tile(self, own_is_rows: bool) -> Config:
        """The tile of dS."""
        rows, keys = (self.own, self.other) if own_is_rows else (self.other, self.own)
        return Config(rows, keys, self.num_warps, 1)

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"OWN": self.own, "OTHER": self.other, "CHUNK": self.chunk, "num_warps": self.num_warps}


@dataclasses.dataclass(frozen=True)
class AdditiveBackwardConfig:
    """How the backward is launched: the kernel that writes dS, and twice the one that sums it up."""

    pairs: Config
    queries: ColumnsConfig
    keys: ColumnsConfig


_C = Config
# The interpreter has no registers; its tiles are unequal, so that short sequences exercise every range.
_INTERPRETED = _C(64, 32, 4, 1)
# Columns of a tile of values -> the forward's tile for a plain load, and for the others. The warps of each divide its
# tangents among themselves; at fewer than 64 keys, or 64 rows for 8 warps, two warps would compute the same ones.
_HALF = {
    64: (_C(64, 64, 4, 1), _C(32, 64, 8, 1)),
    128: (_C(64, 64, 4, 1), _C(32, 64, 8, 1)),
    256: (_C(32, 64, 8, 1), _C(32, 64, 8, 1)),
    512: (_C(32, 64, 8, 1), _C(16, 64, 8, 1)),
}
# float32 has no instruction: its tangents are arithmetic, twenty operations each.
_FLOAT = {64: _C(32, 32, 8, 1), 128: _C(16, 32, 4, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 8, 1)}


def has_hardware_tanh(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tanh may be one instruction: its relative error is 2^-11, as that of rounding to float16 is; of rounding
    to bfloat16 it is 2^-8."""
    target = target_of(device)
    return dtype != torch.float32 and target.backend == "cuda" and int(target.arch) >= 75


def additive_forward_config(device: torch.device, dtype: torch.dtype, value_dim: int, load: Load = "heavy") -> Config:
    """The forward's tile for a device, dtype, size of values and what a tile of scores carries."""
    if target_of(device).backend == "interpreter":
        return _INTERPRETED
    block = max(64, head_block(value_dim))
    if dtype == torch.float32:
        return _FLOAT[block]
    tile = _HALF[block][load != "plain"]
    # a warp has 64 threads on AMD
    return tile._replace(num_warps=4) if target_of(device).backend == "hip" else tile


def additive_pairs_config(device: torch.device, dtype: torch.dtype, value_dim: int) -> Config:
    """The tile of the kernel that writes weights or dS."""
    if target_of(device).backend == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:  # multiply-adds want whole rows of dO and V in every thread
        return _C(32, 32, 8, 1) if value_dim <= 256 else _C(16, 16, 4, 1)
    return _C(16, 64, 4, 1)


def additive_backward_config(device: torch.device, dtype: torch.dtype, value_dim: int) -> AdditiveBackwardConfig:
    """The backward's tiles.

    With eight columns, a program reads each element of dS once for eight tangents: half a byte a tangent, so 8 bytes a
    clock, where the L2 cache gives a multiprocessor some 24. Eight columns' sums for a tile of 32 x 32, and as many for
    the weight's gradient, take 128 of a thread's registers.
    """
    if target_of(device).backend == "interpreter":
        return AdditiveBackwardConfig(_INTERPRETED, ColumnsConfig(64, 32, 4, 4), ColumnsConfig(32, 64, 8, 4))
    columns = ColumnsConfig(32, 32, 8, 4)
    return AdditiveBackwardConfig(additive_pairs_config(device, dtype, value_dim), columns, columns)


def additive_careful_config() -> Config:
    """The tile of the forward's careful pass, which runs only where NaN or inf came out."""
    return _C(16, 16, 4, 1)
