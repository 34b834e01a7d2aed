"""What ranks do together as operators, so that torch.compile finds no graph break: ``torch.ops.fastattn.on_ranks``.

torch.compile cannot trace messages between processes. In its graphs each exchange is one opaque operator, which does at
run time what an eager call does: the ranks agree on the call first, and errors arrive where the compiled function was
called. The operator takes tensors, and as a text everything else, process groups by their names among it.

All ranks run the same graph, as with torch's own functional collectives. So they meet in the same order, whatever order
a compiler has chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group as group_of_name

from fastattn.distributed.layout import Place, place_in, places_in
from fastattn.ops.common.operator import Opaque, keep_out_of_graphs

Tensors = Sequence[Any]  # each a tensor or None


class Exchange(NamedTuple):
    """One kind of what ranks do together. Each function takes a dictionary of what the text says.

    Attributes:
        forward: of the tensors, the results and behind them what the backward is to get beside the inputs.
        like_forward: of the tensors, empty ones of the same shapes.
        backward: of the results' gradients, what the forward gave, and the inputs: the inputs' gradients, empty where
            there is none.
        like_backward: the same, empty ones of the same shapes.
        results: how many of the forward's tensors are results.
    """

    forward: Callable[[dict[str, Any], Tensors], list[Tensor]]
    like_forward: Callable[[dict[str, Any], Tensors], list[Tensor]]
    backward: Callable[[dict[str, Any], Tensors, Tensors, Tensors], list[Tensor]]
    like_backward: Callable[[dict[str, Any], Tensors, Tensors, Tensors], list[Tensor]]
    results: int


_kinds: dict[str, Exchange] = {}


def register(name: str, exchange: Exchange) -> None:
    """Make a kind of exchange known by its name."""
    _kinds[name] = exchange


def _spec_of(group_or_mesh: Any, words: Any, integers: Any, reals: Any) -> str:
    """The text of an exchange: its groups, ``words``, pairs of a name and a value, and the names of numbers."""
    groups = [None if place.group is None else place.group.group_name for place in places_in(group_or_mesh)]
    return json.dumps({"groups": groups, "integers": integers, "reals": reals, **dict(words)})


# As torch.compiler.assume_constant_result does: the tracer runs the function, and takes the text for a constant.
_spec_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def places_of(spec: dict[str, Any]) -> tuple[Place, ...]:
    """Where this process stands in the groups of an exchange."""
    return tuple(place_in(group_of_name(name)) for name in spec["groups"])


class _Text(NamedTuple):
    """What an operator is told beside its tensors. Numbers are no part of the text: a graph may be for many of them."""

    kind: str
    spec: str
    integers: Sequence[int]
    reals: Sequence[float]

    def said(self, trained: str) -> dict[str, Any]:
        """Everything by its name, and which of the inputs are ``trained``."""
        words = json.loads(self.spec)
        numbers = zip((*words["integers"], *words["reals"]), (*self.integers, *self.reals))
        return {**words, **dict(numbers), "trained": json.loads(trained)}


class _OnRanks(Opaque):
    """An exchange in a graph, with its backward."""

    @staticmethod
    def forward(ctx: Any, kind: str, spec: str, integers: int, numbers: int, *rest: Any) -> Any:
        text = _Text(kind, spec, rest[:integers], rest[integers:numbers])
        tensors = rest[numbers:]
        trained = json.dumps([bool(needed) for needed in ctx.needs_input_grad[4 + numbers :]])
        found = torch.ops.fastattn.on_ranks(list(tensors), *text, trained)
        results = _kinds[kind].results
        ctx.text, ctx.trained, ctx.ahead, ctx.inputs = text, trained, 4 + numbers, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[results:])
        ctx.save_for_backward(*tensors, *found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved, text = ctx.saved_tensors, ctx.text
        inputs, found = saved[: ctx.inputs], saved[ctx.inputs :]
        given = list(grads[: _kinds[text.kind].results])
        gradients = torch.ops.fastattn.on_ranks_backward(given, list(found), list(inputs), *text, ctx.trained)
        needed = ctx.needs_input_grad[ctx.ahead :]
        return *(None,) * ctx.ahead, *(g if is_needed else None for g, is_needed in zip(gradients, needed))


def on_ranks(kind: str, group_or_mesh: Any, words: Any, *tensors: Tensor | None) -> Any:
    """The results of an exchange inside of a graph that torch.compile makes.

    Args:
        kind: of the exchange.
        group_or_mesh: its ranks.
        words: what it has to know beside tensors: pairs of a name and of a text, a number, a boolean or None.
        *tensors: its inputs.
    """
    keep_out_of_graphs()
    plain = tuple((name, word) for name, word in words if word is None or isinstance(word, (str, bool)))
    numbers = [(name, word) for name, word in words if not (word is None or isinstance(word, (str, bool)))]
    integers = [(name, number) for name, number in numbers if isinstance(number, int)]
    reals = [(name, number) for name, number in numbers if not isinstance(number, int)]
    spec = _spec_of(group_or_mesh, plain, tuple(name for name, _ in integers), tuple(name for name, _ in reals))
    values = [number for _, number in (*integers, *reals)]
    return _OnRanks.apply(kind, spec, len(integers), len(values), *values, *tensors)


def _run(tensors: list[Any], *words: Any) -> list[Tensor]:
    text = _Text(*words[:-1])
    return _kinds[text.kind].forward(text.said(words[-1]), tensors)


def _like(tensors: list[Any], *words: Any) -> list[Tensor]:
    text = _Text(*words[:-1])
    return _kinds[text.kind].like_forward(text.said(words[-1]), tensors)


def _run_backward(grads: list[Any], found: list[Any], inputs: list[Any], *words: Any) -> list[Tensor]:
    text = _Text(*words[:-1])
    return _kinds[text.kind].backward(text.said(words[-1]), grads, found, inputs)


def _like_backward(grads: list[Any], found: list[Any], inputs: list[Any], *words: Any) -> list[Tensor]:
    text = _Text(*words[:-1])
    return _kinds[text.kind].like_backward(text.said(words[-1]), grads, found, inputs)


_WORDS = "str kind, str spec, SymInt[] integers, float[] reals, str trained"
torch.library.define("fastattn::on_ranks", f"(Tensor?[] tensors, {_WORDS}) -> Tensor[]")
torch.library.define(
    "fastattn::on_ranks_backward", f"(Tensor?[] grads, Tensor?[] found, Tensor?[] inputs, {_WORDS}) -> Tensor[]"
)
for _name, _does, _fake in (("on_ranks", _run, _like), ("on_ranks_backward", _run_backward, _like_backward)):
    torch.library.impl(f"fastattn::{_name}", "CompositeExplicitAutograd")(_does)
    torch.library.register_fake(f"fastattn::{_name}")(_fake)
