"""Attention over a cache by the short way (``common.short_way``), on the kernels, which take no gradients. Imports
triton."""

from __future__ import annotations

from fastattn.ops.attention.kvcache import launch
from fastattn.ops.attention.kvcache.call import make_call
from fastattn.ops.attention.kvcache.contract import Arguments
from fastattn.ops.common.short_way import Made


def short_forward(arguments: Arguments, needs: tuple[bool, ...]) -> Made:
    """The call's results; the caches hold the new tokens afterwards, of which autograd has not been told."""
    words = arguments._asdict()
    del words["backend"]
    call = make_call(**words)
    output, lse = launch.forward(call.inputs, call.options)
    return Made((output, lse) if call.return_lse else (output,), (), (), None)
