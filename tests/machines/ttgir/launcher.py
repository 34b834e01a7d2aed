"""Takes the launches of triton's functions: compiles up to TTIR or TTGIR, and executes that on the tensors' memory."""

from __future__ import annotations

import os
import random
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction
from ttsem import pidraces, values
from ttsem.harness import descriptor_values
from ttsem.ir_types import Type
from ttsem.memory import Memory

from benchmarks.laboratory.stand_in import StandInDriver, parse_target
from tests import machines
from tests.machines.findings import Finding
from tests.machines.ttgir.interpreter import Interpreter
from tests.machines.ttgir.modules import Module, parse, print_generically
from tests.machines.ttgir.worst_case import WorstCase

TARGET = "cuda:90"
STAGES = ("ttir", "ttgir")
# How far plain kernels are compiled: TTIR is what they mean, TTGIR has their pipelines, too, and takes twice the time.
PLAIN = os.environ.get("FASTATTN_PLAIN_STAGE", "ttir")
if PLAIN not in STAGES:
    raise ValueError(f"FASTATTN_PLAIN_STAGE={PLAIN}: it takes {' or '.join(STAGES)}")


class Program(NamedTuple):
    """A compiled kernel: its module, its function's name and arguments, which arguments of a launch those are."""

    module: Module
    name: str
    arguments: list[Type]
    paths: list[tuple[int, ...]]
    interpreter: type[Interpreter]


def install() -> None:
    """Every launch of a function of triton or Gluon comes here from now on."""
    print_generically()
    triton.runtime.driver.set_active(StandInDriver(parse_target(TARGET)))
    JITFunction.run = _run  # type: ignore[method-assign]


def _run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """``JITFunction.run``."""
    programs, _, target, backend, binder = function.device_caches[0]
    bound, specialization, options = binder(*args, **kwargs)
    key = str(specialization) + str(options)
    if key not in programs:
        programs[key] = _compile(function, kwargs, bound, specialization, options, target, backend)
    if not warmup:
        grid = grid(bound) if callable(grid) else grid
        _execute(function, programs[key], list(bound.values()), [*map(int, grid), 1, 1])


def _compile(
    function: Any, kwargs: Any, bound: Any, specialization: Any, options: Any, target: Any, backend: Any
) -> Program:  # fmt: skip
    """What the compiler makes of a function for these arguments, up to the last stage that is executed."""
    is_gluon = isinstance(function, GluonJITFunction)
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
    source = (GluonASTSource if is_gluon else function.ASTSource)(function, signature, constants, attributes)
    options = backend.parse_options({**options.__dict__, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module: Any = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    for stage in ("ttgir",) if is_gluon else STAGES[: STAGES.index(PLAIN) + 1]:
        module = stages[stage](module, metadata)
    parsed = parse(str(module))
    name = next(name for name in parsed.funcs if name.startswith(function.__name__))
    arguments = [type_ for _, type_ in parsed.funcs[name].regions[0].blocks[0].args]
    paths = [path for i, kind in enumerate(signature.values()) for path in _runtime_paths(kind, (i,))]
    return Program(parsed, name, arguments, paths, WorstCase if is_gluon else Interpreter)


def _runtime_paths(kind: Any, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where in the arguments of a launch those lie that the compiled function still has."""
    if isinstance(kind, tuple):
        return [found for i, each in enumerate(kind) for found in _runtime_paths(each, (*path, i))]
    return [] if kind == "constexpr" else [path]


def _execute(function: Any, program: Program, args: list[Any], grid: list[int]) -> None:
    sizes = (grid[0], grid[1], grid[2])
    memory = Memory()
    memory.trace()
    memory.access_budget = sys.maxsize  # beyond it, ttsem would look for no races
    mapped: dict[int, torch.Tensor] = {}  # storages, by address
    passed: list[Any] = []
    for path in program.paths:
        argument: Any = args
        for i in path:
            argument = argument[i]
        type_ = program.arguments[len(passed)]
        passed += _values(argument, type_, mapped)
    if len(passed) != len(program.arguments):
        raise TypeError(f"{program.name} takes {len(program.arguments)} arguments, {len(passed)} were made")
    for address, storage in mapped.items():
        memory.register(address, storage.numpy())
    rng = random.Random(f"{machines.order()} {program.name} {sizes}")
    interpreter = program.interpreter(program.module, memory, sizes, rng)
    with np.errstate(all="ignore"):
        interpreter.run_grid(program.name, passed)
    race: Any = pidraces.find_race(_by_writer(memory))
    if race is not None:
        (one, _, op), (other, _, other_op) = race.first, race.second
        places = " and ".join(program.module.place(each) for each in (op, other_op))
        raise Finding("race", f"{race.kind} of {race.shared_bytes} bytes by programs {one} and {other}", places)


def _by_writer(memory: Memory) -> list[Any]:
    """The accesses to memory, with stores of what is there already among the others, and for the bytes of each store
    the number of its program: to ttsem it is no race if two programs store the same."""
    assert memory.access_log is not None
    numbers: dict[Any, int] = {}
    log = []
    for program, kind, op, addresses, itemsize, stored in memory.access_log:
        number = numbers.setdefault(program, len(numbers))
        if stored is not None:
            bytes_of = (number % 256**itemsize).to_bytes(itemsize, "little")
            stored = np.tile(np.frombuffer(bytes_of, np.uint8), (addresses.size, 1))
        log.append((program, "w" if kind == "s" else kind, op, addresses, itemsize, stored))
    return log


def _values(argument: Any, type_: Type, mapped: dict[int, torch.Tensor]) -> list[Any]:
    """What the function's arguments for one of the launch are bound to."""
    tensor = getattr(argument, "base", argument) if not isinstance(argument, torch.Tensor) else argument
    if isinstance(tensor, torch.Tensor):
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if storage.numel():
            mapped[storage.data_ptr()] = storage
        if tensor is argument:
            return [np.array(tensor.data_ptr(), np.int64)]
        return descriptor_values(argument, tensor.data_ptr())
    return [values.cast_to(np.asarray(argument), type_)]
