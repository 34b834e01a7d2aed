"""What every kernel of additive attention is told: a call's tensors, queries and keys also column by column."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn_kernels.common.arguments import Heads, strided
from fastattn_kernels.common.problem import Problem

# Columns are as long as a multiple of the largest tile, and end in zeros: no load of them has a bound.
PADDING = 64


class Weight(NamedTuple):
    """The weight ``[H, A]`` as a kernel argument."""

    ptr: Any
    stride_h: Any
    stride_a: Any


class Vector(NamedTuple):
    """In a kernel: the weight of one head, or where its columns begin, each contiguous and ``stride`` apart."""

    ptr: Any
    stride: Any


def padded(length: int) -> int:
    """The length of a column that holds ``length`` elements."""
    return -(-length // PADDING) * PADDING


def columns(tensor: Tensor, finite: bool = False) -> Tensor:
    """``[B, H, n, A]`` as ``[B, H, A, padded n]``, contiguous; without NaN and inf if ``finite``.

    The kernels go through the columns one by one, against all of the other tensor's rows: as they lie, each element of
    a column would come with a cache line of its own. The copy is as large as the tensor, the work on it n times.
    """
    batch, heads, length, size = tensor.shape
    copy = tensor.new_empty(batch, heads, size, padded(length))
    copy[..., :length] = torch.nan_to_num(tensor.mT) if finite else tensor.mT
    copy[..., length:].zero_()  # an item that is set would be a tensor from outside of a plan
    return copy


@dataclasses.dataclass(frozen=True)
class AdditiveProblem(Problem):
    """One call's inputs, already validated: those of :class:`Problem`, of which it takes query, key, value, bias, mask,
    ``key_padding_mask`` and ``upper``, and a weight. Query and key have as many heads.

    Attributes:
        weight: ``[H | 1, A]``, any strides, of the query's dtype.
    """

    weight: Tensor = dataclasses.field(kw_only=True)

    def scored(self, finite: bool = False) -> tuple[object, object, object]:
        """The kernel arguments ``query, key, weight``: two :func:`columns`, and a weight for every head."""
        queries, keys = (strided(Heads, columns(tensor, finite)) for tensor in (self.query, self.key))
        return queries, keys, strided(Weight, self.weight)
