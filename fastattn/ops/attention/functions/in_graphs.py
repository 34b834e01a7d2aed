"""Calls with functions inside ``torch.compile``: Dynamo traces the functions, and a higher-order operator that does not
stay in the graph makes programs of what it traced.

Dynamo follows Python code, and what a function captures may be a value of the graph that is being traced. So the
functions are handed to a higher-order operator: for such a one Dynamo traces a body to a graph of its own, and makes
what the body captures its operands. The body calls the functions on marked numbers and marks what they return. Whenever
the operator is then called, by Dynamo for the results' shapes and by AOTAutograd, which traces what it does, it makes
programs of the marked parts and runs the ordinary operators of attention: these alone are in the graph that is
compiled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.variables import higher_order_ops as dynamo_operators
from torch._higher_order_ops.base_hop import BaseHOP
from torch.overrides import TorchFunctionMode

from fastattn.ops.attention import on_torch, on_triton
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.functions.call import check_function
from fastattn.ops.attention.functions.contract import ModifiedInputs
from fastattn.ops.attention.functions.lookups import extent_of
from fastattn.ops.attention.functions.tracing import index_by_numbers
from fastattn.ops.attention.functions.writing import INDICES
from fastattn.ops.attention.operator import Modified, operands
from fastattn.ops.common import backends
from fastattn.ops.common.operator import apply

_KINDS = ("score_mod", "mask_mod")

# Marks in a traced body. They are never computed.
torch.library.define("fastattn::argument", "(str name, Tensor like) -> Tensor")
torch.library.define("fastattn::returned", "(str kind, Tensor value, Tensor like) -> Tensor")
torch.library.register_fake("fastattn::argument")(
    lambda name, like: torch.empty((), dtype=torch.float32 if name == "score" else torch.int32, device=like.device)
)
torch.library.register_fake("fastattn::returned")(lambda kind, value, like: like.new_empty(value.shape))


class _Indexing(TorchFunctionMode):
    """``tensor[index]`` with numbers of the trace among the indices is the operator ``aten.index``: Python would ask
    for the numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ or func is operator.getitem:
            return index_by_numbers(*args)
        return func(*args, **(kwargs or {}))


def run(call: AttentionCall, score_mod: Any, mask_mod: Any, backend: backends.Backend | None) -> Any:
    """The results of a call with these functions, for Dynamo to trace.

    Args:
        call: the validated call without them.
        score_mod: a function of the user's, or a tuple of one and of tensors; None: none.
        mask_mod: likewise.
        backend: the backend that is asked for.
    """
    utils: Any = torch._dynamo.utils
    utils._disable_side_effect_safety_checks_for_current_subtracer(_touch_modes)
    words = {name: value for name, value in call._asdict().items() if name not in _KINDS}
    body = functools.partial(_body, call, score_mod, mask_mod)
    return _dissolving(body, backend=backend, **words)


def _touch_modes() -> None:
    """Dynamo notes once a frame that the stack of modes was changed, and refuses to note it inside a body."""
    with _Indexing():
        pass


def _body(call: AttentionCall, score_mod: Any, mask_mod: Any) -> tuple[Tensor, ...]:
    """What Dynamo traces in the place of a call: the functions between marks, and a call that has the results' shapes
    and wants gradients where the functions do."""
    like = call.query
    inputs, options = operands(call, None, "torch", keeps_statistics=True)
    marked: dict[str, Any] = {}
    for kind, function, slot in (("score_mod", score_mod, "captured_0"), ("mask_mod", mask_mod, "read_0")):
        if function is not None:
            function, *rest = function if isinstance(function, tuple) else (function,)
            names = INDICES if kind == "mask_mod" else ("score", *INDICES)
            numbers = [torch.ops.fastattn.argument(name, like) for name in names]
            with _Indexing():
                value = function(*numbers, *rest)
                if not isinstance(value, Tensor):
                    value = torch.full((), value, device=like.device)
            marked[slot] = torch.ops.fastattn.returned(kind, value, like)
    empty = dict.fromkeys(name for name in ModifiedInputs._fields if name not in inputs._fields)
    found = apply(Modified, ModifiedInputs(**inputs._asdict(), **{**empty, **marked}), options)
    return _returned(call, found[0], found[2], found[1])


def _returned(call: AttentionCall, output: Tensor, weights: Tensor | None, lse: Tensor | None) -> tuple[Tensor, ...]:
    """The results that a call returns."""
    asked = ((output, True), (weights, call.weights != "none"), (lse, call.return_lse))
    return tuple(tensor for tensor, is_asked in asked if is_asked and tensor is not None)


class _Dissolving(BaseHOP):
    """The higher-order operator; see the module."""

    def __init__(self) -> None:
        super().__init__("fastattn_modified")

    def __call__(self, body: Any, *given: Any, backend: Any, **words: Any) -> Any:
        call = AttentionCall(**words)
        if isinstance(body, fx.GraphModule):
            functions = _functions(body, given, call)
        else:  # behind a break of the graph: nothing was traced
            _, score_mod, mask_mod = body.args
            functions = {kind: f for kind, f in zip(_KINDS, (score_mod, mask_mod)) if f is not None}
        extent = extent_of(call.query, call.key)
        checked: dict[str, Any] = {}
        for kind, function in functions.items():
            checked[kind] = check_function(kind, function, call.query, extent)
        call = call._replace(**checked)
        chosen = backends.choose(call, backend, on_triton.refusals)
        return _returned(call, *(on_triton if chosen == "triton" else on_torch).run(call))


_dissolving = _Dissolving()


class _DissolvingVariable(dynamo_operators.BaseHOPVariable):
    """The operator in Dynamo. Its operands may be views of one tensor, as query, key and value of a packed projection
    are: nothing of it stays in the graph but operators that take such."""

    supports_aliasing = True


# Dynamo knows a class for each operator of torch's, and takes one without this property for all others.
dynamo_operators._hop_name_to_variable_class[_dissolving.__name__] = _DissolvingVariable


# ------------------------------------------------------------------------------------------------ functions of a body


class _Later:
    """Stands for a value that depends on the marked numbers, or on nothing."""


class _Known(fx.Interpreter):
    """Runs a body on its operands: what does not depend on the marked numbers is computed, by ordinary operators, with
    autograd. ``item()`` of a tensor is the tensor, so that a number that Dynamo made an input stays one."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output" or _name(n) == "fastattn.returned":
            return None
        is_later = _name(n) == "fastattn.argument"
        if is_later or any(self.env[each] is _Later for each in n.all_input_nodes):
            return _Later
        if n.op == "call_function" and not n.all_input_nodes:
            found = super().run_node(n)
            # a program has constant numbers itself; what has axes belongs to the graph, where it is made
            return found if isinstance(found, Tensor) and found.dim() else _Later
        return super().run_node(n)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0].detach() if target == "item" else super().call_method(target, args, kwargs)


class _Rest(fx.Interpreter):
    """Runs what depends on the marked numbers."""

    def __init__(self, body: fx.GraphModule, known: dict[fx.Node, Any], wanted: fx.Node) -> None:
        super().__init__(body, garbage_collect_values=False)
        self._nodes = list(body.graph.nodes)
        self._known = known
        self._wanted = wanted

    def value(self) -> Any:
        """What a function returns."""
        with _Indexing():
            for node in self._nodes:  # all of them: one that nobody reads may write
                self.env[node] = self._known[node] if node in self._known else self.run_node(node)
                if node is self._wanted:
                    break
        return self.env[self._wanted]


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if node.op == "call_function" else ""


def _functions(body: fx.GraphModule, given: tuple[Any, ...], call: AttentionCall) -> dict[str, Any]:
    """The functions of a traced body, by their kinds: each a tuple of one and of the tensors that it takes."""
    known = _Known(body, garbage_collect_values=False)
    known.run(*given)
    return dict(_each_function(body, known.env, call))


def _each_function(body: fx.GraphModule, values: dict[fx.Node, Any], call: AttentionCall) -> Iterator[tuple[str, Any]]:
    arguments: list[fx.Node] = []
    for node in body.graph.nodes:
        if _name(node) == "fastattn.argument":
            arguments.append(node)
        elif _name(node) == "fastattn.returned":
            kind, wanted = node.args[:2]
            assert isinstance(kind, str) and isinstance(wanted, fx.Node)
            yield kind, _function(body, values, arguments, wanted, call.device)
            arguments = []


def _function(
    body: fx.GraphModule, values: dict[fx.Node, Any], arguments: list[fx.Node], wanted: fx.Node, device: torch.device
) -> tuple[Any, ...]:
    """The function of the ``arguments`` that gives the ``wanted`` node, with the tensors that it takes behind them."""
    captured, plain = [], {}
    for node, value in values.items():
        if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            captured.append(node)
        elif value is not _Later:
            plain[node] = value

    def function(*numbers: Any) -> Any:
        tensors = dict(zip(captured, numbers[len(arguments) :]))
        return _Rest(body, {**plain, **tensors, **dict(zip(arguments, numbers))}, wanted).value()

    return (function, *(_as_tensor(values[node], device) for node in captured))


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    """A number that a graph leaves open, as a tensor."""
    if isinstance(value, Tensor):
        return value
    dtype = {torch.SymInt: torch.int64, torch.SymFloat: torch.float32, torch.SymBool: torch.bool}[type(value)]
    return torch.scalar_tensor(value, dtype=dtype, device=device)
