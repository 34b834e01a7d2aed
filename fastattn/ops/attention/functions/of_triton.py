"""``@triton.jit`` functions as functions that can be traced: the words of ``tl`` in torch, and tensors as pointers.

So one source of either kind runs on every backend and is differentiated. The function's source is executed with a
namespace of torch's functions in the place of ``tl``; the tensors that it takes are pointers to their elements in
order, which ``tl.load`` reads. Where Triton's arithmetic is not Python's, division and remainder of integers that round
towards zero, the source is rewritten.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.functions.writing import NotUnderstood


def is_of_triton(function: Any) -> bool:
    """Whether this is a ``@triton.jit`` function, compiled or interpreted. Triton need not be imported."""
    return type(function).__module__.startswith("triton.") and hasattr(function, "fn")


class _Pointer:
    """A tensor's elements in order, from an offset on."""

    def __init__(self, elements: Tensor, offset: Any = 0) -> None:
        self._elements = elements
        self._offset = offset

    def __add__(self, more: Any) -> _Pointer:
        return _Pointer(self._elements, self._offset + more)

    __radd__ = __add__

    def load(self) -> Tensor:
        """The element that it points to."""
        return self._elements[self._offset]


def _load(pointer: Any, mask: Any = None, other: Any = 0, **hints: Any) -> Tensor:
    if not isinstance(pointer, _Pointer):
        raise NotUnderstood("tl.load of something that is no pointer to a tensor that the function takes")
    if mask is None:
        return pointer.load()
    inside = _Pointer(pointer._elements, torch.where(mask, pointer._offset, 0))
    return torch.where(mask, inside.load(), other)


def _both(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of two tensors, either of which may be a number."""
    return lambda a, b, **hints: function(torch.as_tensor(a), torch.as_tensor(b))


def _divided(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="trunc") if isinstance(a, Tensor) or isinstance(b, Tensor) else a // b


def _remainder(a: Any, b: Any) -> Any:
    return torch.fmod(a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else a % b


_UNARY = ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "rsqrt", "sigmoid", "sin", "sqrt")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
_WORDS: dict[str, Any] = {
    **{name: getattr(torch, name) for name in (*_UNARY, *_DTYPES)},
    "int1": torch.bool,
    "cast": lambda x, dtype: x.to(dtype),
    "clamp": lambda x, low, high, **hints: torch.clamp(x, low, high),
    "constexpr": lambda x: x,
    "div_rn": lambda a, b: a / b,
    "fdiv": lambda a, b, **hints: a / b,
    "fma": lambda a, b, c: a * b + c,
    "full": lambda shape, value, dtype: torch.full((), value, dtype=dtype, device="cpu"),
    "load": _load,
    "maximum": _both(torch.maximum),
    "minimum": _both(torch.minimum),
    "sqrt_rn": torch.sqrt,
    "where": torch.where,
    "zeros_like": torch.zeros_like,
}
_OF_LIBDEVICE = ("tanh", "log1p", "expm1", "sinh", "cosh", "tan", "pow", "round", "trunc", *_UNARY)


class Language:
    """``tl``: its words that have a form in torch."""

    def __init__(self, path: str = "tl") -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name in ("math", "extra", "cuda", "hip", "libdevice"):
            return Language(f"{self._path}.{name}")
        if self._path.endswith("libdevice") and name in _OF_LIBDEVICE:
            return getattr(torch, name)
        if name not in _WORDS:
            raise NotUnderstood(f"{self._path}.{name} has no form in torch")
        return _WORDS[name]


class _Rounding(ast.NodeTransformer):
    """Division and remainder as calls of functions that round towards zero."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = None
        if isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            name = "_divided" if isinstance(node.op, ast.FloorDiv) else "_remainder"
        if name is None:
            return node
        call = ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])
        return ast.copy_location(call, node)


@functools.lru_cache(maxsize=1024)
def in_torch(function: Any, numbers: int) -> Callable[..., Any]:
    """A ``@triton.jit`` function of so many numbers, and of pointers behind them, as a function of tensors."""
    plain = _translated(function)

    def of_tensors(*arguments: Any) -> Any:
        pointers = (_Pointer(tensor.reshape(-1)) for tensor in arguments[numbers:])
        return plain(*arguments[:numbers], *pointers)

    of_tensors.__name__ = function.fn.__name__
    return of_tensors


def _translated(function: Any) -> Callable[..., Any]:
    source = textwrap.dedent(inspect.getsource(function.fn))
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for argument in definition.args.args:
        argument.annotation = None
    tree = ast.fix_missing_locations(_Rounding().visit(tree))
    ast.increment_lineno(tree, function.fn.__code__.co_firstlineno - 1)
    named: dict[str, Any] = {}
    for name, value in function.fn.__globals__.items():
        if isinstance(value, ModuleType) and value.__name__.startswith("triton.language"):
            named[name] = Language(value.__name__.replace("triton.language", "tl"))
        elif is_of_triton(value) and value is not function and name in function.fn.__code__.co_names:
            named[name] = _translated(value)
        elif isinstance(value, (bool, int, float)) or type(value).__name__ == "constexpr":
            named[name] = getattr(value, "value", value)
    named.update(_divided=_divided, _remainder=_remainder)
    exec(compile(tree, function.fn.__code__.co_filename, "exec"), named)
    return named[function.fn.__name__]
