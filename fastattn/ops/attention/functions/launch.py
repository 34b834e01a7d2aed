"""Programs in the kernels. Imports triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastattn.ops.attention.functions.in_triton import source
from fastattn.ops.attention.functions.program import Access, Program
from fastattn.ops.attention.functions.writing import INDICES
from fastattn_kernels.attention.bias_gradient import launch_attention_captured_bwd
from fastattn_kernels.common.delta import Delta, tensor_of
from fastattn_kernels.common.functions import Modifier, compiled
from fastattn_kernels.common.gradients import WeightsGradient
from fastattn_kernels.common.problem import Problem

# Elements of float32 that a kernel writes at once where what a pair gives depends on its query and its key: 64 MiB.
_ELEMENTS = 1 << 24
# So often a program may read by query or key in a loop with usual tiles: with six reads, one after the other, as of a
# token's ancestors, dK and dV would spill 336 bytes on sm_90 at head size 64.
_FEW_READS = 4


@functools.lru_cache(maxsize=1024)
def _function(text: str) -> Any:
    """A program as a function of Triton."""
    return compiled(source(Program.of(text), "function"), "function")


@functools.lru_cache(maxsize=1024)
def _derivative(text: str, result: int) -> Any:
    """A result of a program's gradient as a function of Triton: 0 is the gradient of the score, and those behind it are
    of what the accesses read."""
    return compiled(source(Program.of(text).gradient, "derivative", result), "derivative")


def modifier(text: str, read: Sequence[Tensor], *, trains: bool = False) -> Modifier:
    """A program and what it reads, for the kernels; with the gradient of a score_mod if it ``trains``."""
    program = Program.of(text)
    return Modifier(
        _function(text),
        _derivative(text, 0) if trains else None,
        tuple(read),
        batches=program.depends_on("batch"),
        heads=program.depends_on("head"),
        is_heavy=program.reads_by_place > _FEW_READS,
    )


def gradients_of_reads(
    problem: Problem,
    text: str,
    number: int,
    access: Access,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
) -> Iterator[tuple[slice, Tensor]]:
    """What pairs give to the gradient of what an access reads, summed over the axes that its footprint lacks; where it
    depends on query and key, some rows at a time. ``access`` is that of this number of the program ``text``."""
    footprint = tuple(name in access.footprint for name in INDICES)
    partial = _derivative(text, 1 + number)
    saved = problem, d_output, statistics, tensor_of(delta), d_weights, partial
    (batch, heads, length), keys = problem.query.shape[:3], problem.key.shape[2]
    step = length
    if footprint[2] and footprint[3]:
        of_row = keys * (batch if footprint[0] else 1) * (heads if footprint[1] else 1)
        step = max(1, _ELEMENTS // max(1, of_row))
    for start in range(0, length, max(1, step)):
        rows = slice(start, min(length, start + step))
        whole = (footprint[0], footprint[1], footprint[2], footprint[3])
        yield rows, launch_attention_captured_bwd(*saved, whole, (rows.start, rows.stop))
