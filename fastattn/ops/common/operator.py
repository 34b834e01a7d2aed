"""Opaque operators ``torch.ops.fastattn.<name>``, and the autograd Functions over them.

An operator is defined once, by its groups of arguments. Each group is a NamedTuple type: its annotations are the
operator's schema, its fields the names of the arguments. Whatever has one entry for each argument (the arguments
themselves, the dimensions of ``vmap``, ``needs_input_grad``, tangents) is split into the groups, so that an entry is
reached by its name and no code depends on an argument's position.

torch.compile and torch.export do not look inside an operator, and not inside a Function over one.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.flops import add_formula, make_countable
from fastattn.ops.common.tracing import is_functorch_active

# Every device that torch knows: the torch backend is plain torch and needs nothing of a device but torch's operators.
_DEVICES = (
    "cpu", "cuda", "hip", "hpu", "ipu", "lazy", "maia", "mps", "mtia", "privateuseone", "ve", "vulkan", "xla", "xpu",
)  # fmt: skip
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


class ForwardArguments(NamedTuple):
    """The groups of a forward operator's arguments: NamedTuple types in its definition, NamedTuples in a call."""

    inputs: Any  # the tensors
    options: Any  # what a call says beside its tensors


def take(values: Iterable[Any], *kinds: Any) -> list[Any]:
    """Cut a flat sequence into NamedTuples of these types, one after the other."""
    rest = iter(values)
    return [kind(*itertools.islice(rest, len(kind._fields))) for kind in kinds]


def _spelled(hint: Any) -> str:
    """An annotation as it stands in a source."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("torch.Tensor", "Tensor")


class Operator:
    """``torch.ops.fastattn.<name>``: schema, implementation, fake implementation and count of operations.

    Args:
        name: of the operator.
        groups: a NamedTuple such as :class:`ForwardArguments`, of NamedTuple types, whose fields are the arguments.
        results: NamedTuple type of the tensors that it returns.
        run: computes the results, given the groups.
        fake: makes empty tensors like the results, given the groups.
        flops: how many operations a call takes, given the groups, in which a shape stands in each tensor's place;
            None: no counter counts it.
        mutates: the names of tensors among the arguments that a call may write into.

    Raises:
        ValueError: two arguments have one name, or an annotation is none that a schema knows.
    """

    def __init__(
        self,
        name: str,
        groups: Any,
        results: Any,
        *,
        run: Callable[..., Sequence[Tensor]],
        fake: Callable[..., Sequence[Tensor]],
        flops: Callable[..., int] | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        self.groups = groups
        arguments = [item for group in groups for item in typing.get_type_hints(group).items()]
        names = [argument for argument, _ in arguments]
        if len(set(names)) != len(names):
            raise ValueError(f"the operator {name} has arguments of one name: {', '.join(names)}")
        for argument, hint in arguments:
            if hint not in _SCHEMA_TYPES:
                accepted = ", ".join(map(_spelled, _SCHEMA_TYPES))
                raise ValueError(f"{name}: {argument} is annotated {_spelled(hint)}: expected one of {accepted}")
        written = {name: f"Tensor({chr(ord('a') + number)}!)" for number, name in enumerate(mutates)}
        schema = ", ".join(f"{written.get(name, _SCHEMA_TYPES[hint])} {name}" for name, hint in arguments)
        torch.library.define(f"fastattn::{name}", f"({schema}) -> ({', '.join(['Tensor'] * len(results._fields))})")
        self._returns_one = len(results._fields) == 1
        torch.library.impl(f"fastattn::{name}", _DEVICES)(lambda *values: self._returned(run, values))
        torch.library.register_fake(f"fastattn::{name}")(lambda *values: self._returned(fake, values))
        packet = getattr(torch.ops.fastattn, name)
        if flops is not None:
            add_formula(packet, lambda *shapes, **_: flops(*self.split(shapes)))
        self._overload = packet.default

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        """The results, of the arguments one after the other."""
        make_countable()
        found = self._overload(*values)
        return (found,) if self._returns_one else found

    def _returned(self, function: Callable[..., Sequence[Tensor]], values: Iterable[Any]) -> Any:
        """What a function of the groups gives, in torch's form: a single result is a tensor and not a tuple of one."""
        found = tuple(function(*self.split(values)))
        return found[0] if self._returns_one else found

    def split(self, values: Iterable[Any]) -> Any:
        """What has one entry for each argument, as a NamedTuple of the groups."""
        return type(self.groups)(*take(values, *self.groups))

    def join(self, **groups: Sequence[Any]) -> tuple[Any, ...]:
        """One entry for each argument, the opposite of :meth:`split`: gradients, as a Function's backward returns them.

        Args:
            **groups: the entries of a group by the group's name. A group that is not given, and the arguments behind
                the last entry of one that is, get None.
        """
        return tuple(
            entry
            for name, kind in self.groups._asdict().items()
            for entry, _ in itertools.zip_longest(groups.get(name, ()), kind._fields)
        )


class Opaque(torch.autograd.Function):
    """A Function that torch.compile puts into its graphs as it is, once :func:`keep_out_of_graphs` was called there."""


class OperatorFunction(Opaque):
    """A Function whose forward is an operator. Subclasses add the context, and the rules of the transforms.

    The methods are class methods, so that one definition of the rules is shared by several operators.

    One class is for eager mode, ``torch.func`` and torch.compile. Left to itself torch.compile traces a Function's
    methods, and refuses a Function that has a ``jvp``; see :func:`apply` for how it is kept from doing so.
    """

    operator: ClassVar[Operator]
    _untransformed: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "operator" in vars(cls):
            cls._untransformed = _untransformed(cls)

    @classmethod
    def apply(cls, *values: Any) -> Any:
        """The results of the operator, of its arguments one after the other, as a node of autograd's graph.

        ``torch.func`` needs a Function with a ``setup_context``. For such a Function torch binds the arguments to the
        signature of ``forward`` by ``inspect`` on every call, which takes longer than a small kernel. Where no
        transform is active, the form without it runs.
        """
        function: Any = cls if is_functorch_active() else cls._untransformed
        return super(OperatorFunction, function).apply(*values)

    @classmethod
    def forward(cls, *values: Any) -> tuple[Tensor, ...]:
        return cls.operator(*values)


def _untransformed(function: type[OperatorFunction]) -> type[torch.autograd.Function]:
    """The same Function in the form whose ``forward`` is handed the context, and which has no ``setup_context``."""

    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        output = function.operator(*values)
        function.setup_context(ctx, values, output)
        return output

    methods = {"forward": staticmethod(forward), "setup_context": staticmethod(torch.autograd.Function.setup_context)}
    return type(function)(function.__name__, (function,), {**methods, "__module__": function.__module__})


def apply(function: type[OperatorFunction], *groups: Sequence[Any]) -> Any:
    """The results of a Function over an operator, given the operator's groups of arguments."""
    if torch.compiler.is_compiling():
        keep_out_of_graphs()
    return function.apply(*(value for group in groups for value in group))


def keep_out_of_graphs() -> bool:
    """Have torch.compile put every :class:`Opaque` into its graphs as it is, instead of tracing through its methods.

    ``torch.compiler.allow_in_graph`` does that. It imports torch._dynamo, a second's work and triton with it, which
    importing this package must not do; so it is called when a call of ours is first compiled.
    """
    for function in _all_subclasses(Opaque):
        torch.compiler.allow_in_graph(function)
    return True


# What torch.compiler.assume_constant_result sets, spelled out because that function imports torch._dynamo: the tracer
# then runs the function, here for its effect, and takes what it returns for a constant.
keep_out_of_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _all_subclasses(kind: type) -> list[type]:
    return [found for child in kind.__subclasses__() for found in (child, *_all_subclasses(child))]


# ----------------------------------------------------------------------------------------------------------------- vmap


def looped(
    function: type[OperatorFunction], info: Any, in_dims: Sequence[Any], values: Sequence[Any], out_dims: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """A ``vmap`` rule: one call a sample, stacked along ``out_dims``. A result whose dimension is None is an empty
    placeholder."""
    samples = [[a if d is None else a.select(d, i) for a, d in zip(values, in_dims)] for i in range(info.batch_size)]
    if not samples:  # a call on zeros has the shapes of the results, whose dimension of samples is then made empty
        samples = [[a if d is None else torch.zeros_like(a.sum(d)).to(a.dtype) for a, d in zip(values, in_dims)]]
    columns = zip(zip(*(function.apply(*sample) for sample in samples)), out_dims)
    return tuple(
        column[0] if dim is None else torch.stack(column, dim).narrow(dim, 0, info.batch_size)
        for column, dim in columns
    ), tuple(out_dims)
