"""What a call of ``MultiheadAttention`` in inference depends on, for the short way (``ops.common.short_way``)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Arguments(NamedTuple):
    """A call and its module's parameters, then what else decides. ``key`` is None where it is the query, and ``value``
    where it is the key, since the projections depend on it."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    in_weight: Tensor | None
    in_weights: tuple[Tensor, Tensor, Tensor] | None
    in_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    embed_dim: int
    num_heads: int
    batch_first: bool
    add_zero_attn: bool
    need_weights: bool
    average_attn_weights: bool
    is_causal: bool
    backend: str | None


TENSORS = Arguments._fields.index("embed_dim")  # so many of the arguments are tensors, the first of them


def arguments_of(
    module: nn.MultiheadAttention,
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Any, ...] | None:
    """The :class:`Arguments`; None where a parameter is none of the module's own, but computed whenever it is read.

    Looks where ``nn.Module`` keeps parameters: asking the module takes a third of a microsecond for each.
    """
    own = module._parameters
    try:
        in_weights = None
        if not module._qkv_same_embed_dim:
            in_weights = own["q_proj_weight"], own["k_proj_weight"], own["v_proj_weight"]
        projection = own["in_proj_weight"], in_weights, own["in_proj_bias"]
        # not in _parameters where add_bias_kv is off
        appended = (own["bias_k"], own["bias_v"]) if "bias_k" in own else (module.bias_k, module.bias_v)
        out_proj: Any = module._modules["out_proj"]
        back = out_proj._parameters["weight"], out_proj._parameters["bias"]
    except (KeyError, AttributeError):
        return None
    return (
        query, None if key is query else key, None if value is key else value, key_padding_mask, attn_mask,
        *projection, *appended, *back, module.embed_dim, module.num_heads, module.batch_first, module.add_zero_attn,
        need_weights, average_attn_weights, is_causal, backend,
    )  # fmt: skip
