"""Races in a block's shared memory, and generic accesses that no fence orders before the asynchronous proxy's.

Every warp and every mbarrier is an agent with a clock; a warp's vector says up to which tick of each agent it has been
synchronised with. A unit of a few bytes remembers who wrote it last and at which tick, and when each warp read it last:
four bytes, or as few as the kernel's narrowest access has.
An access that is not ordered behind those is a race, whatever order this run happened to take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tests.machines.findings import Finding

if TYPE_CHECKING:
    from tests.machines.soft_gpu.machine import Warp

Array = Any
# Who accesses: ordinary instructions; TMA and wgmma; cp.async, which has waits of its own and is taken to need no
# fence, as triton places none between it and wgmma.
Proxy = Literal["generic", "async", "copy"]
_UNTIL_RELEASED = 2**30  # the tick of a read that is still going on


class SharedMemoryWatch:
    """Who wrote and read each unit of one block's shared memory."""

    def __init__(self, size: int, unit: int, warps: int) -> None:
        self.unit = unit
        units = size // unit + 1
        self._writer, self._written = np.zeros(units, np.int16), np.zeros(units, np.int32)
        self._read = np.zeros((units, warps), np.int32)
        # By generic accesses, not by TMA or wgmma, since the warp's last fence: 1 + the warp that wrote, who read.
        self._stored, self._loaded = np.zeros(units, np.int16), np.zeros((units, warps), bool)
        # Warps that have fenced for themselves what another warp stored, after they had been synchronised with it.
        self._fenced = np.zeros((units, warps), bool)
        self._held: list[list[Array]] = [[] for _ in range(warps)]
        self._warps = warps

    def units(self, offsets: Array, size: int) -> Array:
        """The units, each once, of ``size`` bytes at every offset; accesses are aligned, as far as units go."""
        first = offsets // self.unit
        return np.unique(first if size <= self.unit else first[..., None] + np.arange(size // self.unit))

    def read(self, warp: Warp, units: Array, proxy: Proxy, where: str = "") -> None:
        """``warp`` reads ``units``, or has TMA or wgmma read them."""
        writers = self._writer[units]
        early = self._written[units] > warp.clock[writers]
        if early.any():
            raise self._race("read", units, early, writers, where)
        self._read[units, warp.id] = warp.clock[warp.id]
        if proxy == "generic":
            self._loaded[units, warp.id] = True
        elif (stored := self._stored[units] * ~self._fenced[units, warp.id]).any():
            writer = int(stored.max()) - 1
            what = f"TMA or wgmma reads what warp {writer} stored, without fence.proxy.async in between"
            raise Finding("fence", what, where)

    def write(
        self, warp: Warp, units: Array, proxy: Proxy, where: str = "", *, by: tuple[int, int] | None = None,
        same: bool = False,
    ) -> None:  # fmt: skip
        """``warp`` writes ``units``, or has TMA write them: ``by`` is then the barrier's agent and its tick.

        ``same``: it writes the values that are there already, so that the order of two such writes does not matter.
        """
        writers = self._writer[units]
        early = self._written[units] > warp.clock[writers]
        if early.any() and not same:
            raise self._race("write", units, early, writers, where)
        unordered = self._read[units] > warp.clock[: self._warps]
        if unordered.any():
            i, reader = (int(n) for n in np.argwhere(unordered)[0])
            still = self._read[units[i], reader] == _UNTIL_RELEASED
            how = "is still read by wgmma or TMA for" if still else "is read at any time before or after by"
            what = f"write of shared byte {self.unit * int(units[i])}, which {how} warp {reader}"
            raise Finding("in flight" if still else "race", what, where)
        if proxy == "async" and (loaded := self._loaded[units].any(0)).any():
            reader = int(loaded.argmax())
            what = f"TMA writes over what warp {reader} loaded, without fence.proxy.async in between"
            raise Finding("fence", what, where)
        self._writer[units], self._written[units] = by or (warp.id, warp.clock[warp.id])
        self._read[units] = 0
        self._loaded[units] = self._fenced[units] = False
        self._stored[units] = warp.id + 1 if proxy == "generic" else 0

    def hold(self, warp: Warp, units: Array) -> None:
        """``warp`` reads ``units`` asynchronously from now until :meth:`release`."""
        self._held[warp.id].append(units)
        self._read[units, warp.id] = _UNTIL_RELEASED

    def release(self, warp: Warp, units: Array) -> None:
        """What :meth:`hold` began has ended; other reads of the same units may go on."""
        held = self._held[warp.id]
        del held[next(i for i, other in enumerate(held) if other is units)]
        self._read[units, warp.id] = warp.clock[warp.id]
        for other in held:
            self._read[other, warp.id] = _UNTIL_RELEASED

    def fence(self, warp: Warp) -> None:
        """fence.proxy.async: orders generic accesses before what is asynchronous and comes later.

        Those of ``warp`` before anybody's; what others stored, and ``warp`` was synchronised with, before its own.
        """
        self._stored[self._stored == warp.id + 1] = 0
        self._loaded[:, warp.id] = False
        stored = np.flatnonzero(self._stored)
        known = self._written[stored] <= warp.clock[self._writer[stored]]
        self._fenced[stored[known], warp.id] = True

    def _race(self, access: str, units: Array, early: Array, writers: Array, where: str) -> Finding:
        i = int(early.argmax())
        agent = int(writers[i])
        name = f"warp {agent}" if agent < self._warps else "TMA"
        byte = self.unit * int(units[i])
        return Finding(
            "race", f"{access} of shared byte {byte}, which {name} writes at any time before or after", where
        )
