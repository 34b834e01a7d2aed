"""What emulated kernels hold and wait for: tiles, pointers, shared memory, descriptors; barriers, products, copies."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.kernels.hopper.emulated_block import Copy, this_block, this_task


class Tile(torch.Tensor):
    """A tile, or a scalar, of a kernel: a torch tensor with the methods and the integer division that Triton has."""

    def to(self, dtype: torch.dtype, bitcast: bool = False, **_: Any) -> Any:  # type: ignore[override]
        return self.contiguous().view(dtype) if bitcast else super().to(dtype)

    def split(self) -> Any:  # type: ignore[override]
        return self[..., 0], self[..., 1]

    def __floordiv__(self, other: Any) -> Any:
        return torch.div(self, other, rounding_mode="trunc")

    def __rfloordiv__(self, other: Any) -> Any:
        return torch.div(tile(other), self, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Any:
        return torch.fmod(self, other)


def tile(value: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(value, dtype=dtype).as_subclass(Tile)


class Pointer:
    """A pointer, or a tile of them: elements of a flat buffer."""

    def __init__(self, buffer: torch.Tensor, offset: Any = 0) -> None:
        self.buffer, self.offset = buffer, offset
        self.dtype = types.SimpleNamespace(element_ty=buffer.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.buffer, tile(self.offset) + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.buffer, tile(self.offset) - offset)

    def _elements(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offset = tile(self.offset).long()
        if mask is None:
            mask = torch.ones_like(offset, dtype=torch.bool)
        offset, mask = torch.broadcast_tensors(offset, tile(mask))
        used = offset[mask]
        if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < self.buffer.numel()):
            raise IndexError(f"elements {int(used.min())} to {int(used.max())} of {self.buffer.numel()}")
        return torch.where(mask, offset, 0), mask

    def load(self, mask: Any = None, other: Any = None) -> Any:
        offset, mask = self._elements(mask)
        loaded = self.buffer[offset]
        return tile(torch.where(mask, loaded, poison(self.buffer.dtype) if other is None else other)).to(loaded.dtype)

    def store(self, value: Any, mask: Any = None) -> None:
        offset, mask = self._elements(mask)
        self.buffer[offset[mask]] = torch.broadcast_to(tile(value), offset.shape)[mask].to(self.buffer.dtype)

    def atomic_add(self, value: Any) -> Any:
        """What stood there before."""
        before = self.load()
        self.store(before + value)
        return before


def poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


class SharedMemory:
    """A descriptor of shared memory: a view of a buffer."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))
    type = property(lambda self: types.SimpleNamespace(shape=self.shape))

    def index(self, i: Any) -> SharedMemory:
        return SharedMemory(self.data[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> SharedMemory:
        return SharedMemory(self.data.narrow(dim, int(start), length))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any = None) -> SharedMemory:
        return SharedMemory(self.data.view(dtype).view(*shape))

    def load(self, layout: Any = None) -> Any:
        this_block().wait("a load from shared memory", patient=True)  # whoever may overwrite it goes first
        return tile(self.data.clone())

    def store(self, value: Any) -> None:
        if value.shape != self.data.shape:
            raise ValueError(f"a tile of {list(value.shape)} stored to shared memory of {self.shape}")
        self.data.copy_(value)


class Descriptor:
    """A tensor descriptor: boxes of a tensor, zero past its ends."""

    def __init__(self, host: Any) -> None:
        self.tensor = torch.as_strided(host.base, tuple(host.shape), tuple(host.strides))
        self.block_shape, self.layout, self.dtype = list(host.block_shape), host.layout, self.tensor.dtype
        nbytes = self.tensor.element_size() * int(torch.tensor(self.block_shape).prod())
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=self.block_shape)
        self.nbytes_per_cta = nbytes

    def box(self, start: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The box's part of the tensor, and where in the box that is."""
        source, inside = [], []
        for first, length, size in zip(start, self.block_shape, self.tensor.shape, strict=True):
            low = min(max(first, 0), size)
            high = max(min(first + length, size), low)
            source.append(slice(low, high))
            inside.append(slice(low - first, high - first) if high > low else slice(0, 0))
        return tuple(source), tuple(inside)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes announced are there."""

    def __init__(self, name: str) -> None:
        self.name, self.phase, self.count, self.pending, self.bytes = name, 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, nbytes: int) -> None:
        if not self.count:
            raise RuntimeError(f"{self.name} is used before it is initialised")
        self.pending -= arrivals
        self.bytes += nbytes
        if self.pending < 0:
            raise RuntimeError(f"{self.name}: more arrivals than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def wait(self, parity: int) -> None:
        what = f"{self.name} to end a phase of parity {parity} ({self.phase} have ended)"
        this_block().wait(what, lambda: self.phase % 2 != parity)


class Barriers:
    """An allocation of mbarriers."""

    def __init__(self, shape: Sequence[int], name: str) -> None:
        self.shape = list(shape)
        self.barriers = [Barrier(f"{name}[{i}]") for i in range(shape[0])]

    type = property(lambda self: types.SimpleNamespace(shape=self.shape))

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class ProductInFlight:
    """What an asynchronous wgmma returns: no tile until a wait retires it, and of no other use."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute, self._result = compute, None

    def result(self) -> Any:
        if self._result is None:
            self._result = self._compute()
        return self._result


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, is_async: bool = False, precision: Any = None,
    max_num_imprecise_acc: Any = None,
) -> Any:  # fmt: skip
    def compute() -> Any:
        left = a.data if isinstance(a, SharedMemory) else a
        product = tile(left.float() @ b.data.float())
        if not use_acc:
            return product
        return product + (acc.result() if isinstance(acc, ProductInFlight) else acc)

    product = ProductInFlight(compute)
    if not is_async:
        return product.result()
    this_task().products.append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    this_block().wait("its products", patient=True)
    products = this_task().products
    while len(products) > num_outstanding:
        products.popleft().result()
    in_flight = set(map(id, products))
    results = [dep.result() if isinstance(dep, ProductInFlight) and id(dep) not in in_flight else dep for dep in deps]
    return results[0] if len(results) == 1 else tuple(results)


def tma_load(
    descriptor: Descriptor, coord: Sequence[Any], barrier: Barrier, destination: SharedMemory, pred: Any = True
) -> None:  # fmt: skip
    if not pred:
        return
    start = [int(c) for c in coord]
    data = destination.data.view(descriptor.block_shape)
    data.fill_(poison(data.dtype))

    def land() -> None:
        source, inside = descriptor.box(start)
        data.zero_()
        data[inside] = descriptor.tensor[source]
        barrier.change(0, -descriptor.block_type.nbytes)

    this_block().copies.append(Copy(land, this_block().rng.random() < 0.5))


def tma_store(descriptor: Descriptor, coord: Sequence[Any], source: SharedMemory, add: bool = False) -> None:
    start = [int(c) for c in coord]
    data = source.data.view(descriptor.block_shape)

    def read() -> None:
        box, inside = descriptor.box(start)
        values = data[inside].to(descriptor.dtype)
        descriptor.tensor[box] = descriptor.tensor[box] + values if add else values

    this_task().stores.append(read)


def tma_reduce_add(descriptor: Descriptor, coord: Sequence[Any], source: SharedMemory) -> None:
    tma_store(descriptor, coord, source, add=True)


def tma_store_wait(pendings: int = 0) -> None:
    this_block().wait("its stores", patient=True)
    stores = this_task().stores
    while len(stores) > pendings:
        stores.popleft()()


def warp_specialize(
    partitions: Sequence[tuple[Any, Sequence[Any]]], worker_num_warps: Sequence[int], worker_num_regs: Any = None
) -> None:  # fmt: skip
    block, warps = this_block(), [this_task().warps, *worker_num_warps]
    tasks = [
        block.start(lambda f=function, a=arguments: f(*a), f"{function.__name__} {i}", count)
        for i, ((function, arguments), count) in enumerate(zip(partitions, warps, strict=True))
    ]
    block.wait("its partitions", lambda: all(task.done for task in tasks))
