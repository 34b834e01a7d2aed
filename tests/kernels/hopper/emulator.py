"""Runs warp-specialised Gluon kernels on the CPU, which Gluon has no interpreter for, and looks for their races.

The Python bodies of the kernels run as they are, on torch tensors. Each partition of ``warp_specialize`` is a task, and
one task runs at a time: until it waits. What a GPU does behind a kernel's back happens as unhelpfully as it may:

- a product (wgmma) reads its operands only when the wait retires it, after everybody else has run as far as they can:
  a buffer released too early is overwritten by then;
- a copy (TMA) makes its destination NaN at once and lands later, or as late as nobody can go on without it: a buffer
  refilled too early, or read without waiting for the right phase of the right barrier, shows as NaN;
- a store from shared memory reads its source when ``store_wait`` retires it;
- barriers count arrivals and bytes and have phases; where nobody can go on, :class:`Deadlock` tells who waits for what.

Which task goes on is drawn from ``order``. Not modelled: layouts, the order of generic and asynchronous accesses (a
missing ``fence_async_shared``), register counts, and anything that concurrent thread blocks do to each other.

    with emulating():
        launch_attention_fwd(problem, ...)  # every Gluon kernel runs here, with tensors on the CPU
"""

from __future__ import annotations

import contextlib
import itertools
import random
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastattn_kernels.hopper import _compat
from tests.kernels.hopper.emulated_block import Block, Deadlock, Unfinished, running, this_block, this_task
from tests.kernels.hopper.emulated_hopper import (
    Barriers,
    Descriptor,
    Pointer,
    SharedMemory,
    poison,
    tile,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
    warp_specialize,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["Deadlock", "Unfinished", "emulate", "emulating"]

_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "warmup"}

# ---------------------------------------------------------------------------------------------------------- languages


class _Layout:
    """Any layout: the emulator knows none."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _BarrierLayout(_Layout): ...


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda a, b, **_: function(*torch.broadcast_tensors(tile(a), tile(b)))


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(tile(condition), a, b)


def _maximum_over(x: Any, axis: int | None = None, **_: Any) -> Any:
    if x.is_floating_point():
        x = torch.where(torch.isnan(x), -float("inf"), x)  # as the GPU's max
    return x.amax() if axis is None else x.amax(axis)


def _reduce(name: str) -> Callable[..., Any]:
    return lambda x, axis=None, **_: getattr(x, name)() if axis is None else getattr(x, name)(axis)


def _approximate_tanh(x: Any) -> Any:
    """``tanh`` as far off as PTX allows, in the one direction or the other."""
    direction = (x.to(torch.float32).contiguous().view(torch.int32) & 1) * 2 - 1
    return torch.tanh(x) * (1 + direction * 2**-10.987)


def _pack(dtype: torch.dtype) -> Callable[..., Any]:
    def pack(low: Any, high: Any) -> Any:
        return torch.stack((low.to(dtype), high.to(dtype)), -1).contiguous().view(torch.int32)[..., 0]

    return pack


# PTX by its opcode, operands in the order of the call, which for the conversions is low, high.
INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda x: x,
    "tanh.approx.f32": _approximate_tanh,
    "cvt.rn.bf16x2.f32": _pack(torch.bfloat16),
    "cvt.rn.f16x2.f32": _pack(torch.float16),
}


def _inline_asm(asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    return tile(INSTRUCTIONS[asm.split()[0]](*(tile(arg) for arg in args)))


def _allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any = None) -> Any:
    if isinstance(layout, _BarrierLayout):
        return Barriers(shape, f"barrier {next(this_block().names)}")
    return SharedMemory(torch.full(tuple(shape), poison(dtype), dtype=dtype))


_DTYPES: dict[str, torch.dtype] = {
    "int1": torch.bool, "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "uint32": torch.int64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # fmt: skip
_LAYOUTS = (
    "AutoLayout", "BlockedLayout", "SliceLayout", "DistributedLinearLayout", "DotOperandLayout",
    "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout", "SharedLinearLayout", "CoalescedLayout",
)  # fmt: skip
# Triton's language and Gluon's, as one.
_LANGUAGE = types.SimpleNamespace(
    **_DTYPES,
    **dict.fromkeys(_LAYOUTS, _Layout),
    constexpr=lambda value: value,
    static_range=range,
    range=range,
    static_assert=lambda *_: None,
    num_warps=lambda: this_task().warps,
    program_id=lambda axis: tile(this_block().program[axis], torch.int32),
    num_programs=lambda axis: tile(this_block().grid[axis], torch.int32),
    cdiv=lambda a, b: (a + (b - 1)) // b,
    minimum=_elementwise(torch.fmin),
    maximum=_elementwise(torch.fmax),
    where=_where,
    arange=lambda start, end, layout=None: tile(torch.arange(start, end, dtype=torch.int32)),
    full=lambda shape, value, dtype, layout=None: tile(torch.full(tuple(shape), value, dtype=dtype)),
    zeros=lambda shape, dtype, layout=None: tile(torch.zeros(tuple(shape), dtype=dtype)),
    cast=lambda x, dtype, bitcast=False: tile(x).to(dtype, bitcast=bitcast),
    max=_maximum_over,
    min=_reduce("amin"),
    sum=_reduce("sum"),
    exp2=lambda x: torch.exp2(tile(x)),
    log2=lambda x: torch.log2(tile(x)),
    exp=lambda x: torch.exp(tile(x)),
    log=lambda x: torch.log(tile(x)),
    abs=lambda x: torch.abs(tile(x)),
    fma=lambda a, b, c: tile(a) * b + c,
    join=lambda a, b: torch.stack((a, b), -1),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    permute=lambda x, *order: x.permute(*order),
    reshape=lambda x, *shape: x.reshape(*shape),
    convert_layout=lambda x, layout=None, assert_trivial=False: x,
    set_auto_layout=lambda x, layout=None: x,
    load=lambda pointer, mask=None, other=None, **_: pointer.load(mask, other),
    store=lambda pointer, value, mask=None, **_: pointer.store(value, mask),
    atomic_add=lambda pointer, value, **_: pointer.atomic_add(value),
    inline_asm_elementwise=_inline_asm,
    allocate_shared_memory=_allocate_shared_memory,
    warp_specialize=warp_specialize,
    barrier=lambda: None,
    thread_barrier=lambda: None,
)
_MBARRIER = types.SimpleNamespace(
    MBarrierLayout=_BarrierLayout,
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, nbytes, pred=True: barrier.change(1, int(nbytes)) if pred else None,
    arrive=lambda barrier, *, count=1, pred=True: barrier.change(count, 0) if pred else None,
    wait=lambda barrier, phase, pred=True, deps=(): barrier.wait(int(phase) % 2) if pred else None,
    invalidate=lambda barrier: None,
)
# What a kernel's globals may hold, and what stands for it.
_STAND_INS: list[tuple[Any, Any]] = [
    (gl, _LANGUAGE),
    (tl, _LANGUAGE),
    (hopper.mbarrier, _MBARRIER),
    (hopper.tma, types.SimpleNamespace(store_wait=tma_store_wait)),
    (hopper.fence_async_shared, lambda cluster=False: None),
    (hopper.warpgroup_mma, warpgroup_mma),
    (hopper.warpgroup_mma_wait, warpgroup_mma_wait),
    (_compat.tma_load, tma_load),
    (_compat.tma_store, tma_store),
    (_compat.tma_store_wait, tma_store_wait),
    (_compat.tma_reduce_add, tma_reduce_add),
]
_by_identity = {id(real): stand_in for real, stand_in in _STAND_INS}
_globals: dict[int, tuple[Any, dict[str, Any]]] = {}  # by identity of the real ones, which are kept alive for that


def _python(function: Any) -> Any:
    """A kernel's Python body, in globals where the emulator stands for the languages: those of its own module."""
    body = function.fn
    return types.FunctionType(
        body.__code__, _emulated_globals(body.__globals__), body.__name__, body.__defaults__, body.__closure__
    )


def _emulated_globals(real: dict[str, Any]) -> dict[str, Any]:
    if id(real) not in _globals:
        emulated = dict(real)
        _globals[id(real)] = real, emulated
        for name, value in real.items():
            if id(value) in _by_identity:
                emulated[name] = _by_identity[id(value)]
            elif isinstance(value, (JITFunction, InterpretedFunction)):
                emulated[name] = _python(value)
            elif isinstance(value, tl.constexpr):
                emulated[name] = value.value
    return _globals[id(real)][1]


# ----------------------------------------------------------------------------------------------------------- launches


def _argument(value: Any) -> Any:
    """What a kernel sees of a launch's argument."""
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, torch.Tensor):
        start = value.storage_offset()
        length = value.untyped_storage().nbytes() // value.element_size() - start
        return Pointer(torch.as_strided(value, (length,), (1,), start))
    if isinstance(value, tuple):
        return tuple(_argument(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return tile(value, torch.int32)
    return tile(value, torch.float32) if isinstance(value, float) else value


def emulate(kernel: Any, grid: Any, *args: Any, order: int = 0, **kwargs: Any) -> None:
    """``kernel[grid](*args, **kwargs)``, one thread block after the other."""
    bound = dict(zip(kernel.arg_names, args)) | {name: v for name, v in kwargs.items() if name not in _OPTIONS}
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    bound = {name: value if name in constants else _argument(value) for name, value in bound.items()}
    grid = grid(bound) if callable(grid) else grid
    sizes = (*grid, 1, 1)[:3]
    body, rng = _python(kernel), random.Random(order)
    for z, y, x in itertools.product(*(range(int(size)) for size in reversed(sizes))):
        block = Block((x, y, z), sizes, rng)
        running.append(block)
        try:
            block.start(lambda: body(**bound), body.__name__, kwargs.get("num_warps", 4))
            block.run()
        finally:
            running.pop()


@contextlib.contextmanager
def emulating(order: int = 0) -> Generator[None]:
    """Every launch of a Gluon kernel is emulated."""
    run = GluonJITFunction.run

    def emulated(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        emulate(kernel, grid, *args, order=order, **kwargs)

    GluonJITFunction.run = emulated  # type: ignore[method-assign]
    try:
        yield
    finally:
        GluonJITFunction.run = run  # type: ignore[method-assign]
