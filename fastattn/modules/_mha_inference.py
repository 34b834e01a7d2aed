"""Small self-attention in inference on the CPU, where Python's time is most of the time: torch's one function for it.

``torch._native_multi_head_attention`` does in one call what takes eleven otherwise. ``nn.MultiheadAttention`` itself
runs it there, so the numbers are torch's to the bit. What this package promises beyond torch holds too: a row that may
see no key, and padding that holds NaN, come out of it as NaN, and the caller computes over again what is not finite.
As it makes all scores at once, it is for small ones only. And as it rounds scores to the dtype of ``x``, from which
errors are ten times as large in 16 bits, and inf in float16 beyond 65504, it is for float32 and float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.modules._mha_masks import Masks
from fastattn.ops.common.backends import default_for
from fastattn.ops.common.tracing import is_eager_on_cpu

# Elements of the scores up to which it is not slower (measured against F.scaled_dot_product_attention, which makes no
# scores, and against blocks of rows, which remake them), on one core of a server CPU.
_MOST_SCORES = {False: 1 << 14, True: 1 << 20}

_HALF = (torch.float16, torch.bfloat16)


def attend(
    module: nn.MultiheadAttention,
    backend: str | None,
    x: Tensor,
    masks: Masks,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Output and weights of self-attention over ``x`` ``[N, L, E]``, or None where it is not for this function.

    The caller has checked that there are no appended keys, and that gradients, training and autocast are off.
    """
    if masks.bias is not None or not _is_for_torch(x, backend):  # before sizes, which a graph may leave open
        return None
    batch, length, _ = x.shape
    scores = batch * module.num_heads * length * length
    if not 0 < scores <= _MOST_SCORES[need_weights]:
        return None
    weight, bias = module.in_proj_weight, module.in_proj_bias
    out_proj: Any = module.out_proj
    out_weight, out_bias = getattr(out_proj, "weight", None), getattr(out_proj, "bias", None)
    # what somebody put into the place of out_proj may lack these, or have methods of these names, as quantised ones do
    if not (isinstance(out_weight, Tensor) and isinstance(out_bias, Tensor)):
        return None
    if weight is None or bias is None or not x.dtype == weight.dtype == bias.dtype or x.dtype in _HALF:
        return None
    hidden, kind = masks.key_padding_mask, 1
    if masks.mask is not None:
        seen = masks.mask if hidden is None else masks.mask & ~hidden[:, None, None]
        hidden, kind = (~seen).expand(batch, module.num_heads, length, length), 2
    output, weights = torch._native_multi_head_attention(
        x, x, x, module.embed_dim, module.num_heads, weight, bias, out_weight, out_bias,
        hidden, need_weights, average_attn_weights, None if hidden is None else kind,
    )  # fmt: skip
    if not math.isfinite(output.sum().item()):
        return None
    return output, weights if need_weights else None


def _is_for_torch(x: Tensor, backend: str | None) -> bool:
    """Is this a plain call on the CPU, for the torch backend? Forward mode goes on where gradients are off."""
    if x.device.type != "cpu" or default_for(x.device, backend) != "torch":
        return False
    return torch.autograd.forward_ad._current_level < 0 and is_eager_on_cpu(x)
