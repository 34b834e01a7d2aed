"""A call of additive attention, and what the operators take and return, whichever backend implements them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.blocks import empty_in_order_of, statistics_dtype


class AdditiveAttentionCall(NamedTuple):
    """A validated call. ``mask`` True = may see, ``key_padding_mask`` True = padding."""

    query: Tensor  # [B, H, L, A]
    key: Tensor  # [B, H, S, A]
    value: Tensor  # [B, H, S, Dv]
    weight: Tensor  # [H | 1, A]
    bias: Tensor | None  # [B | 1, H | 1, L | 1, S | 1], floating
    mask: Tensor | None  # [B | 1, H | 1, L | 1, S | 1], boolean
    key_padding_mask: Tensor | None  # [B, S], boolean
    upper: int | None
    needs_weights: bool

    @property
    def device(self) -> torch.device:
        """Where the call's tensors lie."""
        return self.query.device


# ----------------------------------------------------------------------------------- the operators' groups of arguments


class Inputs(NamedTuple):
    """A call's tensors, those that have gradients first."""

    query: Tensor  # [B, H, L, A]
    key: Tensor  # [B, H, S, A]
    value: Tensor  # [B, H, S, Dv]
    weight: Tensor  # [H | 1, A]
    bias: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    mask: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    key_padding_mask: Tensor | None  # [B, S]


class Options(NamedTuple):
    """What a call says beside its tensors. Query ``i`` sees keys up to ``i + upper``."""

    upper: int | None
    needs_weights: bool
    backend: str


class Results(NamedTuple):
    """What the forward makes. The backward reads all of it."""

    output: Tensor  # [B, H, L, Dv]
    weights: Tensor  # [B, H, L, S], or empty
    statistics: Tensor  # [B, H, 2, L] from which the kernels recompute the weights; empty for torch


class OutputGradients(NamedTuple):
    """The gradients of the results, None for those that no loss used."""

    d_output: Tensor
    d_weights: Tensor | None


class Needs(NamedTuple):
    """Which optional gradients the backward makes; those of query, key, value and weight it always does."""

    needs_d_bias: bool


class InputGradients(NamedTuple):
    """What the backward makes; an optional gradient that is not needed is empty."""

    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_weight: Tensor
    d_bias: Tensor


def stored(options: Options) -> tuple[bool, ...]:
    """For each of the results, whether it is more than an empty placeholder."""
    return True, options.needs_weights, options.backend == "triton"


def weights_shape(inputs: Inputs, options: Options) -> tuple[int, ...]:
    """The shape of the weights that the forward returns; empty where none are asked for."""
    return (*inputs.query.shape[:3], inputs.key.shape[2]) if options.needs_weights else (0,)


def empty_results(inputs: Inputs, options: Options) -> Results:
    """Output, weights and statistics, for a backend to write."""
    query = inputs.query
    output = empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3]))
    shape = (*query.shape[:2], 2, query.shape[2]) if options.backend == "triton" else (0,)
    statistics = query.new_empty(shape, dtype=statistics_dtype(query.dtype))
    return Results(output, query.new_empty(weights_shape(inputs, options)), statistics)


def empty_gradients(inputs: Inputs, needs: Needs) -> InputGradients:
    """The gradients of query, key, value, weight and bias, the last empty where not needed, for a backend to write."""
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (inputs.query, inputs.key, inputs.value))
    bias = inputs.bias
    d_bias = inputs.query.new_empty(0) if bias is None or not needs.needs_d_bias else bias.new_empty(bias.shape)
    return InputGradients(d_query, d_key, d_value, inputs.weight.new_empty(inputs.weight.shape), d_bias)
