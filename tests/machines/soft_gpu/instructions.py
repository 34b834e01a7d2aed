"""From statements to steps: which builder an instruction has; and the control flow, moves and exchanges among lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu import arithmetic, barriers, memory, products, shared, tma
from tests.machines.soft_gpu.operands import (
    BITS,
    FINISHED,
    LANES,
    UNSIGNED,
    Instruction,
    Step,
    numbers,
    registers_of,
)
from tests.machines.soft_gpu.program import Program

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp


@functools.lru_cache(maxsize=64)
def load(ptx: str, name: str) -> Program:
    """The kernel ``name`` of a module. A step is built when it is first executed: much of a kernel never is."""
    program = Program(ptx, name)
    program.steps = [functools.partial(_build_and_run, program, index) for index in range(len(program.statements))]
    return program


def _build_and_run(program: Program, index: int, warp: Warp) -> Any:
    instruction = Instruction(program, index)
    program.steps[index] = _builder(instruction)(instruction)
    return program.steps[index](warp)


def _builder(instruction: Instruction) -> Callable[[Instruction], Step]:
    name, parts = instruction.name, instruction.parts
    if name in ("ld", "st", "atom", "red"):
        space = next(
            (part.partition("::")[0] for part in parts if part.startswith(("param", "shared", "global"))), None
        )
        found = _MEMORY.get((name, space))
    elif name == "cp":
        found = tma.copy if "bulk" in parts else shared.copy
    elif instruction.opcode == "bar.warp.sync":
        found = _nothing
    else:
        found = _BUILDERS.get(name)
    if found is None:
        raise instruction.unknown("this instruction")
    return found


# -------------------------------------------------------------------------------------------------------- control flow


def _branch(instruction: Instruction) -> Step:
    program, scopes = instruction.program, instruction.scopes
    target = functools.cache(lambda: program.label(instruction.operands[0], scopes))  # labels may stand further below
    if instruction.guard is None:
        return lambda warp: target()
    guard = instruction.predicate(instruction.guard)

    def step(warp: Warp) -> Any:
        on = guard(warp)
        if warp.active is not None:
            on = on & warp.active
        elif on.all():
            return target()
        if on.any():
            warp.jump = on, target()
        return None

    return step


def _branch_by_index(instruction: Instruction) -> Step:
    index, (program, scopes) = instruction.read(instruction.operands[0], 32), (instruction.program, instruction.scopes)

    def step(warp: Warp) -> int:
        indices = np.unique(index(warp))
        if len(indices) > 1 or warp.active is not None:
            raise instruction.unknown("lanes that branch to different targets by an index")
        return program.label(program.branch_targets[instruction.operands[1]][int(indices[0])], scopes)

    return step


def _return(instruction: Instruction) -> Step:
    if instruction.guard is None:
        return lambda warp: FINISHED
    guard = instruction.predicate(instruction.guard)

    def step(warp: Warp) -> Any:
        on = guard(warp)
        if on.any() and not on.all():
            raise instruction.unknown("lanes that return while others do not")
        return FINISHED if on.all() else None

    return step


def _trap(instruction: Instruction) -> Step:
    def step(warp: Warp) -> None:
        raise Finding("undefined", "a trap")

    return step


def _nothing(instruction: Instruction) -> Step:
    """What has no effect here: hints, and what orders things that are in order anyway."""
    return lambda warp: None


# --------------------------------------------------------------------------------------------------------------- moves


def _move(instruction: Instruction) -> Step:
    bits = BITS[instruction.type]
    target, source = instruction.operands
    if target.startswith("{"):
        puts = [instruction.write(token) for token in registers_of(target)]
        whole, part = instruction.read(source, bits), UNSIGNED[bits // len(puts)]

        def unpack(warp: Warp) -> None:
            values = np.ascontiguousarray(whole(warp)).view(part).reshape(32, len(puts))
            for i, put in enumerate(puts):
                put(warp, np.ascontiguousarray(values[:, i]))

        return unpack
    put = instruction.write(target)
    if source.startswith("{"):
        tokens = registers_of(source)
        reads = [instruction.read(token, bits // len(tokens)) for token in tokens]
        return lambda warp: put(warp, np.stack([read(warp) for read in reads], 1).view(UNSIGNED[bits])[:, 0])
    read = instruction.read(source, bits)
    return lambda warp: put(warp, read(warp))


def _to_address(instruction: Instruction) -> Step:
    if instruction.parts[1:] not in (["to", "global", "u64"], ["global", "u64"], ["param", "u64"]):
        raise instruction.unknown("this change of an address")
    put, read = instruction.write(instruction.operands[0]), instruction.read(instruction.operands[1], 64)
    return lambda warp: put(warp, read(warp))


def _select(instruction: Instruction) -> Step:
    put, bits = instruction.write(instruction.operands[0]), BITS[instruction.type]
    yes, no = (instruction.read(token, bits) for token in instruction.operands[1:3])
    which = instruction.predicate(instruction.operands[3])
    return lambda warp: put(warp, np.where(which(warp), yes(warp), no(warp)))


def _load_parameter(instruction: Instruction) -> Step:
    name, _, offset = instruction.operands[1].strip("[]").partition("+")
    index, kind = instruction.program.parameter_index[name], UNSIGNED[BITS[instruction.type]]
    put = instruction.write(instruction.operands[0])

    def step(warp: Warp) -> None:
        put(warp, np.full(32, np.frombuffer(warp.block.parameters[index], kind, 1, int(offset or 0))[0]))

    return step


def _make_policy(instruction: Instruction) -> Step:
    """A cache policy: a hint."""
    put = instruction.write(instruction.operands[0])
    return lambda warp: put(warp, np.zeros(32, np.uint64))


# --------------------------------------------------------------------------------------------------------- among lanes


def _shuffle(instruction: Instruction) -> Step:
    mode = instruction.parts[2]
    targets = [instruction.write(token) for token in instruction.operands[0].split("|")]
    value, by, bounds = (instruction.read(token, 32) for token in instruction.operands[1:4])

    def step(warp: Warp) -> None:
        segment, clamp = bounds(warp) >> 8 & 31, bounds(warp) & 31
        first, last = LANES & segment, (LANES & segment) | (clamp & ~segment)
        distance = by(warp) & 31
        if mode == "up":
            source = LANES.astype(np.int64) - distance
            inside = source >= last
        else:
            source = {"bfly": LANES ^ distance, "down": LANES + distance, "idx": first | (distance & ~segment)}[mode]
            inside = source <= last
        values = value(warp)
        targets[0](warp, values[np.where(inside, source, LANES).astype(np.int64)])
        if len(targets) > 1:
            targets[1](warp, inside)

    if mode not in ("up", "down", "bfly", "idx"):
        raise instruction.unknown("this shuffle")
    return step


def _elect(instruction: Instruction) -> Step:
    """One lane of the warp: the first."""
    lane, elected = (instruction.write(token) for token in instruction.operands[0].split("|"))

    def step(warp: Warp) -> None:
        lane(warp, np.zeros(32, np.uint32))
        elected(warp, LANES == 0)

    return step


def _vote(instruction: Instruction) -> Step:
    mode, put = instruction.parts[2], instruction.write(instruction.operands[0])
    predicate = instruction.predicate(instruction.operands[1])
    if mode not in ("any", "all", "ballot"):
        raise instruction.unknown("this vote")

    def step(warp: Warp) -> None:
        votes = predicate(warp)
        if mode == "ballot":
            put(warp, np.full(32, int((votes.astype(np.uint64) << LANES.astype(np.uint64)).sum()), np.uint32))
        else:
            put(warp, np.full(32, votes.any() if mode == "any" else votes.all()))

    return step


def _reduce(instruction: Instruction) -> Step:
    reduce: Any = {
        "max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce,
        "xor": np.bitwise_xor.reduce,
    }[instruction.parts[2]]  # fmt: skip
    put, read = instruction.write(instruction.operands[0]), instruction.read(instruction.operands[1], 32)

    def step(warp: Warp) -> None:
        values = numbers(read(warp), instruction.type)
        put(warp, np.full(32, reduce(values), values.dtype).view(np.uint32))

    return step


_MEMORY: dict[tuple[str, str | None], Callable[[Instruction], Step]] = {
    ("ld", "param"): _load_parameter, ("ld", "global"): memory.load, ("st", "global"): memory.store,
    ("ld", "shared"): shared.load, ("st", "shared"): shared.store, ("atom", "global"): memory.atomic,
    ("red", "global"): memory.atomic,
}  # fmt: skip
_BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    **dict.fromkeys(arithmetic.NAMES, arithmetic.arithmetic),
    "setp": arithmetic.compare, "cvt": arithmetic.convert,
    "bra": _branch, "brx": _branch_by_index, "ret": _return, "exit": _return, "trap": _trap,
    "mov": _move, "cvta": _to_address, "selp": _select, "createpolicy": _make_policy,
    "shfl": _shuffle, "elect": _elect, "vote": _vote, "redux": _reduce,
    **dict.fromkeys(("prefetch", "discard", "membar", "nanosleep", "griddepcontrol"), _nothing),
    "bar": barriers.synchronise, "barrier": barriers.synchronise, "fence": barriers.fence,
    "setmaxnreg": barriers.set_registers, "mbarrier": barriers.mbarrier,
    "ldmatrix": shared.matrix, "stmatrix": shared.matrix, "wgmma": products.wgmma, "mma": products.mma,
}  # fmt: skip
