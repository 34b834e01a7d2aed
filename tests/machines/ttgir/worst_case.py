"""What a GPU may do at worst to a warp-specialised program, and what the program does wrong then.

- a TMA load spoils its tile when it is issued, and lands late, in any order;
- a wgmma may read its operands, and a TMA store its tile, until it is waited for: whoever changes them earlier is
  wrong, and so is whoever uses a product's result earlier;
- what generic accesses have written, wgmma and TMA may read, and what they have touched, TMA may overwrite, only behind
  a ``fence_async_shared`` of the partition that accessed it;
- barriers count arrivals: one too many is wrong; nobody able to go on is a deadlock;
- partitions take turns at every operation that has to do with shared memory, in an order that is drawn;
- shared memory starts as NaN, and a partition may not end while its own products or stores are under way.

Not modelled: layouts and swizzles, what threads of a partition do to each other, registers, time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ttsem import ops as ttsem_ops
from ttsem.ir_types import Op, Region
from ttsem.values import Barrier, MemDesc

from tests.machines.findings import Finding
from tests.machines.ttgir.interpreter import Interpreter
from tests.machines.ttgir.partitions import Partitions
from tests.machines.ttgir.repairs import OPERATIONS, Handler, reduce_into

ops: Any = ttsem_ops  # which says of no value what it is

_SWITCH = 0.35  # how often a partition gives its turn away at an operation on shared memory
# These only hand a value on: a product in flight may pass through them.
_PASSIVE = {
    "ttng.warp_group_dot", "ttng.warp_group_dot_wait", "cf.br", "cf.cond_br", "scf.yield", "scf.for", "scf.while",
    "scf.condition", "scf.if", "ttg.warp_yield", "ttg.warp_return",
}  # fmt: skip

OPERATIONS_AT_WORST: dict[str, Handler] = dict(OPERATIONS)


def _operation(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        OPERATIONS_AT_WORST.update(dict.fromkeys(names, handler))
        return handler

    return register


# ---------------------------------------------------------------------------------------------------- what is under way


@dataclasses.dataclass(eq=False)
class Load:
    """A TMA load that has not landed."""

    tile: np.ndarray
    block: np.ndarray
    barrier: Barrier

    def land(self) -> None:
        self.tile[...] = self.block
        self.barrier.complete_tx(self.tile.nbytes)


class Product(NamedTuple):
    """An asynchronous wgmma: its operands in shared memory, as they were, and its result."""

    op: Op
    operands: list[tuple[np.ndarray, np.ndarray]]
    result: np.ndarray


class Store(NamedTuple):
    """A TMA store that may still read its tile."""

    op: Op
    tile: np.ndarray
    before: np.ndarray
    write: Callable[[np.ndarray], None]


@dataclasses.dataclass
class _Marks:
    """A byte for each byte of an allocation: which partitions have touched it without a fence since."""

    of: np.ndarray  # keeps the allocation alive, and so its address its own
    written: np.ndarray
    read: np.ndarray


class _Barrier(Barrier):
    """An mbarrier that refuses what it does not count."""

    def arrive(self, n: int = 1) -> None:
        self._refuse_more_than_pending(n)
        super().arrive(n)

    def expect(self, nbytes: int) -> None:
        self._refuse_more_than_pending(1)
        super().expect(nbytes)

    def _refuse_more_than_pending(self, n: int) -> None:
        if n > self.pending:
            raise OverflowError(f"{n} arrivals at a barrier that waits for {self.pending} of {self.count}")


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return np.may_share_memory(one, other) and np.shares_memory(one, other)


def _allocation(view: np.ndarray) -> np.ndarray:
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def _spoil(tile: np.ndarray) -> None:
    """NaN, or what is one in bfloat16, or a large number."""
    if tile.dtype.kind == "f":
        tile[...] = np.nan
    else:
        tile[...] = 0x7FC0 if tile.dtype == np.uint16 else np.iinfo(tile.dtype).max if tile.dtype.kind in "iu" else True


# ------------------------------------------------------------------------------------------------------ the interpreter


class WorstCase(Interpreter):
    """Runs a program of partitions as unhelpfully as a GPU may."""

    operations = OPERATIONS_AT_WORST

    def run(self, fn: str, args: list[Any], program_id: tuple[int, int, int] = (0, 0, 0)) -> list[Any]:
        self.mbarriers.clear()
        self.loads: list[Load] = []
        self.products: dict[int, list[Product]] = {}  # by partition
        self.stores: dict[int, list[Store]] = {}
        self.marks: dict[int, _Marks] = {}  # by the address of the allocation
        self.partitions: Partitions | None = None
        self.patience = self.rng.choice((0.1, 0.2, 0.3))
        result = super().run(fn, args, program_id)
        self.end_partition("the program")
        if self.loads:
            raise Finding("unfinished", f"program {program_id} ends while {len(self.loads)} TMA loads are under way")
        return result

    # ------------------------------------------------------------------------------------------------------ partitions

    @property
    def me(self) -> int:
        """The number of the partition that runs: the default one is 0, and is all there is outside."""
        if self.partitions is None:
            return 0
        assert self.partitions.current is not None
        return self.partitions.members.index(self.partitions.current)

    def run_scheduled(
        self, default: Region, default_args: list[Any], tasks: list[tuple[str, Region, list[Any]]]
    ) -> Any:
        scopes = list(self.scopes)
        self.partitions = Partitions(self.rng, self.loads)

        def body(name: str, region: Region, arguments: list[Any]) -> Callable[[], Any]:
            def run() -> Any:
                self.scopes = list(scopes)
                results = self.run_region(region, list(arguments))
                self.end_partition(name)
                return results

            return run

        first = self.partitions.start("the default partition", body("the default partition", default, default_args))
        for name, region, arguments in tasks:
            self.partitions.start(name, body(name, region, arguments))
        try:
            self.partitions.run()
        finally:
            self.partitions = None
        return first.result

    def end_partition(self, name: str) -> None:
        """Nothing that a partition has started may outlive it."""
        for what, started in (("products", self.products), ("TMA stores", self.stores)):
            if left := started.get(self.me):
                raise self.find("unfinished", f"{name} ends while {len(left)} {what} are under way", left[0].op)

    def block_until(self, ready: Callable[[], bool], what: str) -> None:
        if ready():
            return
        if self.partitions is not None:
            self.partitions.wait(ready, lambda: what)
            return
        while not ready():  # a program without partitions waits for its own copies only
            if not self.loads:
                raise Finding("deadlock", f"the program waits for {what}, and nothing is under way")
            self.loads.pop(self.rng.randrange(len(self.loads))).land()

    def eval_op(self, op: Op) -> None:
        flying = self.products.get(self.me) if self.products else None
        if flying and op.operands and op.name not in _PASSIVE:
            results = {id(product.result) for product in flying}
            if any(id(self.value(name)) in results for name in op.operands):
                raise self.find("in flight", "the result of a wgmma is used before it is waited for", op)
        try:
            super().eval_op(op)
        except OverflowError as error:
            raise self.find("over-arrival", str(error), op) from error
        if self.partitions is not None and op.name in _POINTS and self.rng.random() < _SWITCH:
            self.partitions.wait(lambda: True, lambda: "", patient=self.rng.random() < self.patience)

    # --------------------------------------------------------------------------------------------------- shared memory

    def in_flight(self, tile: np.ndarray, *, of: str) -> str:
        """What is under way that forbids to write (``of="write"``) or to read a tile; empty if nothing."""
        if any(_overlap(load.tile, tile) for load in self.loads):
            return "a TMA load is landing in it"
        if of == "write":
            if any(_overlap(store.tile, tile) for each in self.stores.values() for store in each):
                return "a TMA store may still read it"
            if any(_overlap(operand, tile) for operand, _ in self._operands()):
                return "a wgmma may still read it"
        return ""

    def _operands(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (operand for each in self.products.values() for product in each for operand in product.operands)

    def marks_of(self, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The marks of a tile's bytes: written, and read."""
        allocation = _allocation(tile)
        address = allocation.__array_interface__["data"][0]
        marks = self.marks.get(address)
        if marks is None or marks.of is not allocation:
            zeros = (np.zeros(allocation.nbytes, np.uint8) for _ in range(2))
            marks = self.marks[address] = _Marks(allocation, *zeros)
        start = tile.__array_interface__["data"][0] - address
        shape, strides = (*tile.shape, tile.itemsize), (*tile.strides, 1)
        written, read = (
            np.lib.stride_tricks.as_strided(each[start:], shape, strides) for each in (marks.written, marks.read)
        )
        return written, read

    def touch(self, tile: np.ndarray, *, written: bool) -> None:
        """A generic access of this partition."""
        marks = self.marks_of(tile)[0 if written else 1]
        marks |= np.uint8(1 << self.me)

    def need_fence(self, tile: np.ndarray, op: Op, *, over: bool = False) -> None:
        """The asynchronous proxy reads a tile, or writes ``over`` it."""
        written, read = self.marks_of(tile)
        if written.any() or (over and read.any()):
            what = "written or read" if over else "written"
            raise self.find("fence", f"the tile was {what} by generic accesses, and no fence_async_shared followed", op)


_POINTS = {
    "ttng.arrive_barrier", "ttng.barrier_expect", "ttng.wait_barrier", "ttng.async_tma_copy_global_to_local",
    "ttng.async_tma_copy_local_to_global", "ttng.async_tma_reduce", "ttng.async_tma_store_wait", "ttng.warp_group_dot",
    "ttng.warp_group_dot_wait", "ttg.local_store", "ttg.local_load", "ttng.fence_async_shared",
}  # fmt: skip


# --------------------------------------------------------------------------------------------- generic accesses, fences


@_operation("ttg.local_alloc")
def _local_alloc(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    result = ops.OPS["ttg.local_alloc"](interp, op, args)
    if args:
        interp.touch(result[0].data, written=True)
    else:
        _spoil(result[0].data)
    return result


@_operation("ttg.local_store")
def _local_store(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    tile = args[1].data
    if why := interp.in_flight(tile, of="write"):
        raise interp.find("in flight", f"a tile is written while {why}", op)
    interp.touch(tile, written=True)
    return ops.OPS["ttg.local_store"](interp, op, args)


@_operation("ttg.local_load")
def _local_load(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    tile = args[0].data
    if why := interp.in_flight(tile, of="read"):
        raise interp.find("in flight", f"a tile is read while {why}", op)
    interp.touch(tile, written=False)
    return ops.OPS["ttg.local_load"](interp, op, args)


@_operation("ttng.fence_async_shared")
def _fence(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    others = np.uint8(255 ^ (1 << interp.me))
    for marks in interp.marks.values():
        marks.written &= others
        marks.read &= others
    return []


# ------------------------------------------------------------------------------------------------------------- barriers


def _barrier(interp: WorstCase, op: Op, tile: MemDesc) -> Barrier:
    found = interp.mbarriers.get(ops._barrier_key(tile))
    if found is None:
        raise interp.find("undefined", "a barrier is used before it is initialised", op)
    return found


@_operation("ttng.init_barrier")
def _init_barrier(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    count = int(op.attrs["count"])  # type: ignore[call-overload]
    interp.mbarriers[ops._barrier_key(args[0])] = _Barrier(count=count, pending=count)
    return []


@_operation("ttng.arrive_barrier", "ttng.barrier_expect")
def _arrive(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    _barrier(interp, op, args[0])
    return ops.OPS[op.name](interp, op, args)


@_operation("ttng.wait_barrier")
def _wait(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    tile, phase, predicate, _ = ops._segments(op, args, 4)
    if predicate and not bool(np.asarray(predicate[0])):
        return []
    barrier, parity = _barrier(interp, op, tile[0]), int(np.asarray(phase[0])) & 1
    what = f"a barrier to end a phase of parity {parity} at {interp.source.place(op)}"
    interp.block_until(lambda: barrier.passes(parity), what)
    return []


# ------------------------------------------------------------------------------------------------------------------ TMA


@_operation("ttng.async_tma_copy_global_to_local")
def _tma_load(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    descriptor, coordinates, offsets, barrier, destination, predicate = ops._segments(op, args, 6)
    if predicate and not bool(np.asarray(predicate[0])):
        return []
    if offsets:
        raise NotImplementedError(f"{op.name} with offsets of a window: only tiled loads are modelled")
    tile = destination[0].data
    if why := interp.in_flight(tile, of="write"):
        raise interp.find("in flight", f"TMA loads into a tile while {why}", op)
    interp.need_fence(tile, op, over=True)
    addresses, inside = ops._desc_pointers(descriptor[0], coordinates)
    block = ops._desc_block(interp, descriptor[0], addresses, inside, tile.dtype)
    interp.loads.append(Load(tile, block, _barrier(interp, op, barrier[0])))
    _spoil(tile)
    return []


@_operation("ttng.async_tma_copy_local_to_global", "ttng.async_tma_reduce")
def _tma_store(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    descriptor, coordinates, tile = args[0], [np.array(each) for each in args[1:-1]], args[-1].data
    if why := interp.in_flight(tile, of="read"):
        raise interp.find("in flight", f"TMA stores a tile while {why}", op)
    interp.need_fence(tile, op)

    def write(block: np.ndarray) -> None:
        if op.name == "ttng.async_tma_reduce":
            reduce_into(interp, descriptor, block, coordinates, ops._reduce_kind(op))
        else:
            addresses, inside = ops._desc_pointers(descriptor, coordinates)
            interp.memory.store(addresses, block, inside)

    interp.stores.setdefault(interp.me, []).append(Store(op, tile, tile.copy(), write))
    return []


@_operation("ttng.async_tma_store_wait")
def _tma_store_wait(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    started = interp.stores.get(interp.me, [])
    while len(started) > ops._int_attr(op, "pendings"):
        store = started.pop(0)
        if store.tile.tobytes() != store.before.tobytes():
            raise interp.find("in flight", "the tile has changed under a TMA store", store.op)
        store.write(store.tile)
    return []


# ------------------------------------------------------------------------------------------------------------- products


@_operation("ttng.warp_group_dot")
def _product(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    operands = []
    for tile in (arg.data for arg in args[:2] if isinstance(arg, MemDesc)):
        if why := interp.in_flight(tile, of="read"):
            raise interp.find("in flight", f"a wgmma reads a tile while {why}", op)
        interp.need_fence(tile, op)
        operands.append((tile, tile.copy()))
    results = OPERATIONS["ttng.warp_group_dot"](interp, op, args)
    if op.attrs.get("isAsync"):
        interp.products.setdefault(interp.me, []).append(Product(op, operands, results[0]))
    return results


@_operation("ttng.warp_group_dot_wait")
def _product_wait(interp: WorstCase, op: Op, args: list[Any]) -> list[Any]:
    started = interp.products.get(interp.me, [])
    while len(started) > ops._int_attr(op, "pendings"):
        product = started.pop(0)
        for tile, before in product.operands:
            if tile.tobytes() != before.tobytes():
                raise interp.find("in flight", "an operand has changed while the wgmma was under way", product.op)
    return list(args[: len(op.result_types)])
