"""``score_mod`` and ``mask_mod`` of a call on shards: they are told heads, rows and keys of the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.distributed.layout import Piece
from fastattn.ops.attention.contract import Function, InputGradients, Inputs, Needs, Options
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.contract import ModifiedInputGradients, ModifiedInputs, ModifiedNeeds, slots
from fastattn.ops.attention.functions.lookups import Extent
from fastattn.ops.attention.functions.positions import PLACES, with_positions


def function_of_whole(kind: str, function: Any, query: Tensor, key: Tensor, ranks: int) -> Function | None:
    """A function of the user's as the parts of a call take it, whose positions :func:`at` fills in; or raise.

    Args:
        kind: ``score_mod`` or ``mask_mod``.
        function: as :func:`fastattn.attention` takes it.
        query: of this rank.
        key: of this rank.
        ranks: that share the sequence.
    """
    if function is None:
        return None
    (batch, heads, rows), keys = query.shape[:3], key.shape[2]
    found = check_function(kind, function, query, Extent(batch, heads, rows * ranks, keys * ranks))
    return Function(
        with_positions(found.text), (*found.captured, *(query.new_empty(0, dtype=torch.int32) for _ in PLACES))
    )


def at(own: Inputs, inputs: Any, options: Options, first_head: int, of_rows: Piece, of_keys: Piece) -> Any:
    """The inputs of a part with what its functions read.

    Args:
        own: the part, as if it had no functions.
        inputs: of this rank.
        options: of the call.
        first_head: which of all heads the first of the part is.
        of_rows: where its rows stand.
        of_keys: and its keys.
    """
    if not (options.score_mod or options.mask_mod):
        return own
    heads = Piece(slice(0, own.query.shape[1]), first_head, 1)
    spans = [piece.positions for piece in (heads, of_rows, of_keys)]
    positions = [torch.arange(s.start, s.stop, s.step, dtype=torch.int32, device=own.query.device) for s in spans]
    read = {name: getattr(inputs, name) for name in ModifiedInputs._fields if name not in Inputs._fields}
    for names in slots(options.score_mod, options.mask_mod):
        read |= zip(names[-len(PLACES) :], positions)
    return ModifiedInputs(**{name: getattr(own, name) for name in Inputs._fields}, **read)


def kinds_of(options: Options) -> tuple[Any, Any]:
    """The types of a call's inputs and of what it asks of the backward."""
    return (ModifiedInputs, ModifiedNeeds) if options.score_mod or options.mask_mod else (Inputs, Needs)


def gradients_of(inputs: Any) -> Any:
    """The type of the gradients of a call's inputs."""
    return InputGradients if isinstance(inputs, Inputs) else ModifiedInputGradients
