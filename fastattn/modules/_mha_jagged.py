"""``nn.MultiheadAttention`` of jagged nested tensors: projections of packed rows, and attention within sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.modules._mha_compute import Inputs, Words, project
from fastattn.modules._mha_masks import Scores, make_masks
from fastattn.ops.attention.jagged import combined_mask, nested_like, packed
from fastattn.ops.attention.varlen.api import attention_varlen
from fastattn.ops.common.backends import Backend
from fastattn.ops.common.checks import shape_of


def attend_jagged(inputs: Inputs, words: Words, backend: Backend | None, project_back: Any) -> Tensor:
    """The module's output, jagged as the query.

    Args:
        inputs: the tensors; query, key and value are jagged ``[N, j, features]``. Masks are by positions inside a
            sequence.
        words: what else there is to know.
        backend: of attention.
        project_back: the projection of the packed output ``[T, E]``.

    Raises:
        NotImplementedError: keys are to be appended to every sequence.
        RuntimeError: weights are asked for.
        TypeError: not all three are jagged.
        ValueError: one of them has not its sequences along the second of three dimensions.
    """
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    for name, tensor in tensors.items():
        jagged: Any = tensor
        if tensor.layout is not torch.jagged:
            raise TypeError(f"{name} is {tensor.layout}: expected a jagged nested tensor, as the others are")
        if tensor.dim() != 3 or jagged._ragged_idx != 1:
            raise ValueError(
                f"{name} has shape {shape_of(tensor)}: expected a jagged tensor [sequences, length, features]"
            )
    if words.weights != "none":
        raise RuntimeError(
            "need_weights=True with nested tensors: sequences of unequal length have no common shape of weights; pass "
            "need_weights=False"
        )
    if words.add_zero_attn or inputs.bias_k is not None or inputs.bias_v is not None:
        raise NotImplementedError("nested tensors with add_bias_kv or add_zero_attn: pad the batch")
    (rows, cu_seqlens_q), (keys, cu_seqlens_k), (values, _) = (packed(*item) for item in tensors.items())
    if inputs.key is inputs.query:  # as many products as the identities of the three allow
        keys = rows
    if inputs.value is inputs.key:
        values = keys
    of_rows = inputs._replace(query=rows, key=keys, value=values)
    q, k, v = (heads[0].transpose(0, 1) for heads in project(of_rows, words, batched=False))
    output = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        attn_mask=_mask(inputs, words),
        is_causal=words.is_causal,
        scale=1.0 / math.sqrt(words.head_dim),
        dropout_p=words.dropout_p,
        backend=backend,
    )
    assert isinstance(output, Tensor)
    return nested_like(project_back(output.flatten(1)), inputs.query)


def _mask(inputs: Inputs, words: Words) -> Tensor | None:
    """Both masks as one that ``attention_varlen`` takes."""
    attn_mask, padding = None if words.is_causal else inputs.attn_mask, inputs.key_padding_mask
    if attn_mask is None and padding is None:
        return None
    length = 1 if attn_mask is None else attn_mask.shape[-2]
    keys = max(mask.shape[-1] for mask in (attn_mask, padding) if mask is not None)
    scores = Scores(inputs.query.shape[0], words.num_heads, length, keys, 0, True)
    masks = make_masks(padding, attn_mask, scores)
    mask = masks.mask if masks.bias is None else masks.bias
    return mask if masks.key_padding_mask is None else combined_mask(mask, masks.key_padding_mask)
