"""The attention function that models of transformers call, once for each attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.transformers.masks import LazyMask
from fastattn.ops import attention

# Arguments by which models select keys, of which the exact mask that "sdpa" would get says nothing.
_REFUSED = ("indices", "block_indices", "block_table")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    average_attn_weights: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, by the arguments of transformers' attention functions.

    Args:
        module: the layer; of it, only ``is_causal`` is read.
        query: ``[B, H, L, D]``, or of batch 1 where the keys have more.
        key: ``[B, Hk, S, D]``; ``Hk`` divides ``H``.
        value: ``[B, Hk, S, Dv]``.
        attention_mask: boolean (True = may attend) or additive, broadcastable to ``[B, H, L, S]``, and all that hides
            keys; or None.
        dropout: probability of dropping a weight.
        scaling: multiplies the scores; default ``1/sqrt(D)``.
        is_causal: without a mask, do queries see no later keys? Default: ``module.is_causal``. Layers that do not say
            it are not causal: to the "eager" implementation no mask hides nothing.
        sliding_window: without a mask, a query sees so many keys up to its own, and if not causal as many from it on.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.
        s_aux: ``[H]``, one more score for each softmax of a head.
        sinks: the same, or ``[B, H, L, 1]``, one for each row.
        position_bias: added to the scaled scores; broadcastable to ``[B, H, L, S]``, or of more keys than there are.
        output_attentions: also return the weights.
        average_attn_weights: of these, the average over heads, in memory O(B L S); an argument of this package.
        others: ignored, as the "sdpa" implementation does, unless they select keys.

    Returns:
        The output ``[B, L, H, Dv]``, and the weights ``[B, H, L, S]`` (``[B, L, S]`` averaged) or None.

    Raises:
        NotImplementedError: an argument that selects keys is given.
        ValueError: it cannot be said which keys a query sees.
        TypeError, ValueError: as :func:`fastattn.attention`.
    """
    for name in _REFUSED:
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{name}: {type(module).__name__} selects keys by it, and fastattn would attend to all: "
                'use attn_implementation="eager"'
            )
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)
    words: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "softcap": softcap}
    mask, keys = attention_mask, key.shape[2]
    if isinstance(mask, LazyMask) and mask.kept is not None:
        mask = mask.kept
    if isinstance(mask, LazyMask):
        words |= mask.words
        key, value, mask = key[:, :, : mask.keys], value[:, :, : mask.keys], None
    elif mask is None:
        words |= _without_mask(module, is_causal, sliding_window, query.shape[2], key.shape[2])
    elif _is_padding(mask):
        mask = mask[:, :, :1]
    if position_bias is not None:
        mask = _biased(mask, position_bias[..., : key.shape[2]], words)
    sinks = s_aux if s_aux is not None else sinks
    if sinks is not None and sinks.dim() == 4:
        output, weights = _with_sinks_of_rows(query, key, value, mask, sinks, words, output_attentions)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
    elif output_attentions:
        words |= {"need_weights": True, "average_attn_weights": average_attn_weights}
        output, weights = attention(query, key, value, attn_mask=mask, sinks=sinks, **words)
    else:
        output, weights = attention(query, key, value, attn_mask=mask, sinks=sinks, **words), None
    assert isinstance(output, Tensor)
    if weights is not None and weights.shape[-1] != keys:  # those of keys that no query sees, which were cut off
        weights = nn.functional.pad(weights, (0, keys - weights.shape[-1]))
    return output.transpose(1, 2).contiguous(), weights


def _without_mask(
    module: nn.Module, is_causal: bool | None, sliding_window: int | None, queries: int, keys: int
) -> dict[str, Any]:
    """What hides keys where the model made no mask."""
    if queries == 1:
        return {}  # the newest token
    if (
        is_causal is None
        and not hasattr(module, "is_causal")
        and (torch.compiler.is_compiling() or torch.jit.is_tracing())
    ):
        raise ValueError(
            f"attention_mask=None in a {type(module).__name__} without the attribute is_causal: in a graph that is "
            "being traced None may stand for a causal mask or for none; expected a mask, or the attribute"
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    if not (is_causal or sliding_window is not None):
        return {}
    if queries != keys:
        raise ValueError(
            f"attention_mask=None, {queries} queries and {keys} keys in a {type(module).__name__} with "
            f"is_causal={is_causal}, sliding_window={sliding_window}: it cannot be said which keys a query sees; "
            "expected as many queries as keys, one query, or a mask"
        )
    if sliding_window is None:
        return {"is_causal": True}
    return {"window": (sliding_window - 1, 0 if is_causal else sliding_window - 1)}


def _is_padding(mask: Tensor) -> bool:
    """Is this boolean mask the same for all heads and queries, and stored once for all?"""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    return mask.shape[2] == 1 or mask.stride(2) == 0


def _biased(mask: Tensor | None, bias: Tensor, words: dict[str, Any]) -> Tensor:
    """One mask for both; padding goes into the words instead, so that nothing has to be expanded for it."""
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    if _is_padding(mask):
        words["key_padding_mask"] = ~mask[:, 0, 0]
        return bias
    return torch.where(mask, bias, float("-inf"))


def _with_sinks_of_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    words: dict[str, Any],
    output_attentions: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with one more score in each row, ``[B, H, L, 1]``: it takes its share of what is there without it."""
    if output_attentions:
        words |= {"need_weights": True, "average_attn_weights": False}
    output, *weights, lse = attention(query, key, value, attn_mask=mask, return_lse=True, **words)
    share = torch.sigmoid(lse[..., None] - sinks)
    return (output * share).to(output.dtype), (weights[0] * share).to(output.dtype) if weights else None
