"""Races in a block's shared memory, and generic accesses that no fence orders before the asynchronous proxy's.

Every warp and every mbarrier is an agent with a clock; a warp's vector says up to which tick of each agent it has been
synchronised with. A word of four bytes remembers who wrote it last and at which tick, and when each warp read it last.
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
    """Who wrote and read each word of one block's shared memory."""

    def __init__(self, size: int, warps: int) -> None:
        words = size // 4 + 1
        self._writer, self._written = np.zeros(words, np.int16), np.zeros(words, np.int32)
        self._read = np.zeros((words, warps), np.int32)
        # By generic accesses, not by TMA or wgmma, since the warp's last fence: 1 + the warp that wrote, who read.
        self._stored, self._loaded = np.zeros(words, np.int16), np.zeros((words, warps), bool)
        self._held: list[list[Array]] = [[] for _ in range(warps)]
        self._warps = warps

    def read(self, warp: Warp, words: Array, proxy: Proxy, where: str = "") -> None:
        """``warp`` reads ``words``, or has TMA or wgmma read them."""
        writers = self._writer[words]
        early = self._written[words] > warp.clock[writers]
        if early.any():
            raise self._race("read", words, early, writers, where)
        self._read[words, warp.id] = warp.clock[warp.id]
        if proxy == "generic":
            self._loaded[words, warp.id] = True
        elif (stored := self._stored[words]).any():
            writer = int(stored.max()) - 1
            what = f"TMA or wgmma reads what warp {writer} stored, without fence.proxy.async in between"
            raise Finding("fence", what, where)

    def write(
        self, warp: Warp, words: Array, proxy: Proxy, where: str = "", *, by: tuple[int, int] | None = None,
        same: bool = False,
    ) -> None:  # fmt: skip
        """``warp`` writes ``words``, or has TMA write them: ``by`` is then the barrier's agent and its tick.

        ``same``: it writes the values that are there already, so that the order of two such writes does not matter.
        """
        writers = self._writer[words]
        early = self._written[words] > warp.clock[writers]
        if early.any() and not same:
            raise self._race("write", words, early, writers, where)
        unordered = self._read[words] > warp.clock[: self._warps]
        if unordered.any():
            i, reader = (int(n) for n in np.argwhere(unordered)[0])
            still = self._read[words[i], reader] == _UNTIL_RELEASED
            how = "is still read by wgmma or TMA for" if still else "is read at any time before or after by"
            what = f"write of shared byte {4 * int(words[i])}, which {how} warp {reader}"
            raise Finding("in flight" if still else "race", what, where)
        if proxy == "async" and (loaded := self._loaded[words].any(0)).any():
            reader = int(loaded.argmax())
            what = f"TMA writes over what warp {reader} loaded, without fence.proxy.async in between"
            raise Finding("fence", what, where)
        self._writer[words], self._written[words] = by or (warp.id, warp.clock[warp.id])
        self._read[words] = 0
        self._loaded[words] = False
        self._stored[words] = warp.id + 1 if proxy == "generic" else 0

    def hold(self, warp: Warp, words: Array) -> None:
        """``warp`` reads ``words`` asynchronously from now until :meth:`release`."""
        self._held[warp.id].append(words)
        self._read[words, warp.id] = _UNTIL_RELEASED

    def release(self, warp: Warp, words: Array) -> None:
        """What :meth:`hold` began has ended; other reads of the same words may go on."""
        held = self._held[warp.id]
        del held[next(i for i, other in enumerate(held) if other is words)]
        self._read[words, warp.id] = warp.clock[warp.id]
        for other in held:
            self._read[other, warp.id] = _UNTIL_RELEASED

    def fence(self, warp: Warp) -> None:
        """fence.proxy.async: orders the generic accesses of ``warp`` before what is asynchronous and comes later."""
        self._stored[self._stored == warp.id + 1] = 0
        self._loaded[:, warp.id] = False

    def _race(self, access: str, words: Array, early: Array, writers: Array, where: str) -> Finding:
        i = int(early.argmax())
        agent = int(writers[i])
        name = f"warp {agent}" if agent < self._warps else "TMA"
        byte = 4 * int(words[i])
        return Finding(
            "race", f"{access} of shared byte {byte}, which {name} writes at any time before or after", where
        )
