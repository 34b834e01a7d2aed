"""Writing programs (see :mod:`.program`): the nodes of a graph that ``make_fx`` has made, as lines of text."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fastattn.ops.attention.functions.vocabulary import COMPARISONS, SPELLINGS

# The dispatch keys that are on and off where nothing is active.
_KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
_tracing = threading.RLock()
INDICES = ("batch", "head", "query_index", "key_index")


def undisturbed() -> contextlib.ExitStack:
    """Tracing inside of this is free of what is active around it: modes of dispatch, ``torch.func``'s transforms,
    inference mode, and the dispatch keys that are off inside an operator, autograd's among them. One thread at a time
    is inside: torch's tracers patch modules."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    stack = contextlib.ExitStack()
    stack.enter_context(_tracing)
    stack.enter_context(torch._C._ForceDispatchKeyGuard(*_KEYS))
    for each in (torch.inference_mode(False), torch.enable_grad(), _disable_current_modes()):
        stack.enter_context(each)
    stack.enter_context(temporarily_clear_interpreter_stack())
    return stack


class NotUnderstood(NotImplementedError):
    """A function does something that no program can say."""


_SAME = {
    "aten.alias.default", "aten.clone.default", "aten.expand.default", "aten.view.default",
    "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.contiguous.default",
}  # fmt: skip
_CONSTANTS = {"aten.full.default", "aten.full_like.default", "aten.scalar_tensor.default"}
_DROPPED = {"layout", "device", "pin_memory", "memory_format", "non_blocking"}


class _Read(NamedTuple):
    """A place in a captured tensor, of which some axes may still have no index."""

    captured: str
    indices: tuple[str | None, ...]


def described(captured: Tensor) -> str:
    """The annotation of a captured tensor: its kind of number and how many axes it has."""
    kind = "float" if captured.is_floating_point() else str(captured.dtype).removeprefix("torch.")
    return f"{kind} {captured.dim()}"


class Writer:
    """Writes the nodes of a graph that ``make_fx`` has made as lines of a program.

    Args:
        given: what nodes are called that the program does not compute: its arguments.
        captured: how many axes those of them have that are captured tensors.
    """

    def __init__(self, given: Mapping[fx.Node, str], captured: Mapping[str, int]) -> None:
        self._spelled: dict[fx.Node, str | _Read] = {
            node: _Read(name, (None,) * captured[name]) if name in captured else name for node, name in given.items()
        }
        self._lines: list[str] = []
        self._known: dict[str, str] = {}
        self._same = _SAME

    def text(self, name: str, arguments: Iterable[str], nodes: Iterable[fx.Node], results: Sequence[fx.Node]) -> str:
        """The program of this name that computes ``results``."""
        self._same = _SAME | ({"aten.detach.default"} if name == "gradient" else set())  # nobody differentiates that
        for node in nodes:
            if node.op == "call_function" and node not in self._spelled:
                self._spelled[node] = self._write(node)
        returned = ", ".join(self._number(node, results[0]) for node in results)
        returned += "," if name == "gradient" else ""  # a tuple, be it of one
        return "\n    ".join([f"def {name}({', '.join(arguments)}):", *self._lines, f"return {returned}"]) + "\n"

    def _line(self, expression: str) -> str:
        """The name of an expression; the same one twice is written once."""
        if expression not in self._known:
            self._known[expression] = f"v{len(self._known)}"
            self._lines.append(f"{self._known[expression]} = {expression}")
        return self._known[expression]

    def _write(self, node: fx.Node) -> str | _Read:
        name = re.sub(r"([a-z])_\.", r"\1.", str(node.target))  # make_fx follows writing in place: a += b is a = a + b
        first = node.args[0] if node.args else None
        if name == "aten.index.Tensor":
            return self._read(node)
        if name == "aten.copy.default":  # of a number to the place of another
            name, first = "aten.clone.default", node.args[1]
        is_cast = name == "aten._to_copy.default"
        if name in self._same or (is_cast and isinstance(first, fx.Node) and _kind(first) == _kind(node)):
            assert isinstance(first, fx.Node)
            if _axes(node) == _axes(first):
                return self._spelled[first]
        if name in _CONSTANTS:  # on the device and of the rank of what it is added to, whatever makes it
            value = node.args[0] if name == "aten.scalar_tensor.default" else node.args[1]
            dtype = self._spell(_value(node).dtype, node, False)
            return self._line(f"aten.full_like.default(batch, {value!r}, dtype={dtype})")
        if _value(node).is_complex():
            raise NotUnderstood(f"{_expression(node)} makes a complex number: a score is a real one")
        if name not in SPELLINGS:
            raise NotUnderstood(f"{_expression(node)} uses {name.removesuffix('.default')}, which it cannot say")
        widened = _is_real(node) and not is_cast
        if name in COMPARISONS:
            widened = any(_is_real(a) if isinstance(a, fx.Node) else isinstance(a, float) for a in node.args)
        arguments = [
            self._spell(a, node, widened and not (name == "aten.where.self" and not i)) for i, a in enumerate(node.args)
        ]
        words = [
            f"{k}={self._spell(v, node, False)}" for k, v in node.kwargs.items() if k not in _DROPPED and v is not None
        ]
        return self._line(f"{name}({', '.join([*arguments, *words])})")

    def _spell(self, value: Any, user: fx.Node, widened: bool) -> str:
        if isinstance(value, fx.Node):
            spelled = self._number(value, user)
            if widened and not _is_real(value):
                spelled = self._line(f"aten._to_copy.default({spelled}, dtype=torch.float32)")
            return spelled
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._spell(each, user, widened) for each in value)}]"
        if isinstance(value, torch.dtype):
            return "torch.float32" if value.is_floating_point else str(value)
        return repr(value)

    def _number(self, node: fx.Node, user: fx.Node) -> str:
        """A node's name, which is that of a number."""
        spelled = self._spelled[node]
        if isinstance(spelled, _Read):
            if None in spelled.indices:
                raise NotUnderstood(
                    f"{_expression(user)} takes {spelled.captured}, of which {spelled.indices.count(None)} axes have "
                    "no index, for a number: index every axis"
                )
            spelled = self._line(f"read({spelled.captured}, [{', '.join(map(str, spelled.indices))}])")
        return spelled

    def _read(self, node: fx.Node) -> _Read:
        tensor, indices = node.args
        assert isinstance(tensor, fx.Node) and isinstance(indices, (list, tuple))
        read = self._spelled[tensor]
        if not isinstance(read, _Read):
            raise NotUnderstood(f"{_expression(node)} indexes a number that the function has computed")
        rest = iter(indices)
        found: list[str | None] = []
        for index in read.indices:
            given = next(rest, None) if index is None else None
            found.append(self._number(given, node) if isinstance(given, fx.Node) else index)
        return _Read(read.captured, tuple(found))


def _value(node: fx.Node) -> Tensor:
    return node.meta["val"]


def _axes(node: fx.Node) -> int:
    return _value(node).dim()


def _kind(node: fx.Node) -> Any:
    """The dtype, all floating ones being one."""
    return "real" if _is_real(node) else _value(node).dtype


def _is_real(node: Any) -> bool:
    return isinstance(node, fx.Node) and _value(node).is_floating_point()


def _expression(node: fx.Node) -> str:
    """The user's own line that a node comes from."""
    line = node.meta.get("line")
    return f"`{line}`" if line else "an expression"
