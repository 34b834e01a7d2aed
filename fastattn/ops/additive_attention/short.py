"""Additive attention by the short way (``common.short_way``), on the kernels. Imports triton."""

from __future__ import annotations

from fastattn.ops.additive_attention import launch
from fastattn.ops.additive_attention.operator import AdditiveAttentionBackward, operands
from fastattn.ops.common.row_short_way import RowShortWay

OF_CALL = RowShortWay(
    forward=lambda inputs, options: (launch.forward(inputs, options), None),
    backward=lambda *groups: launch.backward(*groups[:-1]),
    backward_function=AdditiveAttentionBackward,
    call_of=lambda call: call,
    seed_of=lambda call: None,
    operands=lambda call, seed, training: operands(call, "triton"),
    returned=lambda call: ("output", "weights") if call.needs_weights else ("output",),
    views={},
)
