"""Programs: the text that a traced function becomes, its derivative, and what it reads at which places.

A program is a few lines of Python, each one operator of torch on numbers::

    def score_mod(score, batch, head, query_index, key_index, captured_0: "float 1"):
        v0 = aten.sub.Tensor(query_index, key_index)
        v1 = aten.abs.default(v0)
        v2 = read(captured_0, [head])
        v3 = aten._to_copy.default(v1, dtype=torch.float32)
        v4 = aten.mul.Tensor(v2, v3)
        v5 = aten.sub.Tensor(score, v4)
        return v5

Numbers are tensors of one element when it is traced, tensors that broadcast to ``[B, H, L, S]`` when torch runs it, and
tiles in a kernel. Indices are int32; floating numbers are float32, or float64 where the scores are. The text says all
that a kernel is compiled for: neither the sizes of what is captured are in it nor the numbers, but every constant is.
Operators of ``torch.library`` take it as it is, so that a graph that holds it can be run by another process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastattn.ops.attention.functions.vocabulary import decompositions
from fastattn.ops.attention.functions.writing import INDICES, NotUnderstood, Writer, undisturbed

# What stands in the place of query and key in a footprint where a program reads by their difference alone.
DIFFERENCE = "difference"


def read(captured: Any, indices: Sequence[Any]) -> Any:
    """``captured[indices]``, a floating number in at least float32."""
    if isinstance(captured, fx.Proxy):
        return captured.tracer.create_proxy("call_function", read, (captured, list(indices)), {})
    found = torch.ops.aten.index.Tensor(captured, list(indices)) if indices else captured
    return found.to(torch.float32) if found.dtype in (torch.float16, torch.bfloat16) else found


def _executed(text: str) -> Callable[..., Any]:
    """The function that a text defines."""
    namespace: dict[str, Any] = {"aten": torch.ops.aten, "torch": torch, "inf": math.inf, "nan": math.nan, "read": read}
    names = set(namespace)
    exec(compile(text, "<a program of fastattn>", "exec", dont_inherit=True), namespace)
    return next(value for name, value in namespace.items() if name not in names and callable(value))


class View(NamedTuple):
    """A read of a captured tensor, by its number, at plain indices: several of :data:`INDICES`, one for each axis."""

    captured: int
    indices: tuple[str, ...]


class Access(NamedTuple):
    """One place of a program where it reads a captured tensor.

    Attributes:
        captured: the number of the tensor.
        node: the place.
        footprint: the indices, of :data:`INDICES`, that decide what is read; query and key are both in it where only
            their difference matters.
        by_difference: whether only the difference of query and key matters, and not either of them.
    """

    captured: int
    node: fx.Node
    footprint: tuple[str, ...]
    by_difference: bool


class Program:
    """What a text says.

    Attributes:
        text: itself.
        function: itself, of tensors that broadcast.
        name: ``score_mod``, ``mask_mod``, ``gradient``, ``places`` or ``lookup``.
        arguments: the names of what it takes, the captured tensors last.
        kinds: of the captured tensors, what :func:`described` says.
        graph: its operators; ``node.meta["dtype"]`` and ``node.meta["depends"]`` (names of arguments).
        results: the nodes that it returns.
    """

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(text: str) -> Program:
        """The program of a text, made once."""
        with undisturbed():
            return Program(text)

    def __init__(self, text: str) -> None:
        self.text = text
        self.function = function = _executed(text)
        self.name = function.__name__
        self.arguments = tuple(function.__code__.co_varnames[: function.__code__.co_argcount])
        self.kinds = tuple(function.__annotations__.values())
        self.graph = fx.Tracer().trace(function)
        _Typing(fx.GraphModule({}, self.graph), self).run()
        returned = next(iter(reversed(self.graph.nodes))).args[0]
        self.results: tuple[fx.Node, ...] = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)  # type: ignore[arg-type]

    @property
    def captured(self) -> tuple[str, ...]:
        """The names of the captured tensors."""
        return self.arguments[len(self.arguments) - len(self.kinds) :]

    @functools.cached_property
    def accesses(self) -> tuple[Access, ...]:
        """Where it reads captured tensors of floating numbers, which may have gradients."""
        found = []
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is read:
                number = self.captured.index(str(node.args[0]))
                if self.kinds[number].startswith("float"):
                    found.append(_access(number, node))
        return tuple(found)

    def check_places(self) -> None:
        """Raise NotUnderstood where a place that it reads cannot get a gradient."""
        _ = self.accesses

    def depends_on(self, name: str) -> bool:
        """Whether the results may depend on an argument."""
        return any(name in node.meta["depends"] for node in self.results)

    @functools.cached_property
    def reads_by_place(self) -> int:
        """How often it reads a captured tensor where query or key decide what is read."""
        return sum(
            node.target is read and not node.meta["depends"].isdisjoint(("query_index", "key_index"))
            for node in self.graph.nodes
        )

    @functools.cached_property
    def views(self) -> tuple[View, ...]:
        """The reads at plain indices, each once."""
        return tuple(dict.fromkeys(view for view, _ in self._plain_reads))

    @functools.cached_property
    def on_views(self) -> Program:
        """The program that takes, behind its arguments, the elements of every one of :attr:`views`."""
        spelled = {node: f"read(view_{self.views.index(view)}, [])" for view, node in self._plain_reads}
        own = self.arguments[: len(self.arguments) - len(self.kinds)]
        annotated = [f'{name}: "{kind}"' for name, kind in zip(self.captured, self.kinds)]
        more = [f'view_{n}: "{self.kinds[view.captured].split()[0]} 4"' for n, view in enumerate(self.views)]
        return Program.of(printed(self, self.name, [*own, *annotated, *more], self.results, spelled))

    @functools.cached_property
    def _plain_reads(self) -> list[tuple[View, fx.Node]]:
        found = []
        for node in self.graph.nodes:
            if node.target is read and (names := plain_indices(node)):
                found.append((View(self.captured.index(str(node.args[0])), names), node))
        return found

    @functools.cached_property
    def places(self) -> Program:
        """Of the arguments but the score: the indices of every access, one list after the other."""
        own = [f'{name}: "{kind}"' for name, kind in zip(self.captured, self.kinds)]
        indices = [index for access in self.accesses for index in _indices_of(access.node)]
        return Program.of(printed(self, "places", [*INDICES, *own], indices, {}, is_list=True))

    @functools.cached_property
    def gradient(self) -> Program:
        """Of ``d``, the gradient of what ``score_mod`` returns, and of its arguments: the gradients of the score and of
        every number that it reads (:attr:`accesses`), by torch's own rules."""
        with undisturbed():
            text = _gradient_text(self)
        return Program.of(text)


class _Typing(fx.Interpreter):
    """Notes the dtype of each node of a program, and which arguments it depends on."""

    def __init__(self, module: fx.GraphModule, program: Program) -> None:
        super().__init__(module)
        self._program = program

    def run(self) -> Any:  # type: ignore[override]
        return super().run(*numbers(self._program))

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "output":
            return found
        n.meta["dtype"] = found.dtype if isinstance(found, Tensor) else None
        own = {str(n.target)} if n.op == "placeholder" else set()
        inputs = n.all_input_nodes if str(n.target) != "aten.full_like.default" else []  # a constant
        n.meta["depends"] = frozenset(own.union(*(each.meta["depends"] for each in inputs)))
        if is_difference(n):
            n.meta["places"] = frozenset({DIFFERENCE})
        else:
            own &= set(INDICES)
            n.meta["places"] = frozenset(own.union(*(each.meta["places"] for each in inputs)))
        return found


def is_difference(node: fx.Node) -> bool:
    """Whether a node is the difference of query and key, of either sign."""
    names = {str(argument) for argument in node.args}
    return str(node.target) == "aten.sub.Tensor" and names == {"query_index", "key_index"} and not node.kwargs


def numbers(program: Program) -> list[Tensor]:
    """Arguments of a program on the meta device."""
    captured = dict(zip(program.captured, program.kinds))
    found = []
    for name in program.arguments:
        kind, axes = captured.get(name, "int32 0" if name in (*INDICES, "value") else "float 0").split()
        dtype = torch.float32 if kind == "float" else getattr(torch, kind)
        found.append(torch.empty((1,) * int(axes), dtype=dtype, device="meta"))
    return found


def plain_indices(node: fx.Node) -> tuple[str, ...]:
    """The names of the indices at which a node reads, where these are arguments of the program, each at most once, and
    more than one; else none: a few numbers are as soon read by an index."""
    names = tuple(str(index.target) for index in _indices_of(node) if index.op == "placeholder")
    is_plain = len(names) == len(_indices_of(node)) > 1 and len(set(names)) == len(names) and set(names) <= set(INDICES)
    return names if is_plain else ()


def _indices_of(node: fx.Node) -> list[fx.Node]:
    """The indices of a node that reads."""
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    return [index for index in indices if isinstance(index, fx.Node)]


def needed(results: Iterable[fx.Node], until: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that some nodes are computed from, and these; what ``until`` holds is computed from nothing."""
    found: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend([] if node in until else node.all_input_nodes)
    return found


def printed(
    program: Program,
    name: str,
    arguments: Sequence[str],
    results: Sequence[fx.Node],
    spelled: Mapping[fx.Node, str],
    *,
    is_list: bool = False,
) -> str:
    """The text of a part of a program.

    Args:
        program: of which this is a part.
        name: of the part.
        arguments: of the part, with annotations.
        results: the nodes that it computes.
        spelled: expressions that stand in the place of some nodes.
        is_list: whether it returns a list, be it of one result.
    """
    names: dict[fx.Node, str] = {}
    lines: list[str] = []

    def value(each: Any) -> str:
        if isinstance(each, (list, tuple)):
            return f"[{', '.join(map(value, each))}]"
        if isinstance(each, fx.Node):
            return names[each]
        return str(each) if isinstance(each, torch.dtype) else repr(each)

    wanted = needed(results, until=spelled)
    for node in program.graph.nodes:
        if node not in wanted:
            continue
        if node.op == "placeholder":
            names[node] = spelled.get(node, str(node.target))
            continue
        words = (
            [*map(value, node.args), *(f"{key}={value(word)}" for key, word in node.kwargs.items())]
            if node not in spelled
            else []
        )
        called = "read" if node.target is read else str(node.target)
        names[node] = f"v{len(lines)}"
        lines.append(f"{names[node]} = {spelled.get(node) or f'{called}({chr(44).join(words)})'}")
    returned = ", ".join(names[node] for node in results)
    returned = f"[{returned}]" if is_list else f"{returned}," if name == "gradient" else returned
    return "\n    ".join([f"def {name}({', '.join(arguments)}):", *lines, f"return {returned}"]) + "\n"


def _access(number: int, node: fx.Node) -> Access:
    indices = _indices_of(node)
    places = set().union(*(index.meta["places"] for index in indices))
    by_difference = DIFFERENCE in places and not places & {"query_index", "key_index"}
    if DIFFERENCE in places:
        places |= {"query_index", "key_index"}
    if any("score" in index.meta["depends"] for index in indices):
        raise NotUnderstood("it reads a captured tensor at a place that depends on the score")
    return Access(number, node, tuple(name for name in INDICES if name in places), by_difference)


# --------------------------------------------------------------------------------------------------------- the gradient


def _gradient_text(program: Program) -> str:
    """The text of :attr:`Program.gradient`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    accesses = program.accesses
    module = fx.GraphModule({}, program.graph)

    def of_numbers(d: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        plainly = fx.Interpreter(module, garbage_collect_values=False)
        plainly.run(*arguments)
        values = [plainly.env[access.node] for access in accesses]

        def of_reals(score: Tensor, *given: Tensor) -> Tensor:
            known = dict(zip((access.node for access in accesses), given))
            return _Replacing(module, known).run(score, *arguments[1:])

        pullback = torch.func.vjp(of_reals, arguments[0], *values)[1]
        return pullback(d)

    like = torch.empty((), dtype=torch.float32, device="meta")
    graph = make_fx(of_numbers, decomposition_table=decompositions())(like, *numbers(program)).graph
    graph.eliminate_dead_code()
    given = dict(zip((node for node in graph.nodes if node.op == "placeholder"), ("d", *program.arguments)))
    results = next(iter(reversed(graph.nodes))).args[0]
    annotated = [f'{name}: "{kind}"' for name, kind in zip(program.captured, program.kinds)]
    own = program.arguments[: len(program.arguments) - len(annotated)]
    axes = {name: int(kind.split()[1]) for name, kind in zip(program.captured, program.kinds)}
    return Writer(given, axes).text("gradient", ["d", *own, *annotated], graph.nodes, results)  # type: ignore[arg-type]


class _Replacing(fx.Interpreter):
    """Runs a graph with values that are known already in the place of some nodes."""

    def __init__(self, module: fx.GraphModule, known: Mapping[fx.Node, Any]) -> None:
        super().__init__(module)
        self._replaced = known

    def run_node(self, n: fx.Node) -> Any:
        return self._replaced[n] if n in self._replaced else super().run_node(n)
