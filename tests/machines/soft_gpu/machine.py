"""A block of warps that run in random turns, each lane by lane where it has diverged."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.machines.findings import Finding
from tests.machines.soft_gpu.memory import GlobalMemory
from tests.machines.soft_gpu.operands import BLOCKED, FINISHED, LANES, UNWRITTEN, Array
from tests.machines.soft_gpu.products import Product
from tests.machines.soft_gpu.program import Program
from tests.machines.soft_gpu.races import SharedMemoryWatch

_TURNS = (50, 300, 4000)  # the most instructions of a warp's turn: short ones reorder more, long ones cost less
_BARRIERS = 64  # the most mbarriers of a block
_GONE = 2**31 - 1  # the place of a lane that has returned


class Warp:
    """32 lanes: their registers, the place in the program, and what they have begun and not yet waited for."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.id = block, index
        self.thread_ids = LANES + np.uint32(32 * index)
        self.registers: dict[int, Array] = defaultdict(lambda: UNWRITTEN)
        self.place, self.executed, self.done = 0, 0, False
        # Lanes that go different ways: the place of each; which are at the instruction under way; who jumps where.
        self.places: Array | None = None
        self.active: Array | None = None
        self.jump: tuple[Array, int] | None = None
        # How far each agent's clock has been seen: races.py.
        self.clock = np.zeros(block.agents, np.int32)
        self.clock[index] = 1
        self.waiting: tuple[int, int] | None = None  # for a barrier of the block, and its how many-th completion
        # wgmma: results under way by register, what has not been committed, groups that have.
        self.accumulators: dict[int, Array] = {}
        self.products: list[Product] = []
        self.product_groups: deque[list[Product]] = deque()
        # TMA stores by lane, and cp.async, likewise.
        self.stores: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.store_groups: dict[int, deque[list[Callable[[], None]]]] = defaultdict(deque)
        self.copies: list[Callable[[], None]] = []
        self.copy_groups: deque[list[Callable[[], None]]] = deque()

    def tick(self) -> None:
        """What comes now is later than what others have been told of."""
        self.clock[self.id] += 1

    def run(self, budget: int) -> None:
        """Execute up to ``budget`` instructions, or until this warp has to wait."""
        steps = self.block.program.steps
        while budget and not self.done:
            budget -= 1
            index = self.place
            try:
                if self.places is not None:
                    self._run_diverged(steps)
                    continue
                result = steps[index](self)
            except (Finding, NotImplementedError) as error:
                if isinstance(error, Finding) and not error.where:
                    raise Finding(error.kind, error.what, self.block.program.where(self.place)) from None
                raise
            except Exception as error:
                raise RuntimeError(f"warp {self.id}: {error!r}: {self.block.program.where(self.place)}") from error
            if self.jump is not None:
                lanes, target = self.jump
                self.jump = None
                self.places = np.where(lanes, target, index + 1)
            elif result is None:
                self.place = index + 1
            elif result is BLOCKED:
                return
            elif result is FINISHED:
                self.done = True
            else:
                self.place = result
            self.executed += 1

    def _run_diverged(self, steps: list[Any]) -> None:
        """One instruction for the lanes that are furthest behind, before any that all lanes have to reach together."""
        assert self.places is not None
        self.executed += 1
        places = [int(place) for place in np.unique(self.places) if place != _GONE]
        together = self.block.program.together
        self.place = next((place for place in places if not together[place]), places[0])
        self.active = self.places == self.place
        if self.active.all():
            self.places = self.active = None
            return
        if together[self.place]:
            lanes = np.nonzero(self.active)[0].tolist()
            raise Finding(
                "undefined", f"warp {self.id} has diverged: lanes {lanes} alone get to what all execute together"
            )
        result = steps[self.place](self)
        following = np.full(32, self.place + 1)
        if result is FINISHED:
            following[:] = _GONE
        elif result is not None:
            following[:] = result
        if self.jump is not None:
            lanes, target = self.jump
            self.jump = None
            following[lanes] = target
        self.places = np.where(self.active, following, self.places)
        self.active = None
        self.done = bool((self.places == _GONE).all())


class Block:
    """One block: its warps, shared memory that starts as NaN, barriers, and copies that are under way."""

    def __init__(
        self, program: Program, parameters: list[bytes], place: tuple[int, int, int], grid: tuple[int, int, int],
        shared: int, memory: GlobalMemory, seed: str,
    ) -> None:  # fmt: skip
        self.program, self.parameters, self.place, self.grid, self.memory = program, parameters, place, grid, memory
        self.id = place[0] + grid[0] * (place[1] + grid[1] * place[2])
        self.random = random.Random(seed)
        self.shared = np.full(shared, 0xFF, np.uint8)
        self.agents = program.warps + _BARRIERS
        self.watch = SharedMemoryWatch(shared, program.shared_unit, program.warps)
        self.mbarriers: dict[int, Any] = {}
        self.mbarriers_made = 0
        self.barriers: dict[int, Any] = {}
        self.landing: list[Callable[[], None]] = []  # TMA loads, which land in any order
        self.free_registers = 0  # of a warp, by setmaxnreg
        self.warp_registers = [program.registers] * program.warps
        self.warps = [Warp(self, i) for i in range(program.warps)]
        self._live = list(self.warps)

    def advance(self) -> bool:
        """A turn for every warp, in random order, between copies that land; whether the block has more to do."""
        progressed = False
        self.random.shuffle(self._live)
        for warp in self._live:
            before = warp.executed
            warp.run(self.random.choice(_TURNS))
            progressed |= warp.executed != before
            if self.landing and self.random.random() < 0.15:
                self._land()
                progressed = True
        self._live = [warp for warp in self._live if not warp.done]
        if self._live and not progressed:
            if not self.landing:
                self._deadlock()
            self._land()
        if not self._live:
            self._end()
        return bool(self._live)

    def _land(self) -> None:
        self.landing.pop(self.random.randrange(len(self.landing)))()

    def _deadlock(self) -> None:
        waiting = [
            f"warp {warp.id} at {self.program.where(warp.place)}"
            for warp in sorted(self._live, key=lambda warp: warp.id)
        ]
        raise Finding("deadlock", f"all of block {self.place} that has not ended waits:\n  " + "\n  ".join(waiting))

    def _end(self) -> None:
        where = f"the end of block {self.place} of {self.program.name}"
        if self.landing:
            raise Finding("unfinished", f"{len(self.landing)} TMA loads are under way", where)
        for warp in self.warps:
            if warp.products or any(warp.product_groups):
                raise Finding("unfinished", f"warp {warp.id} has not waited for its wgmma", where)
            if any(warp.stores.values()) or any(group for groups in warp.store_groups.values() for group in groups):
                raise Finding(
                    "unfinished", f"warp {warp.id} has not waited for its TMA stores to read shared memory", where
                )
