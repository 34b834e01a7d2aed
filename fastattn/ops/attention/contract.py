"""What the operators take and return, whichever backend implements them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """A call's tensors, those that have gradients first. ``dropout_state`` is the backend's own: a seed for the
    kernels, the kept weights for torch."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hk, S, D]
    value: Tensor  # [B, Hk, S, Dv]
    bias: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    alibi_slopes: Tensor | None  # [B | 1, H]
    sinks: Tensor | None  # [B | 1, H]
    mask: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    key_padding_mask: Tensor | None  # [B, S]
    query_documents: Tensor | None  # [B | 1, L]
    key_documents: Tensor | None  # [B | 1, S]
    prefix: Tensor | None  # [B | 1]
    dropout_state: Tensor | None


class Options(NamedTuple):
    """What a call says beside its tensors. Query ``i``, at key position ``i + shift``, sees keys ``i + lower`` to
    ``i + upper``."""

    lower: int | None
    upper: int | None
    shift: int
    softcap: float | None
    scale: float
    dropout_p: float
    weights: str
    backend: str
    keeps_statistics: bool = (
        True  # False lets a backend leave out LSE and statistics (what they hold is then unspecified)
    )


INPUTS, OPTIONS = len(Inputs._fields), len(Options._fields)
GRADIENTS = 9  # the arguments of ``fastattn::attention_backward`` in front of its inputs
DIFFERENTIABLE = 6  # the first of the inputs; query, key and value always have their gradient, the others where needed


def implementation(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``dropout_keep`` implement the operators for a backend."""
    if backend == "triton":
        from fastattn.ops.attention import launch

        return launch
    from fastattn.ops.attention import blocks

    return blocks


def empty_in_order_of(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty dense tensor whose dimensions lie in memory in the order of ``like``'s.

    So that the output of attention over a ``[B, L, H, D]`` view merges its heads without a copy, and the one over a
    ``[B, C, H * W]`` feature map is such a map again.
    """
    order = sorted(range(like.dim()), key=lambda axis: -like.stride(axis))
    return torch.empty_permuted(shape, order, dtype=dtype or like.dtype, device=like.device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics are float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_shape(query: Tensor, backend: str) -> tuple[int, ...]:
    """The shape of the statistics from which a backend's backward recomputes the weights: the kernels' maximum and
    inverse sum of every row, or torch's LSE."""
    batch, heads, length = query.shape[:3]
    return (batch, heads, 2, length) if backend == "triton" else (batch, heads, length)


def weights_shape(query: Tensor, key: Tensor, weights: str) -> tuple[int, ...]:
    """The shape of the weights that an operator returns; empty where none are asked for."""
    batch, heads, length = query.shape[:3]
    shapes = {"none": (0,), "average": (batch, length, key.shape[2]), "heads": (batch, heads, length, key.shape[2])}
    return shapes[weights]
