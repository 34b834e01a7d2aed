"""The short way of a call on the CPU: straight to the formula where that takes it as it is.

The long way checks every argument one by one, which takes longer than a decoder's step itself. Here one look at the
call tells whether it is of the kind that most calls are: plain tensors of three dimensions that fit one another, few of
them or few queries, and no mask but that of padding. Any doubt leaves the call to the long way, which also has the
words for what is wrong with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn.ops.additive_attention import formula
from fastattn.ops.common import backends
from fastattn.ops.common.short_way import is_looked_at, is_plain

_PLAIN = {Tensor, Parameter}


def attend(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, key_padding_mask: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor] | None:
    """Output ``[B, L, Dv]`` and weights ``[B, L, S]`` of a call that has no other arguments than these; None where it
    has to take the long way."""
    if type(query) not in _PLAIN or not query.is_cpu:  # first, since calls on a GPU come by here too
        return None
    if not {type(query), type(key), type(value), type(weight)} <= _PLAIN or is_looked_at():
        return None
    if query.is_nested or key.is_nested or value.is_nested or weight.is_nested:  # these have no shape
        return None
    of_query, of_key, of_value, dtype, strided = query.shape, key.shape, value.shape, query.dtype, torch.strided
    if not (len(of_query) == len(of_key) == len(of_value) == 3 and weight.shape == of_key[2:] == of_query[2:]):
        return None
    if not (of_query[0] == of_key[0] and of_value[:2] == of_key[:2] and formula.is_small(query, key)):
        return None
    if not (key.is_cpu and value.is_cpu and weight.is_cpu and dtype in formula.DTYPES):
        return None
    if not key.dtype is value.dtype is weight.dtype is dtype:
        return None
    if not query.layout is key.layout is value.layout is weight.layout is strided:
        return None
    if torch._C._is_any_autocast_enabled() or backends.default_for(query.device, backend) != "torch":
        return None
    hidden = None
    if key_padding_mask is not None:
        if not is_plain(key_padding_mask) or key_padding_mask.dtype != torch.bool or not key_padding_mask.is_cpu:
            return None
        if key_padding_mask.layout is not strided or key_padding_mask.shape != of_key[:2]:
            return None
        hidden = key_padding_mask.unsqueeze(1)
    return formula.attend(query, key, value, weight, None, hidden)
