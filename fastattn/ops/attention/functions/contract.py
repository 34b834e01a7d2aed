"""What the operators take and return where a call has functions of the user's: more tensors, and their gradients.

Operators have a fixed number of arguments, and few calls have functions. So calls that have some go through a pair of
operators of their own, ``fastattn::attention_modified_forward`` and ``_backward``: the arguments of the plain pair, and
:data:`DIFFERENTIABLE` and :data:`OTHERS` slots for what the functions read.
"""

from __future__ import annotations

import collections
import functools
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.ops.attention.contract import AttentionCall, InputGradients, Inputs, Needs, Options, empty_gradients
from fastattn.ops.attention.functions.program import Program

# How many tensors the functions of a call may read: floating ones of a score_mod, which may have gradients, and others.
DIFFERENTIABLE, OTHERS = 8, 10  # a schema has at most 64 arguments, and the backward operator 61

_CAPTURED = [f"captured_{number}" for number in range(DIFFERENTIABLE)]
_READ = [f"read_{number}" for number in range(OTHERS)]
_OF_FUNCTIONS = frozenset((*_CAPTURED, *_READ))
_PLAIN = len(InputGradients._fields)


def tuple_of(name: str, fields: Iterable[str], hint: Any, plain: Any) -> Any:
    """A NamedTuple type whose fields have the annotations of ``plain`` where it has them, and else ``hint``."""
    made: Any = collections.namedtuple(name, fields)
    known = typing.get_type_hints(plain)
    made.__annotations__ = {field: known.get(field, hint) for field in made._fields}
    return made


# The plain pair's arguments, the differentiable ones of the functions behind its own.
ModifiedInputs: Any = tuple_of(
    "ModifiedInputs", [*Inputs._fields[:_PLAIN], *_CAPTURED, *Inputs._fields[_PLAIN:], *_READ], Tensor | None, Inputs
)
ModifiedNeeds: Any = tuple_of(
    "ModifiedNeeds", [*Needs._fields[:-1], *(f"needs_d_{name}" for name in _CAPTURED), Needs._fields[-1]], bool, Needs
)
ModifiedInputGradients: Any = tuple_of(
    "ModifiedInputGradients", [*InputGradients._fields, *(f"d_{name}" for name in _CAPTURED)], Tensor, InputGradients
)


# A call as the short way keeps it: all tensors ahead, each under its own name, then its words.
_WORDS = [name for name in Options._fields if name not in ("backend", "keeps_statistics")]
ModifiedCall: Any = tuple_of(
    "ModifiedCall",
    [*(name for name in ModifiedInputs._fields if name != "dropout_state"), *_WORDS, "return_lse"],
    Any,
    Options,
)


def modified_call(call: AttentionCall) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors and the words of a :data:`ModifiedCall`."""
    texts = {kind: "" if (f := getattr(call, kind)) is None else f.text for kind in ("score_mod", "mask_mod")}
    read, fields = read_by(call), ModifiedCall._fields
    first = fields.index(_WORDS[0])
    tensors = tuple([read.get(name) if name in _OF_FUNCTIONS else getattr(call, name) for name in fields[:first]])
    words = tuple([texts[name] if name in texts else getattr(call, name) for name in fields[first:]])
    return tensors, words


class Slots(NamedTuple):
    """The names of the inputs in which the tensors lie that the programs of a call read, in the programs' order."""

    score_mod: tuple[str, ...]
    mask_mod: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def slots(score_mod: str, mask_mod: str) -> Slots:
    """The slots of two programs, either of which may be empty.

    Raises:
        NotImplementedError: they read more tensors than there are slots.
    """
    captured, read = iter(_CAPTURED), iter(_READ)
    found: list[tuple[str, ...]] = []
    for text in (score_mod, mask_mod):
        kinds = Program.of(text).kinds if text else ()
        names = [next(captured if text is score_mod and kind.startswith("float") else read, None) for kind in kinds]
        if None in names:
            raise NotImplementedError(
                f"the functions of a call read more than {DIFFERENTIABLE} tensors of floating numbers in score_mod, or "
                f"{OTHERS} others: put several into one tensor"
            )
        found.append(tuple(name for name in names if name is not None))
    return Slots(*found)


def read_by(call: AttentionCall) -> dict[str, Tensor]:
    """What the functions of a call read, by the names of the slots."""
    functions = [call.score_mod, call.mask_mod]
    of_both = slots(*("" if function is None else function.text for function in functions))
    return {
        name: tensor
        for function, names in zip(functions, of_both)
        if function is not None
        for name, tensor in zip(names, function.captured)
    }


def empty_modified_gradients(inputs: Any, needs: Any) -> Any:
    """The gradients of all inputs, empty where not needed."""
    plain = empty_gradients(inputs, needs)
    own = [getattr(inputs, name) if getattr(needs, f"needs_d_{name}") else None for name in _CAPTURED]
    return ModifiedInputGradients(
        *plain, *(inputs.query.new_empty(0) if t is None else t.new_empty(t.shape) for t in own)
    )
