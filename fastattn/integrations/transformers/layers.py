"""Forwards, on this package, of attention layers that transformers wrote before attention had names.

Each takes the arguments of the layer's own forward, by its names, and returns what that returns; but weights are None
unless a call asks for them, and keys that heads share are stored in the cache once. Positions are biases that broadcast
over all that they do not depend on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.integrations.transformers.attention import attention_forward


class HeldMask:
    """A mask on its way through a model that would compute with it; what it does to the mask leaves this as it is.

    Attributes:
        mask: as this package's mask function made it, boolean (True = may attend) or None; or the caller's.
        ndim: 0, which tells Falcon's models that there is nothing to add ALiBi to.
    """

    ndim = 0

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask

    def to(self, *args: Any, **kwargs: Any) -> HeldMask:
        """On another device; the same for a dtype, to which MPT's models convert numbers."""
        if args == (torch.bool,) or self.mask is None:
            return self
        return HeldMask(self.mask.to(*args, **kwargs))


# -------------------------------------------------------------------------------------------------------------- BLOOM


def bloom_attention(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``BloomAttention.forward``: ``alibi`` is ``[B * H, 1, S]``; ``residual`` is added to the output ``[B, L, E]``."""
    query, key, value = _heads_of_groups(self.query_key_value(hidden_states), self.num_heads, self.head_dim)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    output, weights = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=_dropout(self, self.attention_dropout.p),
        scaling=self.inv_norm_factor,
        is_causal=_is_causal(self),
        position_bias=alibi.view(len(query), self.num_heads, 1, -1),
        output_attentions=output_attentions,
    )
    output = output.flatten(2)
    if self.pretraining_tp > 1 and self.slow_but_exact:
        output = F.linear(output, self.dense.weight)  # in this mode transformers leaves the bias out
    else:
        output = self.dense(output)
    return F.dropout(output, self.hidden_dropout, self.training) + residual, weights


# ---------------------------------------------------------------------------------------------------------------- MPT


def mpt_block(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    attention_mask: HeldMask,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``MptBlock.forward``, which tells its attention whether weights are asked for: theirs returns them always."""
    attended, weights = self.attn(
        self.norm_1(hidden_states),
        position_bias=position_bias,
        cache=layer_past,
        attention_mask=attention_mask,
        output_attentions=output_attentions,
    )
    hidden_states = self.resid_attn_dropout(attended) + hidden_states
    return self.ffn(self.norm_2(hidden_states), hidden_states), weights


def mpt_attention(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    *,
    cache: Any = None,
    past_key_values: Any = None,
    attention_mask: HeldMask | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``MptAttention.forward``: ``position_bias`` is ``[H, 1, longest]`` and counts from the last key.

    The cache is ``past_key_values`` in older versions.
    """
    cache = cache if cache is not None else past_key_values
    projected = self.Wqkv(hidden_states)
    if self.clip_qkv:
        projected = projected.clamp(-self.clip_qkv, self.clip_qkv)
    query, key, value = projected.unflatten(2, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    mask = None if attention_mask is None else attention_mask.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask == 0  # MPT reads a mask of numbers as what hides: anything but 0
    output, weights = attention_forward(
        self,
        query,
        key,
        value,
        mask,
        dropout=_dropout(self, self.attn_dropout_p),
        scaling=self.softmax_scale,
        is_causal=_is_causal(self),
        position_bias=None if position_bias is None else position_bias[None, :, :, -key.shape[2] :],
        output_attentions=output_attentions,
    )
    return self.out_proj(output.flatten(2)), weights


# ------------------------------------------------------------------------------------------------------------- Falcon


def falcon_attention(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: HeldMask | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``FalconAttention.forward``: positions by ``alibi`` ``[B * H, 1, S]``, or by rotation where that is None.

    ALiBi is added once, before the scores are scaled, as the models were trained: transformers' ``"eager"`` adds it a
    second time, with the mask. Only with ALiBi are weights dropped, in transformers too.
    """
    groups = self.num_kv_heads if self.new_decoder_architecture or self.multi_query else self.num_heads
    query, key, value = _heads_of_groups(self.query_key_value(hidden_states), groups, self.head_dim)
    if alibi is None:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        bias, dropout = None, 0.0
    else:
        bias = alibi.view(len(query), self.num_heads, 1, -1) * self.inv_norm_factor
        dropout = _dropout(self, self.attention_dropout.p)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    output, weights = attention_forward(
        self,
        query,
        key,
        value,
        None if attention_mask is None else attention_mask.mask,
        dropout=dropout,
        scaling=self.inv_norm_factor,
        is_causal=_is_causal(self),
        position_bias=bias,
        output_attentions=output_attentions,
    )
    return self.dense(output.flatten(2)), weights


# -------------------------------------------------------------------------------------------------------------- MPNet


def mpnet_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """``MPNetSelfAttention.forward``: ``position_bias`` ``[B, H, L, L]`` has the same numbers for each batch entry."""
    query, key, value = (
        projection(hidden_states).unflatten(2, (-1, self.attention_head_size)).transpose(1, 2)
        for projection in (self.q, self.k, self.v)
    )
    output, weights = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=_dropout(self, self.dropout.p),
        is_causal=False,
        position_bias=None if position_bias is None else position_bias[:1],
        output_attentions=output_attentions,
    )
    output = self.o(output.flatten(2))
    return (output,) if weights is None else (output, weights)


# -------------------------------------------------------------------------------------------------------------- WavLM


def wavlm_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    output_attentions: bool | None = None,
    index: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``WavLMAttention.forward``: ``attention_mask`` is ``[B, L]``, True = no padding.

    The first layer makes the ``position_bias``, here ``[1, H, L, L]``, and returns it for all. Each query weighs it by
    two gates, so that attention gets ``[B, H, L, L]``. Weights are averages over heads, shown as those of each.
    """
    if position_bias is None:
        position_bias = self.compute_bias(hidden_states.shape[1], hidden_states.shape[1])[None]
    heads = (self.num_heads, self.head_dim)
    gates = self.gru_rel_pos_linear(hidden_states.unflatten(2, heads).transpose(1, 2))
    outer, inner = gates.unflatten(3, (2, -1)).sum(dim=-1).sigmoid().split(1, dim=-1)  # [B, H, L, 1] each
    gate = outer * (inner * self.gru_rel_pos_const - 1) + 2
    query, key, value = (
        projection(hidden_states).unflatten(2, heads).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    output, weights = attention_forward(
        self,
        query,
        key,
        value,
        None if attention_mask is None else attention_mask[:, None, None, :].bool(),
        dropout=_dropout(self, self.dropout),
        scaling=self.scaling,
        is_causal=False,
        position_bias=gate * position_bias,
        output_attentions=output_attentions,
        average_attn_weights=True,
    )
    if weights is not None:
        weights = weights[:, None].expand(-1, self.num_heads, -1, -1)
    return self.out_proj(output.flatten(2)), weights, position_bias


# -------------------------------------------------------------------------------------------------------------- shared


def _heads_of_groups(projected: Tensor, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, H, L, D]``, key and value ``[B, groups, L, D]``, of ``[B, L, E]`` in which the queries of each group
    come before its key and its value."""
    heads = projected.unflatten(2, (groups, -1, head_dim))
    query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _dropout(layer: nn.Module, probability: float) -> float:
    return probability if layer.training else 0.0


def _is_causal(layer: Any) -> bool:
    """Where there is no mask: a configuration may say that a decoder reads in both directions."""
    return getattr(layer.config, "is_causal", True)
