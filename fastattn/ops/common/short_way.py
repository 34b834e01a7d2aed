"""The short way of a call that nothing traces or transforms: from the public function to the kernels at once.

The long way checks every argument, chooses a backend, enters an operator through torch's dispatcher and binds it to
autograd; for a call of a few hundred rows this takes several times longer than its kernels. What it finds out depends
on the call's signature alone: on its tensors' shapes, strides, dtypes and devices, and on its other arguments. So where
the kernels ran the first call of a signature, the second is recorded as a plan (``fastattn_kernels.common.plans``), the
checks included, and every later one takes the short way: it runs the plan, which allocates, launches and returns. Where
gradients are wanted, one Function of autograd stands around the plan, and its backward is a plan as well.

Whatever looks at a call takes the long way, and every call where it might: torch.compile, ``torch.jit.trace``,
``torch.func``, forward mode, modes of dispatch and of torch functions, hooks on saved tensors, and tensors of other
classes. So does a backward that is itself differentiated.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _autograd, _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastattn.ops.common import backends
from fastattn.ops.common.tracing import is_functorch_active

MOST_ENTRIES = 1024  # signatures of one function; beyond, the oldest is forgotten
_PLAIN = (Tensor, Parameter)
_WORDS = {bool, int, float, str, torch.dtype, type(None)}  # arguments that say all by their value


def is_looked_at() -> bool:
    """Whether something traces, transforms or watches what is called now."""
    return (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack() > 0
        or (_len_torch_function_stack() > 0 and _has_watching_mode())
        or is_functorch_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def is_plain(value: Any) -> bool:
    """Whether this is a tensor of torch's own class, and not one that overloads what is done to it."""
    return type(value) in _PLAIN


def lies_with_kernels(first: Any) -> bool:
    """Whether a call whose first tensor this is may reach the kernels at all. A caller asks before it puts together
    what :meth:`ShortWay.key` wants: on a CPU that would take a tenth of a small norm's time, for nothing."""
    return type(first) in _PLAIN and first.device.type in backends.DEVICES


def _has_watching_mode() -> bool:
    """Whether one of the modes of torch functions is more than ``torch.set_default_device``, which our calls, that name
    their device everywhere, do not depend on."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _key_of(value: Any) -> Hashable:
    """What of an argument decides what a call does: of a tensor all but its numbers and its address.

    Raises:
        TypeError: it is a tensor of another class, or one whose numbers do not stand in its memory as they are. torch
            writes the latter out before it enters an operator; a plan would hand their memory to a kernel.
    """
    if type(value) in _PLAIN:
        address = value.data_ptr()
        if not address or value.is_neg():  # tensors of zeros may have no memory, imaginary parts the opposite sign
            raise TypeError("a tensor without memory, or one that is negated when it is read, takes the long way")
        # Triton compiles another kernel for addresses that are no multiples of 16
        return value.shape, value.stride(), value.dtype, value.device, address & 15 == 0, value.requires_grad
    if value is None:
        return None
    if isinstance(value, Tensor):
        raise TypeError(f"a tensor of the class {type(value).__name__} takes the long way")
    if isinstance(value, tuple):
        return tuple(map(_key_of, value))
    return type(value), value  # 1, 1.0 and True are equal and have one hash


def _settings(dtype: torch.dtype) -> Hashable:
    """The part of the process's state that decides which kernels run on tensors of this dtype."""
    return (
        backends.kernel_choice(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else None,
    )


class Made(NamedTuple):
    """What the forward of a call returns to the short way.

    Attributes:
        results: what the public function returns, in order.
        hidden: results that it does not return, but through which derivatives beyond the first flow: a norm's sum.
        kept: the tensors that the backward reads, out of the results and of the call's own tensors.
        context: what else the backward has to know. It holds no tensor, and all calls of the signature share it.
    """

    results: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    context: Any


class ShortWay:
    """The calls of one public function by their signatures.

    Args:
        implementation: imports the kernels' side, which has

            * ``short_forward(arguments, needs) -> Made``: the call, from the arguments as the user gave them, and for
              each tensor among them whether a backward will be asked for its gradient;
            * ``short_backward(context, kept, gradients, needs)``: a gradient for each tensor among the arguments, None
              where ``needs`` has False, of the gradients of the results and of those that are hidden;
            * ``short_backward_by_operators``: the same, differentiable.
        arguments: NamedTuple type of the arguments of the public function.
        casts: so many of the first arguments the long way casts under autocast. Where one of them is of another dtype
            than autocast's, a call takes the long way, in which autograd follows the cast.
    """

    def __init__(self, implementation: Callable[[], Any], arguments: Any, *, casts: int = 0) -> None:
        self._implementation, self._arguments, self._casts = implementation, arguments, casts
        self._entries: dict[Hashable, _Entry] = {}
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all signatures."""
        with self._lock:
            self._entries.clear()
            self._seen.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, values: tuple[Any, ...], words: tuple[Any, ...]) -> Hashable | None:
        """The signature of a call; None where it has to take the long way.

        Args:
            values: the arguments that may be tensors, or are tuples, one that always is a tensor ahead.
            words: the others.
        """
        first = values[0]
        if not lies_with_kernels(first) or is_looked_at():
            return None
        # hooks see what is saved: checkpointing wants a call and its repetition to save the same, whichever way they go
        if _autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        kind = first.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if autocast is not None and any(each.dtype != autocast for each in values[: self._casts]):
            return None
        try:
            types = tuple(map(type, words))
            if not _WORDS.issuperset(types):
                return None
            of_values = tuple([None if value is None else _key_of(value) for value in values])
            key = (
                of_values,
                words,
                types,  # 1, 1.0 and True are equal and have one hash
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                autocast,
                backends.default_backend.value,
                _settings(first.dtype),
            )
            hash(key)
        except (TypeError, RuntimeError, AttributeError):  # a wrong argument: the long way raises the error for it
            return None
        return key

    def find(self, key: Hashable, arguments: tuple[Any, ...]) -> _Entry | None:
        """The entry of a signature, made at its second call; None before, and where it may not run now."""
        entry = self._entries.get(key)
        if entry is not None:
            return entry if entry.may_run() else None
        if key not in self._seen:
            return None
        entry = _Entry(self._implementation(), self._arguments(*arguments))
        with self._lock:
            self._seen.discard(key)
            while len(self._entries) >= MOST_ENTRIES:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = entry
        return entry

    def remember(self, key: Hashable) -> None:
        """Note that the kernels have run a call of this signature by the long way."""
        with self._lock:
            if len(self._seen) >= MOST_ENTRIES:
                self._seen.clear()
            self._seen.add(key)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value and in the tuples in it, in their order."""
    if isinstance(value, Tensor):
        return [value]
    return [found for each in value for found in tensors_in(each)] if isinstance(value, tuple) else []


class _Gap:
    """Stands in a template in the place of a tensor."""


_GAP = _Gap()


def without_tensors(value: Any) -> Any:
    """A template, which holds no tensor: ``value`` with a gap in the place of each."""
    return with_tensors(value, itertools.repeat(_GAP))


def with_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    """``value`` with the next of ``tensors`` in the place of each tensor, and in each gap."""
    if isinstance(value, (Tensor, _Gap)):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [with_tensors(each, tensors) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def in_shape(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A view of this shape; the tensor itself where it has it, since a view takes as long as a small norm."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


class _Entry:
    """What is kept of one signature: the plan of its forward, and one for each signature of its backward."""

    def __init__(self, implementation: Any, arguments: Any) -> None:
        from fastattn_kernels.common import plans  # imports triton

        self.implementation = implementation
        tensors = tensors_in(arguments)
        positions = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
        # picks the tensors out of a call's arguments: at once, if none of them is in a tuple
        self.pick: Callable[[Any], Sequence[Tensor]] = tensors_in
        if 1 < len(positions) == len(tensors):
            self.pick = operator.itemgetter(*positions)
        self.needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in tensors)
        self.training = any(self.needs)
        self.template = without_tensors(arguments)
        self.results = 1
        self.has_plan = True  # until it turns out that the call cannot be recorded
        self._plans = plans
        self._forward: Callable[..., Any] | None = None
        self._context: Any = None
        self._backwards: dict[Hashable, Callable[..., Any] | None] = {}  # None: it cannot be written down

    def may_run(self) -> bool:
        """Whether a call may go by a plan now: there is one, and no profiler listens to Triton's launches."""
        return self.has_plan and not self._plans.is_listened_to()

    def arguments(self, tensors: Sequence[Tensor]) -> Any:
        """The arguments of the public function, with these tensors."""
        return with_tensors(self.template, iter(tensors))

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """What the public function returns."""
        tensors = self.pick(arguments)
        if not self.training:
            results = self.forward(tensors).results
        else:
            made = ShortFunction.apply(self, *tensors)
            results = made[: self.results]
        return results[0] if len(results) == 1 else results

    def forward(self, tensors: Sequence[Tensor]) -> Made:
        """What the call makes."""
        # as within an operator, where a view of a new tensor is none to autograd, and may be written to as the tensor
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if self._forward is None:
                return self._first_forward(tensors)
            results, hidden, kept = self._forward(*tensors)
            return Made(results, hidden, kept, self._context)

    def _first_forward(self, tensors: Sequence[Tensor]) -> Made:
        context = None

        def write_down(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
            nonlocal context
            *made, context = self.implementation.short_forward(self.arguments(tensors), self.needs)
            return tuple(made)

        made, plan = self._plans.record(write_down, (tuple(tensors),))
        self.results = len(made[0])
        if plan is None:
            self.has_plan = False
        else:
            self._context, self._forward = context, plan.run
        results, hidden, kept = made
        return Made(results, hidden, kept, context)

    def backward(
        self, context: Any, kept: Sequence[Tensor], gradients: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """A gradient for each tensor."""
        key = self._backward_key(kept, gradients, needs)
        if key is None:
            return self.implementation.short_backward_by_operators(context, tuple(kept), gradients, needs)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            run = self._backwards.get(key)
            if run is not None:
                return run(*kept, *tensors_in(gradients))
            if key in self._backwards or len(self._backwards) >= MOST_ENTRIES:
                return self.implementation.short_backward(context, tuple(kept), gradients, needs)
            return self._first_backward(key, context, kept, gradients, needs)

    def _backward_key(
        self, kept: Sequence[Tensor], gradients: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> Hashable | None:
        """The signature of a backward; None where it has to go by the operators."""
        first = kept[0]
        if torch.is_grad_enabled() or is_looked_at() or torch.is_autocast_enabled(first.device.type):
            return None
        if self._plans.is_listened_to():
            return None
        try:
            of_gradients = tuple([None if value is None else _key_of(value) for value in gradients])
        except (TypeError, RuntimeError):
            return None
        # a hook on a saved tensor may have laid it out anew, and so may whoever assigned to the ``data`` of an argument
        layouts = tuple([(value.stride(), value.data_ptr() & 15 == 0) for value in kept])
        return needs, of_gradients, layouts, _settings(first.dtype)

    def _first_backward(
        self,
        key: Hashable,
        context: Any,
        kept: Sequence[Tensor],
        gradients: tuple[Any, ...],
        needs: tuple[bool, ...],
    ) -> Sequence[Tensor | None]:
        template = without_tensors(gradients)

        def write_down(kept: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            gradients = with_tensors(template, iter(given))
            return tuple(self.implementation.short_backward(context, kept, gradients, needs))

        made, plan = self._plans.record(write_down, (tuple(kept), tuple(tensors_in(gradients))))
        self._backwards[key] = None if plan is None else plan.run
        return made


class ShortFunction(torch.autograd.Function):
    """A call that runs by its plans, as a node of autograd's graph.

    It has no ``setup_context``: for a Function with one, torch binds the arguments to the signature of ``forward`` by
    ``inspect`` in every call, which takes longer than a small kernel. It has no rules for transforms either, since a
    call takes the long way under those.
    """

    @staticmethod
    def forward(ctx: Any, entry: _Entry, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results of the public function, then those that are hidden."""
        made = entry.forward(tensors)
        ctx.entry, ctx.context = entry, made.context
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made.kept)
        return made.results + made.hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradients of the tensors."""
        # read once: checkpointing unpacks what was saved a single time
        found = ctx.entry.backward(ctx.context, ctx.saved_tensors, gradients, ctx.needs_input_grad[1:])
        return None, *found
