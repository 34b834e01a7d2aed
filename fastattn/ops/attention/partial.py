"""Attention over a part of the keys: outputs and gradients that are to be added up with those of other parts.

A part gives the output and the LSE of its own softmax; outputs of several parts are merged by their LSEs
(ring attention, arXiv:2310.01889). In the backward each part is handed the output and
the LSE of the whole row: from the LSE it recomputes the weights that its keys have in the whole row, and of the output
``delta``, the mean that the gradient of softmax subtracts. So the gradients of parts simply add up.

All of this is in float32, or in float64 where the query is, whatever the inputs are: outputs that are rounded to 16
bits between two merges would lose a digit with each doubling of the number of parts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import blocks
from fastattn.ops.attention.contract import InputGradients, Inputs, Kept, Needs, Options, OutputGradients
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.reference.attention import NEGATIVE_INFINITY

_LOG2_E = math.log2(math.e)


class Row(NamedTuple):
    """What the backward has to know of whole rows."""

    output: Tensor  # [B, H, L, Dv]
    lse: Tensor  # [B, H, L], sinks included
    d_output: Tensor  # [B, H, L, Dv]
    delta: Tensor  # [B, H, L], rowsum(dO * O) - dLSE, at least float32
    d_lse: Tensor | None  # [B, H, L]

    def rows(self, part: slice) -> Row:
        """Some of the rows."""
        output, lse, d_output, delta = (t[:, :, part] for t in self[:4])
        return Row(output, lse, d_output, delta, None if self.d_lse is None else self.d_lse[:, :, part])


def row_of(gradients: OutputGradients, kept: Kept) -> Row:
    """What the backward has to know, of output and LSE of whole rows and of their gradients."""
    (d_output, d_lse, _), (output, lse) = gradients, kept
    dtype = statistics_dtype(output.dtype)
    delta = torch.linalg.vecdot(d_output.to(dtype), output.to(dtype))
    delta = delta.masked_fill_(~output.any(dim=3), 0)  # a row that sees no key, whatever comes in as its gradient
    if d_lse is not None:
        delta = delta - d_lse
    delta = delta.masked_fill_(lse == NEGATIVE_INFINITY, 0)
    return Row(output, lse, d_output, delta, d_lse)


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output and LSE of a part, at least float32, by the backend that the options name. Sinks belong to :class:`Merge`:
    a part has none."""
    assert inputs.sinks is None and options.weights == "none"
    if options.backend == "triton":
        from fastattn.ops.attention import launch  # imports triton

        return launch.partial_forward(inputs, options)[:2]
    return blocks.forward(_wide(inputs), options)[:2]


def backward(row: Row, needs: Needs, inputs: Inputs, options: Options) -> InputGradients:
    """What a part adds to the gradients, those of query, key and value at least float32."""
    gradients = OutputGradients(row.d_output, row.d_lse, None)
    if options.backend == "triton":
        from fastattn.ops.attention import launch  # imports triton

        empty = row.lse == NEGATIVE_INFINITY
        # the kernels take a maximum in base 2 and the inverse of a sum, of which the LSE is any pair with that product
        statistics = torch.stack((row.lse.masked_fill(empty, 0) * _LOG2_E, (~empty).to(row.lse.dtype)), dim=2)
        return launch.partial_backward(gradients, Kept(row.output, statistics), needs, inputs, options)
    dtype = statistics_dtype(inputs.query.dtype)
    gradients = gradients._replace(d_output=row.d_output.to(dtype))
    kept = Kept(row.output.to(dtype), row.lse)
    return blocks.backward(gradients, kept, needs, _wide(inputs), options, delta=row.delta)


def _wide(inputs: Any) -> Any:
    """The inputs with no floating tensor below float32, but for those that functions read, whose programs say in what
    they compute: what plain torch computes of them is then not rounded."""
    given = ((name, getattr(inputs, name)) for name in Inputs._fields)
    floating = {name: t for name, t in given if t is not None and t.is_floating_point()}
    return inputs._replace(**{name: t.to(statistics_dtype(t.dtype)) for name, t in floating.items()})


class Merge:
    """Outputs and LSEs of rows, of the parts that have been added so far, in the order in which they were.

    Args:
        query: ``[B, H, L, D]``, whose rows they are.
        value_dim: ``Dv``.
    """

    def __init__(self, query: Tensor, value_dim: int) -> None:
        dtype = statistics_dtype(query.dtype)
        self.output = query.new_zeros((*query.shape[:3], value_dim), dtype=dtype)
        self.lse = query.new_full(query.shape[:3], NEGATIVE_INFINITY, dtype=dtype)

    def add(self, output: Tensor, lse: Tensor, rows: slice) -> None:
        """One more part, of these rows."""
        own, own_lse = self.output[:, :, rows], self.lse[:, :, rows]
        merged = torch.logaddexp(own_lse, lse)
        own.mul_(_share(own_lse, merged)).addcmul_(output, _share(lse, merged))
        own_lse.copy_(merged)

    def finish(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and LSE of the whole rows; ``sinks`` ``[B | 1, H]`` are one more score in each."""
        if sinks is None:
            return self.output, self.lse
        whole = torch.logaddexp(self.lse, sinks[..., None].to(self.lse.dtype))
        return self.output.mul_(_share(self.lse, whole)), whole


def _share(lse: Tensor, whole: Tensor) -> Tensor:
    """How much of a row's weight a part has, ``[B, H, L, 1]``; 0 in a row that sees nothing."""
    return (lse - whole).exp_().masked_fill_(whole == NEGATIVE_INFINITY, 0)[..., None]


def sink_gradients(sinks: Tensor, row: Row) -> Tensor:
    """The gradient of sinks ``[B | 1, H]``, in their shape, at least float32."""
    # A sink has no value, so that dP of its pair is zero, and of dS = P (dP - delta) only -P delta is left.
    weight = (sinks[..., None].to(row.lse.dtype) - row.lse).exp_()
    weight = weight.masked_fill_(row.lse == NEGATIVE_INFINITY, 0)  # then the sink is -inf, which is none
    return (-weight * row.delta).sum(dim=2).sum_to_size(sinks.shape)
