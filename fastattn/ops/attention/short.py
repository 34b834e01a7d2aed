"""Attention by the short way (``common.short_way``), on the kernels. Imports triton."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fastattn.ops.attention import launch, on_triton
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import Arguments, AttentionCall, Inputs, Options
from fastattn.ops.attention.functions.contract import ModifiedInputs
from fastattn.ops.attention.operator import AttentionBackward, ModifiedBackward, operands
from fastattn.ops.common.row_short_way import RowShortWay


def _call_of(arguments: Arguments) -> AttentionCall:
    words = arguments._asdict()
    del words["backend"]
    return make_call(**words)


def _operands(call: AttentionCall, seed: Tensor | None, training: bool) -> tuple[Inputs, Options]:
    return operands(call, seed, "triton", keeps_statistics=training or call.return_lse)


def _returned(call: AttentionCall) -> tuple[str, ...]:
    is_returned = {"output": True, "weights": call.weights != "none", "lse": call.return_lse}
    return tuple(name for name in is_returned if is_returned[name])


_short_way: Any = functools.partial(
    RowShortWay,
    forward=launch.forward_and_map,
    backward=launch.backward,
    backward_function=AttentionBackward,
    seed_of=on_triton.draw_seed,
    operands=_operands,
    returned=_returned,
)
_VIEWS = {"bias": "attn_mask", "mask": "attn_mask", "alibi_slopes": "alibi_slopes", "sinks": "sinks"}
# Of a call as the user made it, and of one that is validated already.
OF_ARGUMENTS: RowShortWay = _short_way(call_of=_call_of, views=_VIEWS)
OF_CALL: RowShortWay = _short_way(call_of=lambda call: call, views={})


def _modified_operands(call: Any, seed: Tensor | None, training: bool) -> tuple[Any, Options]:
    own = call._asdict()
    inputs = ModifiedInputs(**{name: own.get(name, seed) for name in ModifiedInputs._fields})
    words = {name: own[name] for name in Options._fields if name in own}
    return inputs, Options(**words, backend="triton", keeps_statistics=training or call.return_lse)


# Of a validated call with functions.
OF_MODIFIED: RowShortWay = _short_way(
    call_of=lambda call: call, views={}, operands=_modified_operands, backward_function=ModifiedBackward
)
