"""What the short way runs of ``MultiheadAttention`` in inference, on the kernels. Imports triton.

Projections, masks, attention and the projection back are one plan. It makes none of the views that lead from the
projections to attention, since a kernel is handed addresses and strides.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastattn.modules._mha_arguments import Arguments
from fastattn.modules._mha_compute import Inputs, Words, attend, is_taken_as_causal
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.short import OF_CALL
from fastattn.ops.common.short_way import Made


def short_forward(arguments: Arguments, needs: tuple[bool, ...]) -> Made:
    """Output, and weights if asked for. Nothing here has a gradient: so no backward is defined."""
    key = arguments.query if arguments.key is None else arguments.key
    value = key if arguments.value is None else arguments.value
    of_call = arguments._replace(key=key, value=value)
    weights = "average" if arguments.average_attn_weights else "heads"
    words = Words(
        arguments.embed_dim,
        arguments.num_heads,
        arguments.embed_dim // arguments.num_heads,
        arguments.batch_first,
        arguments.add_zero_attn,
        arguments.is_causal and is_taken_as_causal(arguments.key_padding_mask, arguments.need_weights),
        dropout_p=0.0,
        weights=weights if arguments.need_weights else "none",
    )
    merged, found = attend(Inputs(*(getattr(of_call, name) for name in Inputs._fields)), words, _run)
    output = F.linear(merged, arguments.out_weight, arguments.out_bias)
    return Made((output,) if found is None else (output, found), (), (), None)


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    output, *weights = OF_CALL.short_forward(call, ()).results
    return output, weights[0] if weights else None
