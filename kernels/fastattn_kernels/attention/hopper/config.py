"""How the Hopper kernels are launched, and the heuristics that choose it.

Nothing here has been timed on a GPU yet. The tiles are those that compile without spills and fit in the shared memory
of a thread block; among them, the forward's are fastest by a model of the loop's instructions
(``benchmarks/laboratory``).
"""

import dataclasses
from typing import Literal

from torch import Tensor

from fastattn_kernels.common.problem import Problem

# Rows of a warpgroup's tile: what one wgmma computes.
CONSUMER_ROWS = 64
# Columns of the widest head that the backward takes; the forward's is in ``problem``.
LARGEST_BACKWARD_HEAD = 128

# Which program computes which tile of rows. static: of P programs, each takes every P-th tile. dynamic: each takes the
# next tile that nobody has taken, by a counter in global memory, which a launch of its own sets to 0. grid: there is a
# program for each tile, which waits for its first keys with nothing else to do.
Schedule = Literal["static", "dynamic", "grid"]


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward is launched.

    Attributes:
        block_m: rows of a tile; every 64 of them have a warpgroup, two in all.
        block_n: keys of a tile.
        stages: tiles of keys, values and biases in shared memory at a time.
        stage_output: whether the output leaves through shared memory of its own, under the next tile's products, or
            through the queries', which the next tile's then wait for.
        ping_pong: whether the warpgroups take turns at starting their products, so that one's softmax runs under the
            other's products (arXiv:2407.08608, section 3.1), and not only under its own. To be timed.
        schedule: which program computes which tile of rows.
    """

    block_m: int
    block_n: int
    stages: int
    stage_output: bool
    ping_pong: bool = False
    schedule: Schedule = "static"


def head_block(head_dim: int, value_dim: int) -> int:
    """Columns of a tile that holds a head: a power of two, at least 64, which is the width of a swizzle."""
    widest = max(head_dim, value_dim)
    return 64 if widest <= 64 else 128 if widest <= 128 else 256


def is_of_keys(bias: Tensor) -> bool:
    """Whether a bias broadcasts over rows: it is then a number for each key, and no tile."""
    return bias.shape[2] == 1 or bias.stride(2) == 0


def forward_config(problem: Problem) -> ForwardConfig:
    """The forward's tile, and how tiles are shared out.

    By the simulation in ``benchmarks/laboratory/schedule.py``, over masks and lengths from 512 to 16384: where
    something hides keys, some tiles of rows take longer than others, and the counter makes causal attention 1.00 to
    1.27 times as fast (D128, L = 8192: 0.979 of the time in products, 0.784 without it). In windows, which take a few
    microseconds, its launch costs up to 5 %. Where nothing hides keys all tiles take as long, and it would win nothing.
    """
    hides = bool(problem.masks) or problem.lower is not None or problem.upper is not None
    return dataclasses.replace(_forward_tile(problem), schedule="dynamic" if hides else "static")


def _forward_tile(problem: Problem) -> ForwardConfig:
    """Two warpgroups: three would have 160 registers a thread, too few for the accumulators.

    A stage lasts as long as a tile computes, about 600 cycles for 128 keys of 64 columns, and a load takes as many or
    more: hence more stages where tiles are small. Where a tile of bias takes the shared memory, the output gives way.
    """
    block = head_block(problem.query.shape[3], problem.value.shape[3])
    bias = problem.bias
    bias_bytes = 0 if bias is None or is_of_keys(bias) else bias.element_size()
    if block == 256:
        return ForwardConfig(128, 64, 2, stage_output=False)
    if block == 128:
        # the documents' numbers beside a tile of bias spill where it holds 128 keys
        if bias_bytes > 2 or (bias_bytes and problem.query_documents is not None):
            return ForwardConfig(128, 64, 3, stage_output=False)
        return ForwardConfig(128, 128, 2, stage_output=not bias_bytes)
    if bias_bytes > 2:
        return ForwardConfig(128, 64, 4, stage_output=True)
    return ForwardConfig(128, 128, 3 if bias_bytes else 4, stage_output=True)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the backward is launched. Thread blocks own 128 keys (dK, dV) or 128 rows (dQ), 64 a warpgroup.

    Attributes:
        block_m: rows of a tile of the kernel that owns keys: 64, or 128 that are worked off in halves.
        block_n: keys of a tile of the dQ pass.
        stages: tiles in shared memory at a time.
        one_pass: dQ is added up by the kernel that owns keys, in no fixed order: 5 matrix products in place of 7.
    """

    block_m: int
    block_n: int
    stages: int = 2
    one_pass: bool = False


def backward_config(problem: Problem, deterministic: bool = True) -> BackwardConfig:
    """The tiles that compile without spills and fit in shared memory.

    One exception spills: with a mask beside a 16-bit bias or a softcap at head size 128, the loop over tiles seen in
    part reloads 4 bytes a step.
    """
    block = head_block(problem.query.shape[3], problem.value.shape[3])
    bias = problem.bias
    tile_of_bias = bias is not None and not is_of_keys(bias)
    hides = bool(problem.masks) or problem.prefix is not None
    if block == 64:
        # 128 rows of bias beside dS and dQ do not fit; a softcap's registers would serialise the products (C7519)
        one_pass = not (deterministic or tile_of_bias or problem.softcap is not None)
        crowded = hides and (tile_of_bias or problem.prefix is not None)
        return BackwardConfig(64 if tile_of_bias else 128, 64 if crowded else 128, one_pass=one_pass)
    wide_bias = bias is not None and tile_of_bias and bias.element_size() > 2
    # beside its accumulators, the one-pass form has few registers left for what else a tile may carry
    beside_mask = (bias, problem.key_padding_mask, problem.query_documents, problem.prefix, problem.lower)
    masked_twice = problem.mask is not None and any(rule is not None for rule in beside_mask)
    crowded = problem.softcap is not None or masked_twice
    one_pass = not (deterministic or wide_bias or crowded)
    return BackwardConfig(64, 64 if tile_of_bias or hides else 128, one_pass=one_pass)
