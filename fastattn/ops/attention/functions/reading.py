"""What the trace of a function depends on, found without running it.

The trace depends on the function's code, on the numbers and strings that it reaches, and on the dtypes and shapes of
the tensors. :class:`Reading` walks through closures, defaults, globals, containers, modules, classes and objects, of
which it looks at the attributes that some code on the way names. The world is closed: what is not known to be read in
full (``getattr``, imports inside of the function, classes with their own attribute access, subclasses of containers,
iterators) makes the function one that is traced at every call.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import types
import typing
from abc import ABC
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.ops.attention.functions.of_triton import Language

_LARGEST = 64  # of a container whose items are looked at
_DEPTH = 24
# Names by which code reaches what no name tells of.
_OPEN = frozenset({
    "getattr", "setattr", "vars", "globals", "locals", "eval", "exec", "compile", "open", "input", "__import__",
    "__dict__", "__getattribute__", "__getattr__", "__closure__", "__code__", "__globals__", "__subclasses__",
    "import_module", "_getframe",
})  # fmt: skip
_CONSTANTS = (type(None), type(Ellipsis), type(NotImplemented))
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice, range, *_CONSTANTS)
_STABLE = ("torch", "math", "cmath", "builtins", "operator", "functools", "typing", "enum", "abc", "fastattn")
# Methods of an object that no operation on it calls.
_UNCALLED = frozenset({
    "__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__", "__repr__", "__str__",
    "__format__", "__del__", "__setattr__", "__delattr__", "__reduce__", "__reduce_ex__", "__getstate__",
    "__setstate__", "__sizeof__", "__dir__", "__replace__",
})  # fmt: skip
_PLAIN_BASES = (object, types.SimpleNamespace, ABC, typing.Generic, typing.Protocol)
_OF_MODULES = frozenset({"forward", "training", "_forward_hooks", "_forward_pre_hooks"})


class _Mentioned(NamedTuple):
    """What a function's code, and the code of the functions inside it, names."""

    names: frozenset[str]
    variables: tuple[str, ...]
    imports: bool


class Reading:
    """What the trace of a function depends on.

    Attributes:
        parts: the key, to which no tensor's numbers belong.
        tensors: those that the function can reach.
        identities: objects that are compared by identity.
    """

    def __init__(self) -> None:
        self._names: frozenset[str] = frozenset()
        self._start()

    def _start(self) -> None:
        self.parts: list[Hashable] = []
        self.tensors: list[Tensor] = []
        self.identities: list[Any] = []
        # what was met, by its identity; it is kept alive, so that nothing else gets that identity meanwhile
        self._seen: dict[int, tuple[int, Any]] = {}
        self._looked_up: frozenset[str] | None = None

    def read(self, value: Any) -> bool:
        """Add what a value is; False if that cannot be told."""
        while True:
            self._start()
            if not self._read(value, 0):
                return False
            # an object is read by the names that were known when it was met
            if self._looked_up is None or self._looked_up == self._names:
                return True

    def _read(self, value: Any, depth: int) -> bool:
        if isinstance(value, _VALUES) and not isinstance(value, enum.Enum):
            self.parts.append((type(value), repr(value) if isinstance(value, (slice, float, complex)) else value))
            return type(value).__module__ in ("builtins", "torch")
        if depth > _DEPTH:
            return False
        if id(value) in self._seen:
            self.parts.append(("again", self._seen[id(value)][0]))
            return True
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Tensor):
            if not all(isinstance(size, int) for size in value.shape):
                return False  # a graph leaves it open
            self.tensors.append(value)
            self.parts.append((value.dtype, value.shape, value.layout, value.device.type == "meta"))
            return True
        if isinstance(value, types.FunctionType):
            return self._read_function(value, depth)
        if isinstance(value, types.MethodType):
            return self._read_all((value.__func__, value.__self__), depth)
        if isinstance(value, types.BuiltinFunctionType):
            of_module = value.__self__ is None or isinstance(value.__self__, types.ModuleType)
            return self._is(value) and (of_module or self._read(value.__self__, depth + 1))
        if type(value) is functools.partial:
            self.parts.append((functools.partial, len(value.args), *value.keywords))
            return self._read_all((value.func, *value.args, *value.keywords.values()), depth)
        if type(value) in (tuple, list):
            self.parts.append((type(value), len(value)))
            return len(value) <= _LARGEST and self._read_all(value, depth)
        if type(value) in (dict, collections.OrderedDict):
            self.parts.append((type(value), len(value)))
            return len(value) <= _LARGEST and self._read_all((each for item in value.items() for each in item), depth)
        if isinstance(value, (staticmethod, classmethod)):
            return self._read(value.__func__, depth + 1)
        if isinstance(value, property):
            return self._read(value.fget, depth + 1)
        if isinstance(value, functools.cached_property):
            return self._read(value.func, depth + 1)
        if isinstance(value, functools._lru_cache_wrapper):
            return self._read(value.__wrapped__, depth + 1)
        if isinstance(value, types.ModuleType):
            return self._is(value) and (_is_stable(value.__name__) or self._read_named(vars(value), depth))
        if isinstance(value, type):
            return self._read_class(value, depth, is_called=True)
        if isinstance(value, (enum.Enum, types.MethodDescriptorType, types.WrapperDescriptorType, Language)):
            return self._is(value)
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return self._is(value)
        return self._read_object(value, depth)

    def _read_all(self, values: Iterable[Any], depth: int) -> bool:
        return all(self._read(value, depth + 1) for value in values)

    def _is(self, value: Any) -> bool:
        """Add a value that is what it is as long as it lives."""
        self.identities.append(value)
        self.parts.append(("is", id(value)))
        return True

    def _read_named(self, held: dict[str, Any], depth: int) -> bool:
        """The attributes of something that are named anywhere; ``read`` comes back if there are more names later."""
        self._looked_up = self._names if self._looked_up is None else self._looked_up
        for name in sorted(self._names & held.keys()):
            self.parts.append(name)
            if not self._read(held[name], depth + 1):
                return False
        return True

    def _read_function(self, function: types.FunctionType, depth: int) -> bool:
        is_ours = (function.__module__ or "").partition(".")[0] == "fastattn"
        if _is_stable(function.__module__) and not (is_ours and function.__closure__):
            return self._is(function)  # ours that have a closure carry a function of the user's in it
        mentioned = _mentioned(function.__code__)
        if mentioned.imports or mentioned.names & _OPEN:
            return False
        self._names |= mentioned.names
        self.identities.append(function.__code__)
        self.parts.append(("code", id(function.__code__)))
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a name that has no value yet
            return False
        self.parts.append((len(function.__defaults__ or ()), *(function.__kwdefaults__ or {})))
        values = (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not self._read_all(values, depth):
            return False
        builtins: Any = function.__builtins__  # pyrefly: ignore[missing-attribute]
        for name in mentioned.variables:
            where = next((each for each in (function.__globals__, builtins) if name in each), None)
            self.parts.append(name)
            if where is not None and not self._read(where[name], depth + 1):
                return False
        return not function.__dict__ or self._read_named(vars(function), depth)

    def _read_class(self, kind: type, depth: int, *, is_called: bool) -> bool:
        """A class: what is named of its own, and the methods that operations call."""
        self._is(kind)
        if _is_stable(kind.__module__):
            return True
        if isinstance(kind, enum.EnumMeta):  # its members stay as they are
            return True
        for base in kind.__mro__:
            if _is_stable(base.__module__) or base in _PLAIN_BASES:
                continue
            own = dict(vars(base))
            for name, value in own.items():
                is_operation = name.startswith("__") and isinstance(
                    value, (types.FunctionType, staticmethod, classmethod, property)
                )
                is_wanted = name not in self._names and is_operation and (is_called or name not in _UNCALLED)
                if is_wanted and not self._read(value, depth + 1):
                    return False
            if any(isinstance(own[name], types.MemberDescriptorType) for name in self._names & own.keys()):
                return False  # an attribute in a slot, which is in no dictionary
            if not self._read_named(own, depth):
                return False
        return True

    def _read_object(self, value: Any, depth: int) -> bool:
        kind = type(value)
        is_module = isinstance(value, nn.Module)
        own_access = kind.__getattribute__ is not object.__getattribute__ or hasattr(kind, "__getattr__")
        plain = all(base.__flags__ & _HEAP or base in _PLAIN_BASES for base in kind.__mro__)
        if (own_access and not is_module) or not plain or type(kind) not in _METACLASSES:
            return False
        if not hasattr(value, "__dict__") or (_is_stable(kind.__module__) and not is_module):
            return False
        held = dict(vars(value))
        if is_module:
            self._names |= _OF_MODULES
            for group in ("_parameters", "_buffers", "_modules"):
                held.update(held.pop(group))
            if _is_stable(kind.__module__):  # whose code is not read
                self._names |= {name for name in held if not name.startswith("_")}
        self.identities.append(kind)
        return self._read_class(kind, depth, is_called=False) and self._read_named(held, depth)


_HEAP = 1 << 9  # the flag of a class that a `class` statement made
_METACLASSES = (type, type(ABC), type(typing.Protocol))


def _is_stable(module: Any) -> bool:
    """Whether this is the name of a module of a package that does not change."""
    return isinstance(module, str) and module.partition(".")[0] in _STABLE


@functools.lru_cache(maxsize=1024)
def _mentioned(code: types.CodeType) -> _Mentioned:
    names, variables, imports = set(code.co_names), {}, False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables[instruction.argval] = None
        imports |= instruction.opname == "IMPORT_NAME"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _mentioned(constant)
            names |= inner.names
            variables.update(dict.fromkeys(inner.variables))
            imports |= inner.imports
        elif isinstance(constant, str):
            names.update(part for part in constant.split(".") if part.isidentifier())
    return _Mentioned(frozenset(names), tuple(variables), imports)
