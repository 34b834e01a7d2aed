"""Plans: what a call allocates and launches is recorded once, and later calls of the same signature repeat it.

A launcher of this package chooses a configuration, allocates, makes the arguments of its kernel and launches. For a
small call this takes longer than the kernel runs: Triton alone binds 25 arguments and looks each of them over, tuples
of pointers and strides are built, tensor maps are checked. All of it depends on the call's *signature* alone: the
shapes, strides, dtypes and devices of its tensors, whether their addresses are multiples of 16 bytes, and its numbers.

So a function that launches is decorated with :func:`planned`. The second time that it is called with a signature, it
runs under a :class:`Recording`, which sees every operator of torch (it is a ``TorchDispatchMode``) and every launch
(``launch.launch`` reports them). From the recording a Python function of the input tensors is written that does the
same: it allocates, calls the same operators, and hands the compiled kernels their arguments. Only addresses change from
call to call. A plan holds no tensor alive. A call that cannot be repeated so, because it reads a number out of a
tensor, for example, has no plan, and runs as it did the first time.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from triton import knobs

from fastattn_kernels.common import launch
from fastattn_kernels.common.recording import (
    OF_LAUNCH,
    Called,
    Descriptor,
    Launched,
    Made,
    Recording,
    Slot,
    View,
    tuple_like,
)
from fastattn_kernels.common.workspaces import pooled

MOST_PLANS = 1024  # of one function; beyond, the oldest is forgotten
_ALIGNMENT = 16  # bytes: Triton compiles another kernel for addresses that are no multiples of it

# Two switches for those who take launches away from the GPU. Without plans every launch goes through Triton, where one
# that only compiles can intercept it; and what executes a launch on a CPU has to be handed tensors, not their
# addresses.
ENABLED: bool = True
HAND_OVER_ADDRESSES: bool = True


# ----------------------------------------------------------------------------------------------------------- signatures


def signature(*values: Any) -> Hashable:
    """The part of a call that decides what it launches: of its tensors everything but their numbers and addresses,
    of other values everything; of tuples, what they hold."""
    return tuple([
        (
            value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % _ALIGNMENT == 0
        ) if isinstance(value, Tensor)
        else (type(value), signature(*value)) if isinstance(value, tuple)
        else value if value is None or isinstance(value, str)
        else (type(value), value)  # 1, 1.0 and True are equal and have one hash
        for value in values
    ])  # fmt: skip


def is_listened_to() -> bool:
    """Whether a profiler has asked Triton to tell it of launches, which it would not hear of if a plan launched."""
    enter: Any = knobs.runtime.launch_enter_hook
    leave: Any = knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


# -------------------------------------------------------------------------------------------------------------- writing


class Plan(NamedTuple):
    """What a call did, as a function of its input tensors.

    Attributes:
        run: the function.
        source: its text, for people.
        launches: how many kernels it launches.
    """

    run: Callable[..., Any]
    source: str
    launches: int


class _At(NamedTuple):
    """An address in the place of a tensor: Triton's launcher asks both for ``data_ptr()``."""

    address: int

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self.address


def _is_like(made: Made, tensor: Tensor) -> bool:
    """Whether ``torch.empty_like`` of a tensor makes what was made. Asked on the device ``meta``, where it allocates
    nothing: the tensor may be half of the memory."""
    stride = torch.empty_like(tensor, device="meta").stride()
    return (made.shape, made.stride, made.dtype, made.device) == (tensor.shape, stride, tensor.dtype, tensor.device)


class _Writer:
    """Writes the text of a function that repeats a recording.

    It goes backwards, from the last step to the first: so it knows at each step which tensors are needed behind it, can
    leave out what makes others, and frees each tensor behind its last use.

    Args:
        recording: of a call.
        inputs: how many tensors went into it.
        results: what it returned, with slots for tensors.
        direct: whether compiled kernels are launched by the launcher that Triton compiled for them; False:
            through ``kernel[grid](...)``, as in Triton's interpreter.
    """

    def __init__(self, recording: Recording, inputs: int, results: Any, direct: bool) -> None:
        self.recording, self.inputs, self.results, self.direct = recording, inputs, results, direct
        self.by_address = direct and HAND_OVER_ADDRESSES
        self.steps, self.views = recording.steps, recording.views
        if self.by_address:
            self.steps, self.views = pooled(recording, results)
        self.names: dict[str, Any] = {
            "At": _At, "empty": torch.empty, "empty_strided": torch.empty_strided, "empty_like": torch.empty_like,
            "run": None, "stream": None, "stream_of": None,  # the function's own
        }  # fmt: skip
        self.needed: set[int] = set()
        self.last_used: list[int] = []  # the tensors that no line behind the one that is being written needs
        self.launches = 0

    def name(self, value: Any) -> str:
        """A name for a value that has no spelling in Python's source: the plan's function finds it under that name."""
        text = str(
            getattr(value, "__name__", "") or (value if isinstance(value, (torch.dtype, torch.device)) else "value")
        )
        known = re.sub(r"\W+", "_", text.removeprefix("torch."))
        made = known if self.names.get(known, value) is value else f"{known}_{len(self.names)}"
        self.names[made] = value
        return made

    def expression(self, value: Any, in_launch: bool = False) -> str:
        """``value`` as text. The steps in front of this one have to make the tensors in it."""
        if isinstance(value, Slot):
            return self.address(value.number) if in_launch and self.by_address else self.tensor(value.number)
        if isinstance(value, Descriptor):
            return self.descriptor(value)
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{self.expression(each, in_launch)}, " for each in value)
            if hasattr(value, "_fields") and not (in_launch and self.direct):  # a compiled kernel knows no names
                return f"{self.name(type(value))}({inner})"
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self.name(value)

    def tensor(self, number: int) -> str:
        """The name of a tensor, which a step in front of this one has to make."""
        if number not in self.needed:
            self.needed.add(number)
            self.last_used.append(number)
        return f"t{number}"

    def address(self, number: int) -> str:
        """The address of a tensor as text: that of the tensor in whose memory it lies, plus an offset."""
        base, offset = self.views.get(number, View(number, 0))
        return f"{self.tensor(base)}.data_ptr()" + (f" + {offset}" if offset else "")

    def descriptor(self, value: Descriptor) -> str:
        """A tensor map as text: made anew of the tensor or its address, and of what was recorded."""
        if not self.by_address:
            make = (
                functools.partial(_with_base, value[1:]) if self.direct else functools.partial(_descriptor_like, value)
            )
            return f"{self.name(make)}({self.expression(value.base)})"
        base, offset = self.views.get(value.base.number, View(value.base.number, 0))
        pointer = f"At({self.address(value.base.number)})" if offset else self.tensor(base)
        return f"{self.name(functools.partial(_with_base, value[1:]))}({pointer})"

    def step(self, step: Made | Called | Launched) -> str:
        """The line for a step; empty for one that makes a tensor that no later step needs."""
        if isinstance(step, Made):
            if step.made not in self.needed:
                return ""
            like = next((i for i, tensor in enumerate(self.recording.inputs) if _is_like(step, tensor)), None)
            if like is not None:  # twice as fast
                return f"t{step.made} = empty_like({self.tensor(like)})"
            where = f"dtype={self.name(step.dtype)}, device={self.name(step.device)}"
            if step.stride == make_contiguous_strides_for(step.shape):
                return f"t{step.made} = empty({step.shape!r}, {where})"
            return f"t{step.made} = empty_strided({step.shape!r}, {step.stride!r}, {where})"
        if isinstance(step, Called):
            if step.is_view and not self.needed.intersection(step.results):
                return ""
            keywords = "".join(f"{name}={self.expression(value)}, " for name, value in step.keywords.items())
            arguments = "".join(f"{self.expression(value)}, " for value in step.arguments)
            results = "".join(f"t{number}, " for number in step.results)
            results = results if step.is_many else results.rstrip(", ")
            return f"{results} = {self.name(step.operator)}({arguments}{keywords})"
        self.launches += 1
        arguments = ", ".join(self.expression(value, in_launch=True) for value in step.arguments)
        if self.direct:
            x, y, z = (*step.grid, 1, 1)[:3]
            compiled = step.compiled
            handles = ", ".join(map(self.name, (compiled.function, compiled.packed_metadata)))
            return f"{self.name(compiled.run)}({x}, {y}, {z}, stream, {handles}, None, None, None, {arguments})"
        options = {name: value for name, value in step.constants.items() if name in OF_LAUNCH}
        options_text = "".join(f", {name}={self.expression(value)}" for name, value in options.items())
        return f"{self.name(step.kernel)}[{step.grid!r}]({arguments}{options_text})"

    def write(self) -> Plan:
        """The plan."""
        returned = self.expression(self.results)
        lines = []  # from the last to the first
        for step in reversed(self.steps):
            self.last_used = []
            if line := self.step(step):
                done = [f"t{number}" for number in self.last_used if number >= self.inputs]
                lines += [f"del {', '.join(done)}", line] if done else [line]
        lines.reverse()
        devices = {step.device for step in self.steps if isinstance(step, Launched)}
        if self.direct and devices:
            (device,) = devices
            driver: Any = triton.runtime.driver.active
            self.names["stream_of"] = driver.get_current_stream
            lines.insert(0, f"stream = stream_of({device.index or 0})")
        parameters = ", ".join(f"t{number}" for number in range(self.inputs))
        body = "".join(f"    {line}\n" for line in (*lines, f"return {returned}"))
        source = f"def run({parameters}):\n{body}"
        exec(compile(source, "<a plan of fastattn>", "exec"), self.names)
        run = self.names["run"]
        (device,) = devices or {torch.device("cpu")}
        if device.type == "cuda":
            run = functools.partial(_on_device, device.index, run)
        return Plan(run, source, self.launches)


def _with_base(rest: tuple[Any, ...], base: Any) -> Descriptor:
    return Descriptor(base, *rest)


def _descriptor_like(value: Descriptor, base: Tensor) -> Any:
    """A descriptor of Triton's own."""
    return value.kind(base, value.shape, value.strides, value.block_shape, value.layout, value.padding)


def _on_device(index: int, run: Callable[..., Any], *tensors: Tensor) -> Any:
    """A plan's function, with its device made current if another is."""
    if torch.cuda.current_device() == index:
        return run(*tensors)
    with torch.cuda.device(index):
        return run(*tensors)


# ---------------------------------------------------------------------------------------------------------------- plans


class Plans:
    """The plans of one function, by signature: at most :data:`MOST_PLANS`. Safe with several threads."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._plans: dict[Hashable, Plan | None] = {}
        self._seen: set[Hashable] = set()  # once so far: most never come again, and recording takes a millisecond
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def known(self) -> list[Plan]:
        """All plans that there are."""
        return [plan for plan in list(self._plans.values()) if plan is not None]

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._plans.clear()
            self._seen.clear()

    def find(self, key: Hashable) -> Plan | None:
        """The plan of a signature, if there is one and it may be used now."""
        plan = self._plans.get(key)
        return None if plan is None or is_listened_to() else plan

    def __call__(self, key: Hashable, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
        """``function(*arguments)``, whose tensors are these, in their order; by its plan, if there is one."""
        if launch.this_thread.recorder is not None:  # a plan launches past the recorder: the function itself has to run
            return self.function(*arguments)
        plan = self.find(key)
        if plan is not None:
            return plan.run(*tensors)
        if key in self._plans or not ENABLED:
            return self.function(*arguments)
        if key not in self._seen:
            self._remember(key)
            return self.function(*arguments)
        result, plan = record(self.function, arguments)
        self._keep(key, plan)
        return result

    def _remember(self, key: Hashable) -> None:
        with self._lock:
            if len(self._seen) >= MOST_PLANS:
                self._seen.clear()
            self._seen.add(key)

    def _keep(self, key: Hashable, plan: Plan | None) -> None:
        with self._lock:
            self._seen.discard(key)
            self._plans.pop(key, None)
            while len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan


def record(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Plan | None]:
    """The result of ``function(*arguments)``, and its plan; None where it cannot have one.

    The plan takes the tensors among the arguments, in their order, and returns what the function does.
    """
    if not ENABLED or launch.this_thread.recorder is not None:
        return function(*arguments), None
    # Each argument becomes an object of its own. Two arguments that are one tensor now may be two in a later call.
    copies = tuple(_with_own_tensors(value) for value in arguments)
    inputs = tensors_in(copies)
    recording = Recording(inputs)
    launch.this_thread.recorder = recording.launched
    try:
        with recording:
            result = function(*copies)
    finally:
        launch.this_thread.recorder = None
    results = recording.slots(result)
    result = _in_place_of(result, {id(copy): own for copy, own in zip(inputs, tensors_in(arguments))})
    launched = [step for step in recording.steps if isinstance(step, Launched)]
    direct = all(hasattr(step.compiled, "packed_metadata") for step in launched)
    if recording.flaw is not None or len({step.device for step in launched}) > 1:
        return result, None
    return result, _Writer(recording, len(inputs), results, direct).write()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a tuple and in the tuples in it, in their order."""
    if isinstance(value, Tensor):
        return [value]
    return [found for each in value for found in tensors_in(each)] if isinstance(value, tuple) else []


def _with_own_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return tuple_like(value, map(_with_own_tensors, value)) if isinstance(value, tuple) else value


def _in_place_of(value: Any, tensors: dict[int, Tensor]) -> Any:
    """``value``, in which tensors stand for those of these ids."""
    if isinstance(value, tuple):
        return tuple_like(value, (_in_place_of(each, tensors) for each in value))
    return tensors.get(id(value), value) if isinstance(value, Tensor) else value


def planned(function: Callable[..., Any]) -> Any:
    """Decorate a function of tensors, tuples and hashable values: repeated calls of a signature run by a plan.

    What the function allocates and launches may depend on its arguments' signature and on :func:`settings` alone. It
    returns tensors that it made, alone or in tuples.
    """
    plans = Plans(function)

    @functools.wraps(function)
    def by_plan(*arguments: Any) -> Any:
        return plans((settings(), signature(*arguments)), arguments, tensors_in(arguments))

    by_plan.plans = plans  # type: ignore[attr-defined]
    return by_plan


def settings() -> Hashable:
    """The part of the process's state that decides, beside a call's arguments, what is launched."""
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"),
        knobs.runtime.debug,
    )
