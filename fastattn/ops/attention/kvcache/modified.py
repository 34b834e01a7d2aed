"""Functions of the user's over a cache. A query's index is the slot at which it stands, and a key's its slot.

The operator has places for what functions read, as attention's has (``functions.contract``). Where plain torch reads
all slots at once, every sequence has its own first query, so that a function is wrapped in one that adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastattn.ops.attention.contract import AttentionCall, Function, MaskMod, ScoreMod
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.contract import tuple_of
from fastattn.ops.attention.functions.lookups import extent_of
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.attention.kvcache.contract import KVCacheCall, KVCacheInputs, KVCacheOptions
from fastattn.ops.attention.kvcache.slots import all_slots, append
from fastattn.ops.common.backends import Backend

_KINDS = ("score_mod", "mask_mod")
_READ = [f"read_{number}" for number in range(24)]

# What the operator over a cache takes where there are functions.
ModifiedKVCacheInputs: Any = tuple_of(
    "ModifiedKVCacheInputs", [*KVCacheInputs._fields, *_READ], Tensor | None, KVCacheInputs
)
ModifiedKVCacheOptions: Any = tuple_of(
    "ModifiedKVCacheOptions", [*KVCacheOptions._fields, *_KINDS], str, KVCacheOptions
)
ModifiedKVCacheInputs.room = KVCacheInputs.room


def modified_operands(call: KVCacheCall) -> tuple[Any, Any]:
    """A call with functions in the form that the operator takes.

    Raises:
        NotImplementedError: the functions read more tensors than there are places.
    """
    functions = [call.score_mod, call.mask_mod]
    read = [tensor for function in functions if function is not None for tensor in function.captured]
    if len(read) > len(_READ):
        raise NotImplementedError(f"the functions of a call read {len(read)} tensors: expected at most {len(_READ)}")
    places = [*read, *[None] * (len(_READ) - len(read))]
    texts = ("" if function is None else function.text for function in functions)
    return ModifiedKVCacheInputs(*call.inputs, *places), ModifiedKVCacheOptions(*call.options, *texts)


def programs(inputs: Any, options: Any) -> Iterator[tuple[str, str, list[Tensor]]]:
    """The kind and the text of each program of the operands, and what it reads."""
    if isinstance(options, ModifiedKVCacheOptions):
        places = iter(_READ)
        for kind in _KINDS:
            if text := getattr(options, kind):
                yield kind, text, [getattr(inputs, next(places)) for _ in Program.of(text).kinds]


# ------------------------------------------------------------------------------------------------ all slots in one call


def of_slots(asked: AttentionCall, tokens: Tensor, call: KVCacheCall) -> AttentionCall:
    """A call of ``attention`` to all slots, with the functions of a call over a cache whose sequences hold so many
    ``tokens`` ``[B]``."""
    first = tokens.int() - asked.query.shape[2]
    extent = extent_of(asked.query, asked.key)._replace(query_index=asked.key.shape[2])
    found: dict[str, Any] = {}
    for kind, function in zip(_KINDS, (call.score_mod, call.mask_mod)):
        if function is not None:
            wrapped = (_from_slot(_of_program(function), kind), first, *function.captured)
            found[kind] = check_function(kind, wrapped, asked.query, extent)
    return asked._replace(**found)


def run_in_graph(
    call: KVCacheCall, score_mod: ScoreMod | None, mask_mod: MaskMod | None, backend: Backend | None
) -> tuple[Tensor, Tensor | None]:
    """``(output, lse or None)`` of a call without functions and of these, for ``torch.compile`` to trace."""
    from fastattn.ops.attention.functions import in_graphs  # imports the tracer

    inputs = call.inputs
    read = append(inputs, call.options, looks=False)
    tokens = inputs.cache_seqlens if inputs.key is None else inputs.cache_seqlens + inputs.query.shape[2]
    first = tokens.int() - inputs.query.shape[2]
    functions: list[Any] = []
    for kind, function in zip(_KINDS, (score_mod, mask_mod)):
        own, *tensors = function if isinstance(function, tuple) else (function,)
        functions.append(None if own is None else (_from_slot(own, kind), first, *tensors))
    asked = all_slots(read, call.options, tokens.long(), call.return_lse)
    found = in_graphs.run(asked, functions[0], functions[1], backend)
    return found[0], found[1] if call.return_lse else None


def _of_program(function: Function) -> Callable[..., Tensor]:
    text = function.text
    return lambda *arguments: Program.of(text).function(*arguments)


def _from_slot(function: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    """A function whose rows are counted from the first query of their sequence."""
    ahead = 1 if kind == "score_mod" else 0

    def of_rows(*arguments: Any) -> Tensor:
        score, (batch, head, row, key, first, *read) = arguments[:ahead], arguments[ahead:]
        return function(*score, batch, head, row + first[batch], key, *read)

    return of_rows
