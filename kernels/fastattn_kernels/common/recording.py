"""Recording a call: what it allocates, which operators of torch it calls and which kernels it launches.

:class:`Recording` watches a call, and stands in the place of its tensors numbers (:class:`Slot`). What it has seen are
its steps, of which ``plans`` writes a function that repeats them with other tensors.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OF_LAUNCH = ("num_warps", "num_ctas", "num_stages", "maxnreg")  # options, which are no arguments of a kernel


class Slot(NamedTuple):
    """Stands in a recording in the place of a tensor. The inputs have the first numbers, and the tensors that the call
    makes have the next ones, in order."""

    number: int


class View(NamedTuple):
    """A tensor in the memory of another, so many bytes behind its beginning."""

    base: int
    offset: int


class Made(NamedTuple):
    """Memory was allocated."""

    made: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Called(NamedTuple):
    """An operator of torch was called."""

    operator: Any
    arguments: Any
    keywords: Any
    results: tuple[int, ...]
    is_many: bool  # the operator returns a sequence, be it of one tensor
    is_view: bool


class Launched(NamedTuple):
    """A kernel was launched."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    device: torch.device
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Recording(TorchDispatchMode):
    """Records what is done to tensors while it is the current mode of this thread.

    Attributes:
        steps: what was done, in order.
        inputs: the tensors of the call that is recorded.
        flaw: why the call cannot be repeated with other tensors; None where it can.
        views: the tensors that lie in the memory of others, by number.
        numbers: how many tensors have one.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.steps: list[Made | Called | Launched] = []
        self.flaw: str | None = None
        self._watched: list[weakref.ref[Tensor]] = []  # tells of the end of tensors, whose ids others get
        self.numbers = 0
        self._numbers: dict[int, int] = {}
        self.views: dict[int, View] = {}
        self.inputs = tuple(inputs)
        for tensor in self.inputs:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> int:
        number, self.numbers = self.numbers, self.numbers + 1
        self._name(tensor, number)
        return number

    def _name(self, tensor: Tensor, number: int) -> None:
        name = id(tensor)
        self._numbers[name] = number
        self._watched.append(weakref.ref(tensor, lambda _: self._numbers.pop(name, None)))

    def slots(self, value: Any) -> Any:
        """``value`` with slots in the place of tensors."""
        if isinstance(value, Tensor):
            number = self._numbers.get(id(value))
            if number is None:
                self.flaw = self.flaw or f"a tensor of the shape {tuple(value.shape)} comes from outside the call"
                return None
            return Slot(number)
        if isinstance(value, tuple):
            return tuple_like(value, map(self.slots, value))
        if isinstance(value, list):
            return list(map(self.slots, value))
        if hasattr(value, "base") and hasattr(value, "block_shape"):
            return Descriptor.of(value, self.slots(value.base))
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_many = isinstance(result, (tuple, list))
        results = result if is_many else (result,)
        if not all(isinstance(each, Tensor) for each in results):
            if any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
                self.flaw = self.flaw or f"{func} looks at the numbers of a tensor"
            return result
        before = [self._numbers.get(id(each)) for each in results]
        if func is torch.ops.aten.detach.default and (number := self._numbers.get(id(args[0]))) is not None:
            self._name(result, number)  # another object for the same tensor, as torch.empty makes one
            return result
        arguments, keywords = self.slots(args), {name: self.slots(value) for name, value in kwargs.items()}
        numbers = tuple(self._add(each) if number is None else number for each, number in zip(results, before))
        if _only_allocates(func):
            self.steps.append(Made(numbers[0], tuple(result.shape), result.stride(), result.dtype, result.device))
            return result
        is_view = func.is_view and isinstance(arguments[0], Slot)
        if is_view:
            base, offset = self.views.get(arguments[0].number, View(arguments[0].number, 0))
            for number, each in zip(numbers, results):
                self.views[number] = View(base, offset + each.data_ptr() - args[0].data_ptr())
        self.steps.append(Called(func, arguments, keywords, numbers, is_many, is_view))
        return result

    def launched(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], device_of: Tensor, arguments: Any, constants: Any
    ) -> None:
        """Record a launch."""
        bound = inspect.signature(kernel.fn).bind(
            *arguments, **{name: value for name, value in constants.items() if name not in OF_LAUNCH}
        )
        bound.apply_defaults()
        in_order = tuple(map(self.slots, bound.arguments.values()))
        self.steps.append(
            Launched(kernel, compiled, tuple(map(int, grid)), device_of.device, in_order, dict(constants))
        )


def _only_allocates(operator: Any) -> bool:
    return operator.overloadpacket in (
        torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided, torch.ops.aten.empty_permuted,
    )  # fmt: skip


class Descriptor(NamedTuple):
    """A tensor map as Triton's launcher reads it, without the checks that a ``TensorDescriptor`` makes at its birth."""

    base: Any
    shape: Any
    strides: Any
    block_shape: Any
    layout: Any
    padding: str
    round_f32_to_tf32: bool
    kind: type

    @classmethod
    def of(cls, descriptor: Any, base: Any) -> Descriptor:
        """As ``descriptor``, of another tensor."""
        fields = (getattr(descriptor, name, False) for name in cls._fields[1:-1])
        return cls(base, *fields, type(descriptor))


def tuple_like(kind: tuple[Any, ...], parts: Iterable[Any]) -> tuple[Any, ...]:
    """These parts in a tuple of the same kind: the fields of a NamedTuple have names, by which kernels read them."""
    return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
