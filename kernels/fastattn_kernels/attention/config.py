"""Block sizes, warps and stages for every attention kernel, and the heuristics that choose them.

Nothing here has been timed on a GPU yet. The tables hold, for each architecture, the largest tile found that compiles
without register spills and inside the shared memory; tests/kernels holds all of them to it but the TF32 ones. Pass a
:class:`Config` to a launcher to try another.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import torch
from triton import next_power_of_2

from fastattn_kernels.common.device import Target, target_of

Kernel = Literal["forward", "dkdv", "dq", "one_pass", "bias", "weights"]
# What a tile of scores carries beside itself, which is what fills the registers: nothing (the diagonal is free), what
# hides keys, what is added to scores as well, or a softcap, random numbers and the gradient of returned weights too.
Load = Literal["plain", "masked", "biased", "heavy"]


class Config(NamedTuple):
    """How one kernel is launched. ``block_m`` counts the rows of a tile, ``block_n`` its columns: keys, or elements.

    ``pipelined``, which only the forward knows, multiplies queries with the next tile's keys before weights with this
    one's values, so that exponentials run beside products.
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


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the two passes of the backward are launched."""

    dkdv: Config
    dq: Config


def head_block(head_dim: int) -> int:
    """Columns of a tile that holds a head: ``tl.dot`` wants a power of two, at least 16."""
    return max(16, int(next_power_of_2(head_dim)))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: float32 follows ``torch.set_float32_matmul_precision``, old spelling or new.
    AMD has no TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


# architecture -> kernel -> columns of a head's tile -> (plain, masked, biased, heavy); the last one given serves what
# follows.
_C = Config
_HALF: dict[str, dict[Kernel, dict[int, tuple[Config, ...]]]] = {
    "sm_90": {
        # 8 warps: 4 would serialise wgmma (C7511). Pipelined: all 66 exponentials of a thread are issued beside wgmma,
        # else none. Modelled, a whole tile takes 2220 cycles instead of 3104 (128 columns), 1260 instead of 2080 (64).
        "forward": {
            64: (_C(128, 128, 8, 3, True), _C(128, 128, 8, 2), _C(128, 64, 8, 3)),
            128: (_C(128, 128, 8, 2, True), _C(128, 64, 8, 3)),
            256: (_C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 32, 8, 2)),
            512: (_C(32, 32, 8, 2),),
        },
        "dkdv": {
            64: (_C(64, 128, 8, 2), _C(64, 128, 8, 2), _C(32, 128, 8, 2), _C(32, 64, 8, 1)),
            128: (_C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
            256: (_C(32, 32, 8, 1),),
            512: (_C(16, 32, 8, 1), _C(16, 16, 8, 2)),
        },
        "dq": {
            64: (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(64, 32, 8, 2)),
            128: (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(64, 32, 8, 2)),
            256: (_C(64, 32, 8, 2), _C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 16, 8, 1)),
            512: (_C(32, 32, 8, 2), _C(32, 16, 8, 2)),
        },
        "one_pass": {
            64: (_C(64, 128, 8, 2), _C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 1)),
            128: (_C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2)),
            256: (_C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 16, 8, 1), _C(16, 32, 8, 1)),
        },
        "bias": {64: (_C(64, 64, 8, 2),), 128: (_C(64, 64, 8, 2),), 256: (_C(64, 32, 8, 2),), 512: (_C(32, 16, 8, 2),)},
        "weights": {
            64: (_C(64, 64, 8, 2),),
            128: (_C(64, 64, 8, 2),),
            256: (_C(64, 64, 8, 1),),
            512: (_C(32, 32, 8, 2),),
        },
    },
    "sm_80": {
        "forward": {
            64: (_C(128, 128, 8, 3), _C(128, 64, 8, 3)),
            128: (_C(64, 64, 8, 2), _C(64, 32, 4, 2)),
            256: (_C(64, 32, 8, 2),),
            512: (_C(32, 32, 8, 2),),
        },
        "dkdv": {
            64: (_C(32, 128, 8, 2), _C(32, 32, 4, 2)),
            128: (_C(64, 64, 8, 2), _C(32, 64, 8, 1), _C(32, 64, 8, 1), _C(32, 32, 8, 1)),
            256: (_C(32, 64, 8, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 16, 8, 2)),
            512: (_C(16, 32, 8, 2), _C(16, 16, 8, 2)),
        },
        "dq": {
            64: (_C(128, 32, 8, 2), _C(64, 32, 8, 2)),
            128: (_C(64, 64, 8, 2), _C(64, 32, 8, 2), _C(64, 32, 8, 2), _C(32, 32, 8, 2)),
            256: (_C(64, 32, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
            512: (_C(32, 32, 8, 2), _C(32, 32, 8, 1)),
        },
        "one_pass": {
            64: (_C(32, 128, 8, 2), _C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2)),
            128: (_C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2)),
            256: (_C(32, 32, 8, 1), _C(16, 32, 8, 2), _C(16, 32, 8, 2), _C(16, 16, 8, 2)),
        },
        "bias": {64: (_C(64, 32, 8, 2),), 128: (_C(32, 32, 8, 2),), 256: (_C(32, 16, 8, 2),), 512: (_C(32, 16, 8, 2),)},
        "weights": {
            64: (_C(64, 64, 8, 1),),
            128: (_C(64, 64, 8, 1),),
            256: (_C(64, 64, 8, 1),),
            512: (_C(32, 32, 8, 2),),
        },
    },
    "sm_86": {
        "forward": {
            64: (_C(128, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(64, 64, 8, 1)),
            128: (_C(128, 64, 8, 3), _C(64, 64, 8, 2), _C(64, 64, 8, 2), _C(32, 32, 4, 1)),
            256: (_C(64, 32, 8, 2), _C(32, 32, 8, 1)),
            512: (_C(32, 32, 8, 2), _C(32, 16, 8, 2)),
        },
        "dkdv": {
            64: (_C(32, 128, 8, 2), _C(32, 32, 4, 2)),
            128: (_C(64, 64, 8, 2), _C(32, 32, 8, 2)),
            256: (_C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 16, 8, 1)),
            512: (_C(16, 16, 8, 2),),
        },
        "dq": {
            64: (_C(128, 64, 8, 2), _C(64, 32, 8, 2), _C(64, 32, 8, 2), _C(32, 32, 8, 1)),
            128: (_C(64, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
            256: (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 16, 8, 1)),
            512: (_C(32, 16, 8, 1), _C(16, 16, 4, 2)),
        },
        "one_pass": {
            64: (_C(32, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 1)),
            128: (_C(32, 64, 8, 2), _C(32, 32, 8, 2)),
            256: (_C(16, 32, 8, 1), _C(16, 16, 8, 1)),
        },
        "bias": {64: (_C(64, 32, 8, 2),), 128: (_C(32, 32, 8, 2),), 256: (_C(32, 16, 8, 2),), 512: (_C(32, 16, 8, 2),)},
        "weights": {
            64: (_C(64, 64, 8, 1),),
            128: (_C(64, 64, 8, 1),),
            256: (_C(64, 64, 8, 1),),
            512: (_C(32, 32, 8, 2),),
        },
    },
    "gfx9": {
        "forward": {
            64: (_C(128, 64, 4, 1), _C(128, 64, 4, 1), _C(128, 64, 4, 1), _C(64, 64, 4, 1)),
            128: (_C(128, 64, 4, 1),),
            256: (_C(128, 64, 4, 1), _C(64, 64, 4, 1), _C(64, 64, 4, 1), _C(64, 32, 4, 1)),
            512: (_C(32, 32, 4, 1),),
        },
        "dkdv": {
            64: (_C(64, 64, 4, 1), _C(32, 128, 4, 1), _C(32, 128, 4, 1), _C(32, 64, 4, 1)),
            128: (_C(32, 128, 4, 1), _C(32, 64, 4, 1), _C(32, 64, 4, 1), _C(32, 32, 4, 1)),
            256: (_C(16, 32, 4, 1), _C(16, 16, 4, 1)),
            512: (_C(16, 32, 4, 1), _C(16, 32, 4, 1), _C(16, 32, 4, 1), _C(16, 16, 4, 1)),
        },
        "dq": {
            64: (_C(128, 64, 8, 1), _C(64, 32, 4, 1), _C(64, 32, 4, 1), _C(32, 32, 4, 1)),
            128: (_C(64, 64, 4, 1), _C(64, 64, 4, 1), _C(64, 64, 4, 1), _C(32, 32, 4, 1)),
            256: (_C(64, 32, 4, 1), _C(32, 32, 4, 1)),
            512: (_C(32, 16, 4, 1),),
        },
        "one_pass": {
            64: (_C(64, 64, 4, 1), _C(32, 64, 4, 1)),
            128: (_C(32, 64, 4, 1), _C(32, 32, 4, 1)),
            256: (_C(16, 32, 4, 1),),
        },
        "bias": {
            64: (_C(128, 64, 8, 1),),
            128: (_C(128, 64, 8, 1),),
            256: (_C(64, 64, 4, 1),),
            512: (_C(32, 32, 4, 1),),
        },
        "weights": {
            64: (_C(64, 64, 4, 1),),
            128: (_C(64, 64, 4, 1),),
            256: (_C(64, 64, 4, 1),),
            512: (_C(32, 32, 4, 1),),
        },
    },
}
# float32 by multiply-adds: every thread holds whole rows of its operands, so that only small tiles fit.
_IEEE: dict[Kernel, dict[int, Config]] = {
    "forward": {64: _C(32, 32, 8, 1), 128: _C(16, 16, 4, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 8, 1)},
    "dkdv": {64: _C(16, 32, 8, 1), 128: _C(16, 16, 8, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 4, 1)},
    "dq": {64: _C(16, 16, 4, 1), 128: _C(16, 16, 4, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 8, 1)},
    "one_pass": {64: _C(16, 32, 8, 1), 128: _C(16, 16, 8, 1), 256: _C(16, 16, 8, 2)},
    "bias": {64: _C(16, 16, 8, 1), 128: _C(16, 16, 8, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 8, 1)},
    "weights": {64: _C(32, 32, 4, 1), 128: _C(16, 16, 4, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 8, 1)},
}
# AMD's matrix cores take float32 as it is.
_GFX9_FLOAT: dict[Kernel, dict[int, Config]] = {
    "forward": {64: _C(32, 32, 8, 1), 128: _C(32, 32, 4, 1), 256: _C(32, 32, 4, 1), 512: _C(16, 16, 4, 1)},
    "dkdv": {64: _C(32, 32, 4, 1), 128: _C(16, 32, 4, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 4, 1)},
    "dq": {64: _C(32, 16, 8, 1), 128: _C(32, 16, 8, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 4, 1)},
    "one_pass": {64: _C(32, 32, 4, 1), 128: _C(16, 32, 4, 1), 256: _C(16, 16, 4, 1)},
    "bias": {64: _C(32, 32, 4, 1), 128: _C(32, 32, 4, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 8, 1)},
    "weights": {64: _C(64, 64, 8, 1), 128: _C(32, 32, 4, 1), 256: _C(32, 32, 4, 1), 512: _C(16, 16, 4, 1)},
}
# float32 on tensor cores (TF32): twice the bytes of 16-bit tiles. The same on every NVIDIA architecture.
_TF32: dict[Kernel, dict[int, Config]] = {
    "forward": {64: _C(64, 32, 8, 1), 128: _C(32, 32, 8, 1), 256: _C(32, 16, 8, 1), 512: _C(16, 16, 8, 1)},
    "dkdv": {64: _C(32, 32, 8, 1), 128: _C(16, 32, 8, 1), 256: _C(16, 16, 4, 1), 512: _C(16, 16, 8, 1)},
    "dq": {64: _C(32, 32, 8, 1), 128: _C(32, 16, 8, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 8, 1)},
    "one_pass": {64: _C(32, 32, 8, 1), 128: _C(16, 32, 8, 1), 256: _C(16, 16, 4, 1)},
    "bias": {64: _C(32, 32, 8, 1), 128: _C(32, 16, 8, 1), 256: _C(16, 16, 8, 1), 512: _C(16, 16, 8, 1)},
    "weights": {64: _C(64, 32, 8, 1), 128: _C(32, 32, 8, 1), 256: _C(32, 32, 8, 1), 512: _C(16, 16, 8, 1)},
}
# The interpreter has no registers; its tiles are small and unequal, so that short sequences exercise every range.
_INTERPRETED: dict[Kernel, Config] = {
    "forward": _C(64, 32, 4, 1),
    "dkdv": _C(32, 64, 4, 1),
    "dq": _C(64, 32, 4, 1),
    "one_pass": _C(32, 64, 4, 1),
    "bias": _C(64, 64, 4, 1),
    "weights": _C(64, 64, 4, 1),
}
_SMALL, _SMALLEST = _C(32, 32, 4, 1), _C(16, 16, 4, 1)
_LOADS: tuple[Load, ...] = get_args(Load)


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
        return _INTERPRETED[kernel]
    block = max(64, head_block(head_dim), head_block(value_dim))
    architecture = _architecture(target)
    if dtype == torch.float32:
        by_precision = _IEEE if dot_precision(dtype) == "ieee" else _TF32
        return (_GFX9_FLOAT if architecture == "gfx9" else by_precision)[kernel][block]
    if architecture is None:
        return _SMALL if block <= 256 else _SMALLEST
    by_load = _HALF[architecture][kernel][block]
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
    """The tile of the careful pass, which runs only where NaN or inf came out: it may spill, but fits anywhere."""
    wide = max(head_block(head_dim), head_block(value_dim)) > 256
    return _SMALLEST if wide or dtype == torch.float32 else _SMALL
