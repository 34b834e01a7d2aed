"""A call over packed sequences, and what the operators take and return, whichever backend implements them.

Tensors have attention's four dimensions, with a batch of 1 and all sequences along the length: ``[1, H, T, D]``. What
``attention`` has for each batch entry there is here for each of the ``N`` sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Function, statistics_shape
from fastattn.ops.attention.contract import empty_gradients as empty_attention_gradients
from fastattn.ops.common.blocks import empty_in_order_of, statistics_dtype


class VarlenCall(NamedTuple):
    """A validated call. Rows and keys are counted from the beginning of their sequence."""

    query: Tensor  # [1, H, T, D]
    key: Tensor  # [1, Hk, Tk, D]
    value: Tensor  # [1, Hk, Tk, Dv]
    bias: Tensor | None  # [N | 1, H | 1, longest | 1, longest | 1], floating
    alibi_slopes: Tensor | None  # [N | 1, H], floating
    sinks: Tensor | None  # [1, H], floating
    cu_seqlens_q: Tensor  # [N + 1], int32
    cu_seqlens_k: Tensor  # [N + 1], int32
    seqused_k: Tensor | None  # [N], int32
    prefix: Tensor | None  # [N | 1], int32
    lower: int | None = None
    upper: int | None = None
    bottom_right: bool = False
    softcap: float | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    return_lse: bool = False
    score_mod: Function | None = None
    mask_mod: Function | None = None

    @property
    def device(self) -> torch.device:
        """Where the call's tensors lie."""
        return self.query.device


# ----------------------------------------------------------------------------------- the operators' groups of arguments


class VarlenInputs(NamedTuple):
    """A call's tensors, those that have gradients first. ``dropout_state`` is a seed: int64 ``[2]`` for the kernels,
    ``[1]`` for torch."""

    query: Tensor  # [1, H, T, D]
    key: Tensor  # [1, Hk, Tk, D]
    value: Tensor  # [1, Hk, Tk, Dv]
    bias: Tensor | None  # [N | 1, H | 1, longest | 1, longest | 1]
    alibi_slopes: Tensor | None  # [N | 1, H]
    sinks: Tensor | None  # [1, H]
    cu_seqlens_q: Tensor  # [N + 1]
    cu_seqlens_k: Tensor  # [N + 1]
    seqused_k: Tensor | None  # [N]
    prefix: Tensor | None  # [N | 1]
    dropout_state: Tensor | None


class VarlenOptions(NamedTuple):
    """What a call says beside its tensors. Row ``i`` of a sequence, at key position ``i + shift``, sees keys
    ``i + shift + lower`` to ``i + shift + upper``; ``shift`` is 0, or, if ``bottom_right``, the sequence's number of
    keys less its number of rows."""

    lower: int | None
    upper: int | None
    bottom_right: bool
    softcap: float | None
    scale: float
    dropout_p: float
    backend: str
    keeps_statistics: bool = True


class VarlenResults(NamedTuple):
    """What the forward makes. Rows behind the last sequence are not written."""

    output: Tensor  # [1, H, T, Dv]
    lse: Tensor  # [1, H, T]
    statistics: Tensor  # the backend's own; see attention's statistics_shape


class VarlenOutputGradients(NamedTuple):
    """The gradients of the results, None for one that no loss used."""

    d_output: Tensor
    d_lse: Tensor | None


class VarlenNeeds(NamedTuple):
    """Which optional gradients the backward makes; those of query, key and value it always does."""

    needs_d_bias: bool
    needs_d_alibi_slopes: bool
    needs_d_sinks: bool


def stored(options: VarlenOptions) -> tuple[bool, ...]:
    """Every result is more than a placeholder."""
    return True, True, True


def empty_results(inputs: VarlenInputs, options: VarlenOptions) -> VarlenResults:
    """Output, LSE and statistics, for a backend to write."""
    query, dtype = inputs.query, statistics_dtype(inputs.query.dtype)
    return VarlenResults(
        output=empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3])),
        lse=query.new_empty(query.shape[:3], dtype=dtype),
        statistics=query.new_empty(statistics_shape(query, options.backend), dtype=dtype),
    )


empty_gradients = empty_attention_gradients
