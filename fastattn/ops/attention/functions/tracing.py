"""From a Python function of numbers to a program: the text that every backend runs, and the tensors that it reads.

The function runs once, on tensors of the meta device, which have a dtype and no numbers, under ``make_fx``, which
writes down the operators of torch that it calls. A mode of torch functions stands in front of it: it puts a
placeholder in the place of every tensor that the function reaches from outside (a closure's, a module's, a global),
whatever way it gets there, and makes an index by a traced number the operator ``aten.index``, where Python would ask
for the number itself.

What depends on captured tensors alone (``slopes.exp()``, ``table.T``) is split off as the *prologue*. It runs in torch,
once a call, with autograd; the program reads its results.
"""

from __future__ import annotations

import dataclasses
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.ops.attention.functions.in_triton import check
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.attention.functions.vocabulary import decompositions
from fastattn.ops.attention.functions.writing import INDICES, NotUnderstood, Writer, described, undisturbed

Kind = Literal["score_mod", "mask_mod"]
_OPEN_SIZE = 1 << 14
_OF_TORCH = os.path.dirname(torch.__file__)
_REAL = torch.float32  # every floating number of a program; where it runs in float64, this means float64


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced function.

    Attributes:
        text: the program; see :mod:`.program`.
        captured: the tensors that the function reached, as they are.
        literals: how many of them, the last ones, the function made itself out of Python numbers.
        prologue: makes what the program reads out of the captured tensors; None: it reads them as they are.
    """

    text: str
    captured: tuple[Tensor, ...]
    literals: int
    prologue: Callable[..., tuple[Tensor, ...]] | None

    def only_literals(self) -> Traced:
        """The trace without the tensors that are the caller's, for which placeholders stand: it may outlive them."""
        own = len(self.captured) - self.literals
        placeholders = [torch.empty(0, device="meta")] * own
        return dataclasses.replace(self, captured=(*placeholders, *self.captured[own:]))

    def inputs(self, captured: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the program reads, differentiable in the captured tensors."""
        if self.prologue is None:
            return tuple(captured)
        # The trace has seen float32, and left casts to it out.
        wide = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in captured)
        return self.prologue(*wide, device=captured[0].device if captured else torch.device("cpu"))


def trace(kind: Kind, function: Callable[..., Any], arguments: Sequence[Tensor] = ()) -> Traced:
    """Trace a function of ``(score,) batch, head, query_index, key_index`` and of further tensors, ``arguments``.

    Raises:
        NotImplementedError: the function does something that a program cannot; the message shows the line.
        TypeError, ValueError: what it returns is not a number, or not a boolean where one is asked for.
    """
    with undisturbed():
        return _trace(kind, function, tuple(arguments))


# ------------------------------------------------------------------------------------------------------------ capturing

_READS_NUMBERS = {
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__bool__: "a Python `if`, `and`, `or`, `not`, `in` or comparison chain",
    Tensor.__int__: "int()",
    Tensor.__float__: "float()",
    Tensor.__index__: "an index of a list, or range()",
    Tensor.__contains__: "`in`",
    Tensor.__iter__: "a loop over a tensor",
}
_MAKES_OF_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor}


class _Capturing(TorchFunctionMode):
    """Puts placeholders in the place of captured tensors, and operators in that of indexing; see the module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.placeholders: dict[int, Tensor] = {}  # by the id of what is captured
        self.captured: list[Tensor] = []  # keeps them alive, so that ids stay theirs
        self.literals: list[Tensor] = []
        self._own: dict[int, Tensor] = {}  # what the trace itself has made

    def adopt(self, tree: Any) -> Any:
        """Take tensors for the trace's own."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._own[id(leaf)] = leaf
        return tree

    def stand_in(self, value: Any) -> Any:
        """A tensor of the trace's own as it is, and a placeholder for one that is captured."""
        if not isinstance(value, Tensor) or id(value) in self._own:
            return value
        if id(value) not in self.placeholders:
            if value.layout is not torch.strided or value.is_complex() or value.dtype == torch.uint64:
                what = value.dtype if value.layout is torch.strided else value.layout
                raise NotUnderstood(f"{self.name} captures a tensor that is {what}: expected dense real numbers")
            dtype = _REAL if value.is_floating_point() else value.dtype
            # a size that a graph leaves open is a long one: nothing here depends on it
            sizes = [size if isinstance(size, int) else _OPEN_SIZE for size in value.shape]
            with _disable_current_modes():  # the trace need not know of it
                self.placeholders[id(value)] = self.adopt(torch.empty(sizes, dtype=dtype, device="meta"))
            self.captured.append(value)
        return self.placeholders[id(value)]

    def _literal(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """A tensor that the function makes of Python numbers."""
        if func is Tensor.new_tensor:
            func, args = torch.tensor, args[1:]
        if isinstance(args[0], Tensor):
            return args[0]
        with _disable_current_modes():
            made = func(*args, **{**kwargs, "device": "cpu"} if func is not torch.scalar_tensor else kwargs)
        if made.dim() == 0:
            return self.adopt(torch.full((), made.item(), dtype=made.dtype, device="meta"))
        self.literals.append(made)
        return self.stand_in(made)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MAKES_OF_NUMBERS:
            return self._literal(func, args, kwargs)
        if func in _READS_NUMBERS:
            raise NotUnderstood(
                f"it asks for a number by {_READS_NUMBERS[func]}; a program has tensors of one number whose value is "
                "known on the device alone: use torch.where, &, | and ~"
            )
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        args, kwargs = tree_map(self.stand_in, (args, kwargs))
        name = getattr(func, "__name__", "")
        if func is Tensor.__getitem__:
            return self.adopt(self._noted(_as_grad_mode_says(index_by_numbers(*args))))
        writes = func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        if writes and (func is Tensor.__setitem__ or any(args[0] is each for each in self.placeholders.values())):
            raise NotUnderstood(f"it writes to a tensor ({name}): a program reads what it captures")
        return self.adopt(self._noted(_as_grad_mode_says(func(*args, **kwargs))))

    def _noted(self, result: Any) -> Any:
        """Note at the new nodes of the graph which line of the user's they come from."""
        mode = get_proxy_mode()
        line = _line_of_caller()
        for node in () if mode is None else reversed(mode.tracer.graph.nodes):
            if "line" in node.meta or node.op == "placeholder":
                break
            node.meta["line"] = line
        return result


def _as_grad_mode_says(found: Any) -> Any:
    """A result as it is, and one that the function makes under ``torch.no_grad`` detached: operators do not tell."""
    return found if torch.is_grad_enabled() else tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, found)


def _is_users(filename: str) -> bool:
    """Whether a file is neither of torch nor of this package."""
    return not filename.startswith((_OF_TORCH, os.path.dirname(__file__), "<a program"))


def _line_of_caller() -> str:
    """The line of the user's that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def index_by_numbers(tensor: Tensor, index: Any) -> Any:
    """``tensor[index]``, in which every number is one of the operator ``aten.index``."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(tensor, Tensor) or not any(isinstance(entry, Tensor) for entry in entries):
        return tensor[index]
    if Ellipsis in [entry for entry in entries if not isinstance(entry, Tensor)]:
        at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (tensor.dim() - len(entries) + 1)
    found: list[Tensor | None] = []
    for axis, entry in enumerate(entries):
        if isinstance(entry, bool) or entry is None or isinstance(entry, (list, str)):
            raise NotUnderstood(f"it indexes a tensor by {entry!r}: expected numbers and slices")
        if isinstance(entry, slice):
            if entry != slice(None):
                tensor = tensor[(slice(None),) * axis + (entry,)]
            found.append(None)
        elif isinstance(entry, Tensor):
            if entry.dtype == torch.bool or entry.is_floating_point():
                raise NotUnderstood(f"it indexes a tensor by a number that is {entry.dtype}: expected an integer")
            found.append(entry)
        else:
            found.append(torch.full((), int(entry), dtype=torch.int32, device=tensor.device))
    if len(found) > tensor.dim():
        raise NotUnderstood(f"it indexes a tensor of {tensor.dim()} axes by {len(found)} numbers")
    return torch.ops.aten.index.Tensor(tensor, found)


# ------------------------------------------------------------------------------------------------------------ the trace


def _trace(kind: Kind, function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Traced:
    name = f"{kind} {getattr(function, '__name__', type(function).__name__)}"
    mode = _Capturing(name)
    names = INDICES if kind == "mask_mod" else ("score", *INDICES)
    numbers = [torch.empty((), dtype=_REAL if n == "score" else torch.int32, device="meta") for n in names]

    def on_numbers(*own: Tensor) -> Tensor:
        mode.adopt(own)
        with mode:
            found = function(*own, *(mode.stand_in(argument) for argument in arguments))
            if isinstance(found, (bool, int, float)):
                found = torch.full((), found, device="meta")
            if not isinstance(found, Tensor):
                raise TypeError(f"{name} returns {type(found).__name__}: expected a number")
            found = mode.adopt(mode.stand_in(found))
            if kind == "mask_mod" and found.dtype != torch.bool:
                raise TypeError(
                    f"{name} returns {found.dtype}: expected a boolean, True where the query may see the key"
                )
            if found.dim():
                raise ValueError(
                    f"{name} returns a tensor of shape {list(found.shape)}: expected one number for one pair of a "
                    "query and a key, which a tensor gives when every axis of it is indexed"
                )
            return found if kind == "mask_mod" else found.to(_REAL)

    try:
        with torch.device("meta"):
            graph = make_fx(on_numbers, decomposition_table=decompositions())(*numbers)
    except NotUnderstood as error:
        raise NotUnderstood(f"{name} cannot be made a program: {error}{_line_of_error()}") from None
    except (TypeError, ValueError) as error:
        if str(error).startswith(name):
            raise
        raise TypeError(f"{name} cannot be traced: {error}{_line_of_error()}") from error
    except Exception as error:
        raise NotUnderstood(f"{name} cannot be made a program: {error}{_line_of_error()}") from error
    captured = [t for t in mode.captured if not any(t is literal for literal in mode.literals)] + mode.literals
    of_placeholder = {id(mode.placeholders[id(t)]): number for number, t in enumerate(captured)}
    try:
        text, prologue = _split(kind, graph, of_placeholder, len(captured))
        check(Program.of(text))
    except NotUnderstood as error:
        raise NotUnderstood(f"{name} cannot be made a program: {error}") from None
    return Traced(text, tuple(captured), len(mode.literals), prologue)


def _line_of_error() -> str:
    """Where in the user's own file the exception that is being handled came from, for a message."""
    frames = [frame for frame in traceback.extract_tb(sys.exc_info()[2]) if _is_users(frame.filename)]
    return f" (line {frames[-1].lineno} of {frames[-1].filename}: {frames[-1].line})" if frames else ""


# -------------------------------------------------------------------------------------------------- splitting the graph


def _split(
    kind: Kind, traced: fx.GraphModule, of_placeholder: dict[int, int], count: int
) -> tuple[str, Callable[..., tuple[Tensor, ...]] | None]:
    """The program of a trace, and its prologue, which makes what the program reads of ``count`` captured tensors."""
    traced.graph.eliminate_dead_code()
    nodes = list(traced.graph.nodes)
    captured: dict[fx.Node, int] = {}
    varying: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            node.meta["val"] = getattr(traced, str(node.target))
            number = of_placeholder[id(node.meta["val"])]
            first = next((other for other, known in captured.items() if known == number), None)
            if first is None:
                captured[node] = number
            else:
                node.replace_all_uses_with(first)
        elif node.op == "placeholder" or any(each in varying for each in node.all_input_nodes):
            varying.add(node)
        elif node.op == "call_function" and not node.all_input_nodes and not node.meta["val"].dim():
            constant.add(node)
    result = nodes[-1].args[0]
    assert isinstance(result, fx.Node)
    inputs: list[fx.Node] = []
    for node in nodes:
        if (node in varying and node.op != "placeholder" and node.op != "output") or node is nodes[-1]:
            inputs += [each for each in node.all_input_nodes if each not in varying and each not in constant]
    inputs = list(dict.fromkeys(inputs))
    if sorted(captured.get(node, -1) for node in inputs) == list(range(count)):
        inputs.sort(key=lambda node: captured[node])
        prologue = None
    else:
        prologue = _prologue(nodes, captured, inputs, varying, count)

    names = INDICES if kind == "mask_mod" else ("score", *INDICES)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    named = {node: f"captured_{number}" for number, node in enumerate(inputs)}
    given = {**dict(zip(placeholders, names)), **named}
    axes = {name: node.meta["val"].dim() for node, name in named.items()}
    arguments = [*names, *(f'{name}: "{described(node.meta["val"])}"' for node, name in named.items())]
    body = [node for node in nodes if node in varying or node in constant]
    return Writer(given, axes).text(kind, arguments, body, [result]), prologue


def _prologue(
    nodes: list[fx.Node], captured: dict[fx.Node, int], inputs: list[fx.Node], varying: set[fx.Node], count: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The nodes that depend on captured tensors alone, as a function of these and of the ``device`` of what it makes
    itself."""
    graph = fx.Graph()
    tensors = [graph.placeholder(f"captured_{number}") for number in range(count)]
    device = graph.placeholder("device")
    copies: dict[fx.Node, fx.Node] = {node: tensors[number] for node, number in captured.items()}
    for node in nodes:
        if node.op == "call_function" and node not in varying:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
            if (
                node.target is torch.ops.aten.view.default
            ):  # placeholders are contiguous, and what is captured may not be
                copies[node].target = torch.ops.aten.reshape.default
            if copies[node].kwargs.get("device") is not None:
                copies[node].kwargs = {**copies[node].kwargs, "device": device}
    graph.output(tuple(copies[node] for node in inputs))
    graph.eliminate_dead_code()
    return fx.GraphModule({}, graph)
