"""What the kernels of the backward in plain Triton are told alike: dK and dV, dQ, and the careful pass over both."""

from typing import Any, NamedTuple

from torch import Tensor

from fastattn_kernels.common.arguments import Heads, TileLists, strided
from fastattn_kernels.common.config import Config, dot_precision, head_block
from fastattn_kernels.common.problem import Problem


class BackwardCall(NamedTuple):
    """What every tile of either pass is told, beside its own place and where its gradients go."""

    query: Heads
    key: Heads
    value: Heads
    d_output: Heads
    statistics_ptr: Any
    delta_ptr: Any
    dropout: Any
    d_weights: Any
    lists: TileLists
    heads: Any
    group: Any
    scale: Any


def inputs_of(problem: Problem, d_output: Tensor, statistics: Tensor, delta: Tensor) -> tuple[object, ...]:
    """The kernel arguments ``query, key, value, d_output, statistics_ptr, delta_ptr``."""
    tensors = problem.query, problem.key, problem.value, d_output
    return *(strided(Heads, tensor) for tensor in tensors), statistics, delta


def constants_of(problem: Problem, config: Config) -> dict[str, Any]:
    """The compile-time arguments that all kernels have."""
    head_dim, value_dim = problem.query.shape[3], problem.value.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_DV": head_block(value_dim),
        "PRECISION": dot_precision(problem.query.dtype),
        **config.launch_options(),
    }
