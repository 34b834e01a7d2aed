"""An attention call, and what the operators take and return, whichever backend implements them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.blocks import empty_in_order_of, statistics_dtype

Alignment = Literal["top_left", "bottom_right"]
# What a user gives for either: a function, or a tuple of one and of tensors that it takes behind its other arguments.
ScoreMod = Callable[..., Tensor] | tuple[Any, ...]
MaskMod = Callable[..., Tensor] | tuple[Any, ...]
Weights = Literal["none", "average", "heads"]


class Arguments(NamedTuple):
    """The arguments of :func:`fastattn.attention`, as the user gave them: first those that may hold tensors."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any
    key_padding_mask: Any
    window: Any
    prefix: Any
    document_ids: Any
    alibi_slopes: Any
    sinks: Any
    is_causal: Any
    causal_alignment: Any
    softcap: Any
    scale: Any
    dropout_p: Any
    need_weights: Any
    average_attn_weights: Any
    return_lse: Any
    backend: Any


class Function(NamedTuple):
    """A ``score_mod`` or ``mask_mod``: its program (``functions.program``), and what the program reads."""

    text: str
    captured: tuple[Tensor, ...]


class AttentionCall(NamedTuple):
    """A validated call. The words are the reference's: ``mask`` True = may see, ``key_padding_mask`` True = padding."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hk, S, D]
    value: Tensor  # [B, Hk, S, Dv]
    bias: Tensor | None = None  # [B | 1, H | 1, L | 1, S | 1], floating
    alibi_slopes: Tensor | None = None  # [B | 1, H], floating
    sinks: Tensor | None = None  # [B | 1, H], floating
    mask: Tensor | None = None  # [B | 1, H | 1, L | 1, S | 1], boolean
    key_padding_mask: Tensor | None = None  # [B, S], boolean
    query_documents: Tensor | None = None  # [B | 1, L], int32 or int64
    key_documents: Tensor | None = None  # [B | 1, S], int32 or int64
    prefix: Tensor | None = None  # [B | 1], int32
    lower: int | None = None
    upper: int | None = None
    shift: int = 0
    softcap: float | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    weights: Weights = "none"
    return_lse: bool = False
    score_mod: Function | None = None
    mask_mod: Function | None = None
    first_batch: int = 0  # the number that functions are told of the first batch entry
    first_row: int = 0  # of the first row
    first_key: int = 0  # and of the first key

    @property
    def device(self) -> torch.device:
        """Where the call's tensors lie."""
        return self.query.device

    @property
    def is_plain(self) -> bool:
        """Can ``F.scaled_dot_product_attention`` express all that is asked of the scores?"""
        return (
            self.alibi_slopes is None
            and self.sinks is None
            and self.query_documents is None
            and self.key_documents is None
            and self.prefix is None
            and self.lower is None
            and self.softcap is None
            and not self.is_modified
        )

    @property
    def is_modified(self) -> bool:
        """Is there a function of the user's?"""
        return self.score_mod is not None or self.mask_mod is not None


# ----------------------------------------------------------------------------------- the operators' groups of arguments


class Inputs(NamedTuple):
    """A call's tensors, those that have gradients first. ``dropout_state`` is the backend's own: a seed for the
    kernels, the kept weights or a seed for torch."""

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
    # False lets a backend leave out LSE and statistics; what these tensors hold is then unspecified
    keeps_statistics: bool = True
    # Programs, empty where there is none, and the numbers that they are told of the first batch entry, row and key.
    score_mod: str = ""
    mask_mod: str = ""
    first_batch: int = 0
    first_row: int = 0
    first_key: int = 0


class Results(NamedTuple):
    """What the forward makes."""

    output: Tensor  # [B, H, L, Dv]
    lse: Tensor  # [B, H, L]
    weights: Tensor  # [B, L, S], [B, H, L, S], or empty
    statistics: Tensor  # the backend's own; see statistics_shape


class Kept(NamedTuple):
    """The results that the backward reads."""

    output: Tensor
    statistics: Tensor


class OutputGradients(NamedTuple):
    """The gradients of the results, None for those that no loss used."""

    d_output: Tensor
    d_lse: Tensor | None
    d_weights: Tensor | None


class Needs(NamedTuple):
    """Which optional gradients the backward makes; those of query, key and value it always does."""

    needs_d_bias: bool
    needs_d_alibi_slopes: bool
    needs_d_sinks: bool
    # A graph is compiled before a loss is known, and hands zeros to the backward for the weights that no loss uses.
    d_weights_may_be_zeros: bool


class InputGradients(NamedTuple):
    """What the backward makes; an optional gradient that is not needed is empty."""

    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_bias: Tensor
    d_alibi_slopes: Tensor
    d_sinks: Tensor


def stored(options: Options) -> tuple[bool, ...]:
    """For each of the results, whether it is more than an empty placeholder."""
    return True, True, options.weights != "none", True


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


def empty_results(inputs: Inputs, options: Options, output_dtype: torch.dtype | None = None) -> Results:
    """Output, LSE, weights and statistics, for a backend to write; the output in the query's dtype by default."""
    query, dtype = inputs.query, statistics_dtype(inputs.query.dtype)
    return Results(
        output=empty_in_order_of(query, (*query.shape[:3], inputs.value.shape[3]), output_dtype),
        lse=query.new_empty(query.shape[:3], dtype=dtype),
        weights=query.new_empty(weights_shape(query, inputs.key, options.weights)),
        statistics=query.new_empty(statistics_shape(query, options.backend), dtype=dtype),
    )


def empty_gradients(inputs: Inputs, needs: Needs) -> InputGradients:
    """The gradients of query, key and value, and of the optional inputs, empty where not needed."""

    def optional(tensor: Tensor | None, needed: bool) -> Tensor:
        return inputs.query.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    d_query, d_key, d_value = (empty_in_order_of(t, tuple(t.shape)) for t in (inputs.query, inputs.key, inputs.value))
    return InputGradients(
        d_query=d_query,
        d_key=d_key,
        d_value=d_value,
        d_bias=optional(inputs.bias, needs.needs_d_bias),
        d_alibi_slopes=optional(inputs.alibi_slopes, needs.needs_d_alibi_slopes),
        d_sinks=optional(inputs.sinks, needs.needs_d_sinks),
    )
