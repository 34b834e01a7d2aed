"""How the Hopper backward is launched, and the heuristic that chooses it. Nothing here has been timed on a GPU yet."""

import dataclasses

from fastattn_kernels.attention.hopper.config import head_block, is_of_keys
from fastattn_kernels.common.problem import Problem

LARGEST_HEAD = 128


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

    But for a mask beside a 16-bit bias or a softcap at head size 128: there the loop over tiles seen in part reloads 4
    bytes a step.
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
    # the accumulators leave the one-pass form few registers for what else a tile may carry
    beside_mask = (bias, problem.key_padding_mask, problem.query_documents, problem.prefix, problem.lower)
    masked_twice = problem.mask is not None and any(rule is not None for rule in beside_mask)
    crowded = problem.softcap is not None or masked_twice
    one_pass = not (deterministic or wide_bias or crowded)
    return BackwardConfig(64, 64 if tile_of_bias or hides else 128, one_pass=one_pass)
