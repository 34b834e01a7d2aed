"""Jagged nested tensors (``torch.nested``, layout ``torch.jagged``) as packed sequences, and back.

A jagged tensor ``[N, H, j, D]`` of ``N`` sequences keeps its rows packed behind one another, with offsets: what
:func:`fastattn.attention_varlen` takes, as views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from fastattn.ops.attention.varlen.api import attention_varlen
from fastattn.ops.common.checks import shape_of
from fastattn.reference.attention import NEGATIVE_INFINITY


def is_jagged(*tensors: Tensor) -> bool:
    """Whether all of these are jagged nested tensors."""
    return all(tensor.layout is torch.jagged for tensor in tensors)


def packed(name: str, tensor: Any) -> tuple[Tensor, Tensor]:
    """The rows of a jagged tensor, packed behind one another, ``[T, ...]``, and their offsets, int32 ``[N + 1]``.

    Raises:
        ValueError: it has holes between its sequences.
    """
    if tensor.lengths() is not None:
        raise ValueError(f"{name} is a jagged tensor with holes between its sequences: expected {name}.contiguous()")
    values = tensor.values()
    return values.movedim(tensor._ragged_idx - 1, 0), tensor.offsets().to(torch.int32)


def nested_like(values: Tensor, like: Any, ragged_idx: int = 1) -> Any:
    """Packed rows ``[T, ...]`` as a jagged tensor of the sequences of ``like``, its sequences along ``ragged_idx``."""
    extremes = {"min_seqlen": like._maybe_min_seqlen, "max_seqlen": like._maybe_max_seqlen}
    found = nested_tensor_from_jagged(values, like.offsets(), **extremes)
    return found if ragged_idx == 1 else found.transpose(1, ragged_idx)


def checked_padding(key_padding_mask: Tensor, key: Tensor) -> Tensor:
    """A padding mask, or raise unless it is boolean ``[N, S]``, of at least the longest sequence's keys."""
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask is {key_padding_mask.dtype}: expected bool (True = padding)")
    if key_padding_mask.dim() != 2 or key_padding_mask.shape[0] != key.shape[0]:
        raise ValueError(
            f"key_padding_mask has shape {shape_of(key_padding_mask)}: expected [sequences, keys of the longest], here "
            f"({key.shape[0]}, ...)"
        )
    return key_padding_mask


def combined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor) -> Tensor:
    """One mask by positions inside a sequence, ``[N, H | 1, L | 1, S]``, floating where ``attn_mask`` is."""
    visible = ~key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return visible
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return torch.where(visible, attn_mask, NEGATIVE_INFINITY)


def attention_jagged(query: Any, key: Any, value: Any, words: dict[str, Any], backend: Any) -> Any:
    """:func:`fastattn.attention` of jagged tensors ``[N, H, j, D]``: the output, or the output and the LSE, jagged.

    Args:
        query: jagged, its sequences along dimension 2.
        key: jagged as well, of as many sequences.
        value: jagged as well.
        words: the other arguments of :func:`fastattn.attention`. Masks are by positions inside a sequence.
        backend: as there.

    Raises:
        TypeError: not all three are jagged.
        ValueError: one of them is not of four dimensions with its sequences along the third, or ``document_ids`` or
            ``need_weights`` is given.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.jagged:
            raise TypeError(f"{name} is {tensor.layout}: expected a jagged nested tensor, as the others are")
        if tensor.dim() != 4 or tensor._ragged_idx != 2:
            raise ValueError(
                f"{name} has shape {shape_of(tensor)}: expected a jagged tensor [sequences, heads, length, head_dim]"
            )
    words = dict(words)
    if words.pop("document_ids") is not None:
        raise ValueError("document_ids with jagged tensors: their sequences are the documents already")
    padding, averages = words.pop("key_padding_mask"), words.pop("average_attn_weights")
    if words["need_weights"]:
        raise ValueError(
            f"need_weights=True (average_attn_weights={averages}) with jagged tensors: sequences of unequal length "
            "have no common shape of weights"
        )
    (rows, cu_seqlens_q), (keys, cu_seqlens_k), (values, _) = (packed(*item) for item in tensors.items())
    if padding is not None:
        words["attn_mask"] = combined_mask(words["attn_mask"], checked_padding(padding, key))
    found = attention_varlen(rows, keys, values, cu_seqlens_q, cu_seqlens_k, **words, backend=backend)
    if isinstance(found, Tensor):
        return nested_like(found, query, 2)
    output, lse = found
    return nested_like(output, query, 2), nested_like(lse.transpose(0, 1), query, 2)
