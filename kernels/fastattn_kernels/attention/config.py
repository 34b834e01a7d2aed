"""Which tile an attention kernel has: the choice from ``tile_tables`` by device, dtype, head sizes and load.

Pass a :class:`~fastattn_kernels.common.config.Config` to a launcher to try another.
"""

import dataclasses
from typing import get_args

import torch

from fastattn_kernels.attention.tile_tables import GFX9_FLOAT, HALF, IEEE, INTERPRETED, TF32, Kernel
from fastattn_kernels.common.config import Config, Load, dot_precision, head_block
from fastattn_kernels.common.device import Target, target_of
from fastattn_kernels.common.problem import Problem

# Tiles that fit on any target, for heads of at most 256 columns and for wider ones.
_SMALL, _SMALLEST = Config(32, 32, 4, 1), Config(16, 16, 4, 1)
_LOADS: tuple[Load, ...] = get_args(Load)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the two passes of the backward are launched."""

    dkdv: Config
    dq: Config


def _architecture(target: Target) -> str | None:
    """The table for a target; None where there is none, and the smallest tile has to do."""
    if target.backend == "hip":
        return "gfx9" if str(target.arch).startswith("gfx9") else None
    if target.backend != "cuda":
        return None
    arch = int(target.arch)
    if arch == 90:
        return "sm_90"
    if 80 <= arch < 86 or 100 <= arch < 120:
        return "sm_80"
    return "sm_86" if arch >= 86 else None


def _config(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, load: Load
) -> Config:
    target = target_of(device)
    if target.backend == "interpreter":
        return INTERPRETED[kernel]
    block = max(64, head_block(head_dim), head_block(value_dim))
    architecture = _architecture(target)
    if dtype == torch.float32:
        by_precision = IEEE if dot_precision(dtype) == "ieee" else TF32
        return (GFX9_FLOAT if architecture == "gfx9" else by_precision)[kernel][block]
    if architecture is None:
        return _SMALL if block <= 256 else _SMALLEST
    by_load = HALF[architecture][kernel][block]
    return by_load[min(_LOADS.index(load), len(by_load) - 1)]


def forward_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, load: Load = "heavy"
) -> Config:
    """The forward's tile for a device, dtype, head sizes and what a tile of scores carries."""
    return _config("forward", device, dtype, head_dim, value_dim, load)


def backward_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, load: Load = "heavy"
) -> BackwardConfig:
    """The backward's two tiles for a device, dtype, head sizes and what a tile of scores carries."""
    arguments = (device, dtype, head_dim, value_dim, load)
    return BackwardConfig(dkdv=_config("dkdv", *arguments), dq=_config("dq", *arguments))


def one_pass_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, load: Load = "heavy"
) -> Config:
    """The tile of the backward in one pass, which takes heads of up to 256 columns."""
    return _config("one_pass", device, dtype, head_dim, value_dim, load)


def bias_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, load: Load = "heavy"
) -> Config:
    """The tile of the kernel that computes the gradient of a bias."""
    return _config("bias", device, dtype, head_dim, value_dim, load)


def weights_config(device: torch.device, dtype: torch.dtype, head_dim: int) -> Config:
    """The tile of the kernels that write the weights or pull their gradient back."""
    return _config("weights", device, dtype, head_dim, head_dim, "heavy")


def careful_config(dtype: torch.dtype, head_dim: int, value_dim: int) -> Config:
    """The tile of the careful loops, which run only where NaN or inf came out: they may spill, but fit anywhere."""
    wide = max(head_block(head_dim), head_block(value_dim)) > 256
    return _SMALLEST if wide or dtype == torch.float32 else _SMALL


def again_options(problem: Problem, config: Config) -> dict[str, int]:
    """The constants AGAIN_M and AGAIN_N of a forward: the sizes of the careful tiles in which a tile of ``config`` is
    computed again that came out with NaN or inf. 0 where nothing is hidden, and so nothing can leak."""
    if not problem.masks_pairs():
        return {"AGAIN_M": 0, "AGAIN_N": 0}
    smallest = careful_config(problem.query.dtype, problem.query.shape[3], problem.value.shape[3])
    return {
        "AGAIN_M": min(config.block_m, smallest.block_m),
        "AGAIN_N": min(config.block_n, smallest.block_n),
    }
