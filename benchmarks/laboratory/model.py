"""How fast the loops of a wgmma kernel can be on sm_90, from their machine code: two models, for ranking variants.

``bound`` adds up what one turn of the loop takes of each pipe; the busiest one bounds the rate. ``replay`` runs the
turns of all warpgroups against each other, and sees besides what they wait for and the port of the shared memory, from
which products take their operands too. Neither knows latencies of L2 and memory or a clock that throttles: plus or
minus 15 %.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from benchmarks.laboratory.sass import Instruction, Loop

CLOCK_HERTZ = 1.55e9  # what an H100 holds under matrix products
MULTIPROCESSORS = 132
FLOP_PER_CYCLE = 4096  # of the tensor cores of one multiprocessor, dense, 16 bits
PEAK_TERAFLOPS = MULTIPROCESSORS * FLOP_PER_CYCLE * CLOCK_HERTZ / 1e12

# Opcodes by the pipe of a sub-partition (a quarter of a multiprocessor) that executes them.
_COMPARISONS = {"FMNMX", "VIMNMX", "IMNMX", "ISETP", "FSETP", "SEL", "FSEL"}
_ALU = _COMPARISONS | {"PRMT", "LOP3", "PLOP3", "IADD3", "VIADD", "SHF", "LEA", "F2FP", "I2F", "F2I"}
_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "FFMA2"}
_SHARED = {"SHFL", "LDS", "STS", "LDSM", "STSM"}
_MEMORY = {"LDG", "STG", "LDL", "STL", "RED", "REDG", "ATOMG", "ATOMS", "LDGSTS", "LDC"}


def product_cycles(product: Instruction) -> float:
    """How long ``HGMMA.64xNxK`` takes all tensor cores of the multiprocessor: N / 2 cycles, at 32 bytes of K of any
    type."""
    return _columns(product) / 2


def _columns(product: Instruction) -> int:
    match = re.search(r"\d+x(\d+)x\d+", product.opcode)
    assert match, product
    return int(match[1])


def _pipe(step: Instruction) -> tuple[str, int]:
    """The pipe that executes it beside the issue slot, and the cycles that it takes of that for one warp."""
    if step.name in _ALU:
        return "alu", 2
    if step.name in _FMA:
        return "fma", 1
    if step.name == "MUFU":
        return "mufu", 8
    if step.name in _SHARED:
        return "memory", 4
    if step.name in _MEMORY:
        return "memory", 8
    return "issue", 1


# ------------------------------------------------------------------------------------------------------- by the pipes


@dataclasses.dataclass(frozen=True)
class Bound:
    """One turn of a loop, by its pipes.

    Attributes:
        tensor_cycles: of the products of one warpgroup.
        pipe_cycles: of the pipes of a sub-partition, for all warpgroups.
        exposed_cycles: which one warpgroup (in step: all at once) spends while it has no product in flight.
        cycles: a turn of all warpgroups takes at least.
        teraflops: of all multiprocessors at that rate, of products executed.
        exponentials: in the turn.
        hidden_exponentials: of these, issued under a product in flight.
    """

    tensor_cycles: float
    pipe_cycles: dict[str, int]
    exposed_cycles: int
    cycles: float
    teraflops: float
    exponentials: int
    hidden_exponentials: int

    @property
    def overlap(self) -> float | None:
        """The share of the exponentials that products hide; None: there are none."""
        return self.hidden_exponentials / self.exponentials if self.exponentials else None


def bound(loop: Loop, warpgroups: int = 2, in_step: bool = False) -> Bound:
    """The shortest turn of ``warpgroups`` that all run this loop and wait for nothing but their own products; if
    ``in_step``, for each other once a turn as well, so that none multiplies while another one does something else."""
    pipes: dict[str, int] = dict.fromkeys(("issue", "alu", "fma", "mufu", "memory"), 0)
    tensor, exponentials, hidden, exposed_stalls, exposed_mufu = 0.0, 0, 0, 0, 0
    in_flight = _groups_in_flight_after(loop, 0)  # what one turn leaves, the next begins with
    for step in loop.instructions:
        pipe, cycles = _pipe(step)
        if pipe != "issue":
            pipes[pipe] += cycles
        pipes["issue"] += 1
        if step.name == "HGMMA":
            tensor += product_cycles(step)
        in_flight = _groups_after(step, in_flight)
        if step.opcode.startswith("MUFU.EX2"):
            exponentials += 1
            hidden += in_flight > 0
        if in_flight == 0:
            exposed_stalls += step.stall
            exposed_mufu += cycles if step.name == "MUFU" else 0
    together = warpgroups if in_step else 1
    exposed = max(exposed_stalls, exposed_mufu * together)
    pipes = {pipe: cycles * warpgroups for pipe, cycles in pipes.items()}
    cycles = max(tensor * warpgroups, *pipes.values(), tensor * together + exposed)
    teraflops = PEAK_TERAFLOPS * tensor * warpgroups / cycles
    return Bound(tensor, pipes, exposed, cycles, teraflops, exponentials, hidden)


def _groups_after(step: Instruction, in_flight: int) -> int:
    if step.commits:
        return in_flight + 1
    return in_flight if step.groups_left is None else min(in_flight, step.groups_left)


def _groups_in_flight_after(loop: Loop, in_flight: int) -> int:
    for step in loop.instructions:
        in_flight = _groups_after(step, in_flight)
    return in_flight


# -------------------------------------------------------------------------------------------------------- by a replay

_PORT_BYTES_PER_CYCLE = 128
_WARPS = 4  # of a warpgroup: each runs in a sub-partition of its own
_LATENCY_CYCLES = 24  # from a product's end, or an arrival at a barrier, to who waits for it
_BARRIER_CYCLES = 20
_QUEUE_CYCLES = 200  # how far accesses of shared memory may lag behind their issue
_TURNS, _WARM_UP = 40, 10


class HandOver(NamedTuple):
    """Two warpgroups meet once a turn: the ``wait``-th wait of the loop at a barrier, counted from 0, is for the
    ``arrival``-th arrival of the other one in the same turn."""

    wait: int
    arrival: int = 0


@dataclasses.dataclass(frozen=True)
class Replay:
    """A turn of all warpgroups, on the average of many.

    Attributes:
        cycles: of a turn.
        tensor_busy: the share in which tensor cores multiply.
        port_busy: the share in which the port of the shared memory moves bytes.
    """

    cycles: float
    tensor_busy: float
    port_busy: float

    @property
    def teraflops(self) -> float:
        """Of all multiprocessors, of products executed."""
        return PEAK_TERAFLOPS * self.tensor_busy


_Kind = Literal["product", "wait for products", "wait", "arrive", "sync", "mufu", "shared", "alu", "other"]


class _Step(NamedTuple):
    kind: _Kind
    stall: int
    tensor_cycles: float = 0.0
    port_cycles: float = 0.0
    commits: bool = False
    groups_left: int = 0


def _steps(loop: Loop) -> list[_Step]:
    return [_step(instruction) for instruction in loop.instructions]


def _step(step: Instruction) -> _Step:
    stall = max(step.stall, 1)
    if step.name == "HGMMA":
        # 32 bytes of each of N columns, and of 64 rows where the left operand is not in registers
        from_registers = re.match(r"R\d+, R\d+, gdesc", step.operands)
        operand_bytes = 32 * _columns(step) + (0 if from_registers else 32 * 64)
        return _Step("product", stall, product_cycles(step), operand_bytes / _PORT_BYTES_PER_CYCLE, step.commits)
    if step.groups_left is not None:
        return _Step("wait for products", stall, groups_left=step.groups_left)
    if step.name == "SYNCS" and "TRYWAIT" in step.opcode:
        return _Step("wait", stall)
    if step.name == "SYNCS" and "ARRIVE" in step.opcode:
        return _Step("arrive", stall)
    if step.name == "BAR":
        return _Step("sync", stall)
    if step.name == "MUFU":
        return _Step("mufu", stall)
    if step.name in ("LDS", "STS", "STSM", "LDSM", "LDL", "STL", "LDGSTS"):
        return _Step("shared", stall, port_cycles=_WARPS * _wavefronts(step))
    if step.name in _ALU:
        return _Step("alu", max(stall, 2))
    return _Step("other", stall)


def _wavefronts(step: Instruction) -> int:
    """Turns of the port that an access of shared memory takes one warp. LDS.64 counts once: such loads are of numbers
    of a row, which eight lanes share."""
    if ".128" in step.opcode or "88.4" in step.opcode:
        return 4
    return 2 if step.name == "STS" and ".64" in step.opcode else 1


@dataclasses.dataclass
class _Warpgroup:
    """Where one warpgroup is in its loop."""

    steps: list[_Step]
    time: float
    position: int = 0
    turn: int = 0
    group_end: float = 0.0  # of the products that no group has been made of yet
    groups: list[float] = dataclasses.field(default_factory=list)  # when each of those in flight ends
    waits: int = 0
    arrivals: int = 0
    handed_over: dict[int, float] = dataclasses.field(default_factory=dict)  # turn -> time
    blocked: bool = False
    turn_ends: list[float] = dataclasses.field(default_factory=list)

    def retire(self, groups_left: int) -> float:
        """Wait until so many groups are in flight; the time when that is so."""
        retired = len(self.groups) - groups_left
        if retired <= 0:
            return self.time
        end = self.groups[retired - 1] + _LATENCY_CYCLES
        del self.groups[:retired]
        return max(self.time, end)

    def advance(self, time: float) -> None:
        self.time = time
        self.position += 1
        if self.position == len(self.steps):
            self.turn_ends.append(time)
            self.position, self.waits, self.arrivals = 0, 0, 0
            self.turn += 1

    def cycles_per_turn(self) -> float:
        return (self.turn_ends[-1] - self.turn_ends[_WARM_UP - 1]) / (len(self.turn_ends) - _WARM_UP)


class _Multiprocessor:
    """When each shared resource is free again, and how long two of them worked."""

    def __init__(self, warpgroups: list[_Warpgroup], hand_over: HandOver | None, slowed: float) -> None:
        self.warpgroups = warpgroups
        self.hand_over = hand_over
        self.slowed = slowed  # how much longer the port takes, because copies from global memory want it, too
        self.issue = self.tensor = self.port = self.mufu = 0.0
        self.tensor_worked = self.port_worked = 0.0

    def run(self) -> None:
        """All turns of all warpgroups; who is furthest behind goes next."""
        while min(warpgroup.turn for warpgroup in self.warpgroups) < _TURNS:
            ready = [w for w in self.warpgroups if w.turn < _TURNS and not w.blocked]
            assert ready, "all wait for each other: the hand-over does not fit the loop"
            self._execute(min(ready, key=lambda warpgroup: warpgroup.time))

    def _execute(self, warpgroup: _Warpgroup) -> None:
        step = warpgroup.steps[warpgroup.position]
        if step.kind == "wait" and self.hand_over is not None and warpgroup.waits == self.hand_over.wait:
            (other,) = (w for w in self.warpgroups if w is not warpgroup)
            if warpgroup.turn not in other.handed_over:
                warpgroup.blocked = True
                return
            warpgroup.time = max(warpgroup.time, other.handed_over[warpgroup.turn] + _LATENCY_CYCLES)
        time = max(warpgroup.time, self.issue)
        self.issue = time + 1
        if step.kind == "product":
            start = max(time, self.tensor, self.port)
            self.tensor = start + step.tensor_cycles
            self.port = start + step.port_cycles * self.slowed
            self.tensor_worked += step.tensor_cycles
            self.port_worked += step.port_cycles
            warpgroup.group_end = max(self.tensor, self.port)
            if step.commits:
                warpgroup.groups.append(warpgroup.group_end)
        elif step.kind == "wait for products":
            warpgroup.time = time
            time = warpgroup.retire(step.groups_left)
        elif step.kind == "mufu":
            time = max(time, self.mufu)
            self.mufu = time + 8
        elif step.kind == "shared":
            self.port = max(self.port, time) + step.port_cycles * self.slowed
            self.port_worked += step.port_cycles
            time = max(time, self.port - _QUEUE_CYCLES)
        elif step.kind == "sync":
            time += _BARRIER_CYCLES
        elif step.kind == "wait":
            warpgroup.waits += 1
            time += 12
        elif step.kind == "arrive":
            self._arrive(warpgroup, time)
        warpgroup.advance(time + step.stall)

    def _arrive(self, warpgroup: _Warpgroup, time: float) -> None:
        if self.hand_over is not None and warpgroup.arrivals == self.hand_over.arrival:
            warpgroup.handed_over[warpgroup.turn] = time
            for other in self.warpgroups:
                other.blocked = False
        warpgroup.arrivals += 1


def replay(loops: Sequence[Loop], copied_bytes: float = 0.0, hand_over: HandOver | None = None) -> Replay:
    """Let one warpgroup run each of ``loops``, whose turns belong together.

    Args:
        loops: one for each warpgroup.
        copied_bytes: that come from global memory into shared memory for a turn of all of them (TMA).
        hand_over: where two of them meet.
    Returns:
        The median over several delays between their starts, where nothing ties them together.
    """
    delays = (0,) if hand_over is not None else (0, 300, 700, 1100)
    found = sorted((_replay(loops, copied_bytes, hand_over, delay) for delay in delays), key=lambda r: r.cycles)
    return found[len(found) // 2]


def _replay(loops: Sequence[Loop], copied_bytes: float, hand_over: HandOver | None, delay: int) -> Replay:
    copy_cycles = copied_bytes / _PORT_BYTES_PER_CYCLE
    cycles = 3000.0  # a guess: how much of the port is left depends on how long a turn takes, and the other way round
    for _ in range(4):
        warpgroups = [_Warpgroup(_steps(loop), float(delay * index)) for index, loop in enumerate(loops)]
        machine = _Multiprocessor(warpgroups, hand_over, slowed=1 / max(0.3, 1 - copy_cycles / cycles))
        machine.run()
        before, cycles = cycles, max(warpgroup.cycles_per_turn() for warpgroup in warpgroups)
        if abs(cycles - before) < 2:
            break
    port_cycles = machine.port_worked / _TURNS + copy_cycles
    return Replay(cycles, machine.tensor_worked / _TURNS / cycles, port_cycles / cycles)
