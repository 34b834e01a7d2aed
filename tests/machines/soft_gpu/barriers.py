"""Barriers: ``bar.sync`` among warps, mbarriers with their transaction counts, fences, and setmaxnreg's pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu.operands import BLOCKED, SHARED_BASE, Array, Instruction, Step

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp


class _Barrier:
    """A numbered barrier: who has arrived, how often it has been complete, and what the arrived have seen."""

    def __init__(self, agents: int) -> None:
        self.arrived: set[Warp] = set()
        self.completions = 0
        self.clock = np.zeros(agents, np.int32)


def synchronise(instruction: Instruction) -> Step:
    """``bar.sync``: waits for all warps of the block, or for as many threads as it says."""
    number = instruction.read(instruction.operands[0], 32)
    threads = instruction.read(instruction.operands[1], 32) if len(instruction.operands) > 1 else None
    if instruction.guard is not None:
        raise instruction.unknown("a guarded barrier")

    def step(warp: Warp) -> Any:
        block = warp.block
        index = int(number(warp)[0])
        expected = int(threads(warp)[0]) // 32 if threads else block.program.warps
        barrier = block.barriers.setdefault(index, _Barrier(block.agents))
        if warp.waiting is None:
            warp.waiting = (index, barrier.completions)
            barrier.arrived.add(warp)
            barrier.clock = np.maximum(barrier.clock, warp.clock)
            if len(barrier.arrived) == expected:
                for other in barrier.arrived:
                    other.clock = np.maximum(other.clock, barrier.clock)
                    other.tick()
                barrier.arrived.clear()
                barrier.completions += 1
        if barrier.completions == warp.waiting[1]:
            return BLOCKED
        warp.waiting = None
        return None

    return step


def fence(instruction: Instruction) -> Step:
    """``fence.proxy.async``; the other fences order what is executed in order here anyway."""
    if "proxy" not in instruction.parts or "async" not in instruction.opcode:
        return lambda warp: None
    return lambda warp: warp.block.watch.fence(warp)


def set_registers(instruction: Instruction) -> Step:
    """``setmaxnreg``: a warp waits for registers that others have not given back yet."""
    wanted, grows = int(instruction.operands[0]), instruction.parts[1] == "inc"

    def step(warp: Warp) -> Any:
        block = warp.block
        has = block.warp_registers[warp.id]
        if wanted < has if grows else wanted > has:
            raise Finding("undefined", f"setmaxnreg.{'inc' if grows else 'dec'} to {wanted} from {has} registers")
        if wanted - has > block.free_registers:
            return BLOCKED
        block.free_registers -= wanted - has
        block.warp_registers[warp.id] = wanted
        return None

    return step


# ---------------------------------------------------------------------------------------------------------- mbarriers


class MBarrier:
    """Arrivals and bytes that a phase still waits for. ``clock`` is what those that arrived have seen; ``seen`` what
    a waiter has seen once the phase is complete; ``agent`` stands for the TMA that arrives here."""

    def __init__(self, count: int, agent: int, agents: int) -> None:
        self.count = self.pending = count
        self.phase = self.bytes = self.loads = 0
        self.agent = agent
        self.clock, self.seen = np.zeros(agents, np.int32), np.zeros(agents, np.int32)

    def begin_load(self) -> tuple[int, int]:
        """The agent and the tick of a load that will arrive here."""
        self.loads += 1
        return self.agent, self.loads

    def land(self, size: int, tick: int, where: str) -> None:
        """``size`` bytes have arrived."""
        self.bytes -= size
        self.clock[self.agent] = max(self.clock[self.agent], tick)
        self.check(where)

    def arrive(self, clock: Array, count: int, expected_bytes: int, where: str = "") -> None:
        self.clock = np.maximum(self.clock, clock)
        self.bytes += expected_bytes
        self.pending -= count
        self.check(where)

    def check(self, where: str) -> None:
        """Complete the phase, if it is."""
        if self.pending < 0:
            raise Finding("over-arrival", f"an mbarrier waits for {self.count} arrivals a phase and gets more", where)
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.seen = np.maximum(self.seen, self.clock)


def barrier_at(warp: Warp, address: int) -> MBarrier:
    """The mbarrier at an address of shared memory, whose initialisation ``warp`` has to have been told of."""
    offset = address - SHARED_BASE
    found = warp.block.mbarriers.get(offset)
    if found is None:
        raise Finding("undefined", f"no mbarrier at shared byte {offset}")
    warp.block.watch.read(warp, warp.block.watch.units(np.array([offset]), 8), "async")
    return found


def mbarrier(instruction: Instruction) -> Step:
    """``mbarrier.init``, ``.inval``, ``.arrive``, ``.try_wait``."""
    kind = instruction.parts[1]
    if kind == "init":
        return _initialise(instruction)
    if kind == "inval":
        return _invalidate(instruction)
    if kind == "arrive" and "drop" not in instruction.opcode and "noComplete" not in instruction.opcode:
        return _arrive(instruction)
    if kind in ("try_wait", "test_wait") and "parity" in instruction.parts:
        return _wait(instruction)
    raise instruction.unknown("this operation of an mbarrier")


def _initialise(instruction: Instruction) -> Step:
    address, lanes = instruction.shared(instruction.operands[0]), instruction.lanes()
    count = int(instruction.operands[1])

    def step(warp: Warp) -> None:
        block = warp.block
        for offset in np.unique(address(warp)[lanes(warp)]).tolist():
            if offset % 8:
                raise Finding("undefined", f"an mbarrier at shared byte {offset}, which is no multiple of 8")
            if offset in block.mbarriers:
                raise Finding("undefined", f"an mbarrier at shared byte {offset}, where one is already")
            block.watch.write(warp, block.watch.units(np.array([offset]), 8), "async")
            agent = block.program.warps + block.mbarriers_made
            block.mbarriers_made += 1
            if agent >= block.agents:
                raise instruction.unknown(f"{block.mbarriers_made} mbarriers in a block")
            block.mbarriers[offset] = MBarrier(count, agent, block.agents)

    return step


def _invalidate(instruction: Instruction) -> Step:
    address, lanes = instruction.address(instruction.operands[0]), instruction.lanes()

    def step(warp: Warp) -> None:
        for place in np.unique(address(warp)[lanes(warp)]).tolist():
            barrier_at(warp, place)
            del warp.block.mbarriers[place - SHARED_BASE]

    return step


def _arrive(instruction: Instruction) -> Step:
    lanes, address = instruction.lanes(), instruction.address(instruction.operands[1])
    given = int(instruction.operands[2]) if len(instruction.operands) > 2 else None
    expects = "expect_tx" in instruction.parts
    count, expected_bytes = (1, given or 0) if expects else (1 if given is None else given, 0)

    def step(warp: Warp) -> None:
        places = address(warp)[lanes(warp)].tolist()
        for place in places:
            barrier_at(warp, place).arrive(warp.clock, count, expected_bytes)
        if places:
            warp.tick()

    return step


def _wait(instruction: Instruction) -> Step:
    """A wait goes on when the phase of that parity is complete, and is not tried again before."""
    put = instruction.write(instruction.operands[0])
    address, parity = instruction.address(instruction.operands[1]), instruction.read(instruction.operands[2], 32)

    def step(warp: Warp) -> Any:
        places, parities = np.unique(address(warp)), np.unique(parity(warp))
        if len(places) > 1 or len(parities) > 1:
            raise instruction.unknown("lanes that wait for different barriers")
        if parities[0] > 1:
            raise Finding("undefined", f"a wait for the parity {int(parities[0])}")
        barrier = barrier_at(warp, int(places[0]))
        if barrier.phase & 1 == parities[0]:
            return BLOCKED
        warp.clock = np.maximum(warp.clock, barrier.seen)
        put(warp, np.ones(32, bool))
        return None

    return step
