"""What the operators of additive attention take and return, whichever backend implements them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from fastattn.ops.attention.contract import empty_in_order_of, statistics_dtype


class AdditiveInputs(NamedTuple):
    """A call's tensors, those that have gradients first."""

    query: Tensor  # [B, H, L, A]
    key: Tensor  # [B, H, S, A]
    value: Tensor  # [B, H, S, Dv]
    weight: Tensor  # [H | 1, A]
    bias: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    mask: Tensor | None  # [B | 1, H | 1, L | 1, S | 1]
    key_padding_mask: Tensor | None  # [B, S]


class AdditiveOptions(NamedTuple):
    """What a call says beside its tensors. Query ``i`` sees keys up to ``i + upper``."""

    upper: int | None
    needs_weights: bool
    backend: str


INPUTS, OPTIONS = len(AdditiveInputs._fields), len(AdditiveOptions._fields)
DIFFERENTIABLE = 5  # the first of the inputs; all have their gradient but the bias, which has it where needed


def implementation(backend: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` implement the operators for a backend."""
    if backend == "triton":
        from fastattn.ops.additive_attention import launch

        return launch
    from fastattn.ops.additive_attention import blocks

    return blocks


def weights_shape(inputs: AdditiveInputs, options: AdditiveOptions) -> tuple[int, ...]:
    """The shape of the weights that the forward returns; empty where none are asked for."""
    return (*inputs.query.shape[:3], inputs.key.shape[2]) if options.needs_weights else (0,)


def empty_results(inputs: AdditiveInputs, options: AdditiveOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and statistics, for a backend to write."""
    query = inputs.query
    output = empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3]))
    # those from which the kernels recompute the weights; torch has whole rows and needs none
    shape = (*query.shape[:2], 2, query.shape[2]) if options.backend == "triton" else (0,)
    statistics = query.new_empty(shape, dtype=statistics_dtype(query.dtype))
    return output, query.new_empty(weights_shape(inputs, options)), statistics


def empty_gradients(inputs: AdditiveInputs, needs_d_bias: bool) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, weight and bias, the last empty where not needed, for a backend to write."""
    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in inputs[:3])
    bias = inputs.bias
    d_bias = inputs.query.new_empty(0) if bias is None or not needs_d_bias else bias.new_empty(bias.shape)
    return d_query, d_key, d_value, inputs.weight.new_empty(inputs.weight.shape), d_bias
