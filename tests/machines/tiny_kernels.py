"""Kernels of a few lines, right ones and wrong ones, on which a machine shows what it sees."""

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn_kernels.attention.hopper.compat import gluon, tma_load, tma_store, tma_store_wait


@triton.jit
def _double_kernel(x_ptr, y_ptr, size, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    """``y = 2 x``, a block of elements a program; without the guard the last program writes behind the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size)
    tl.store(y_ptr + i, 2 * x, mask=(i < size) if GUARDED else (i < size + 1))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Every program adds its sum to ``y[0]``."""
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    if ATOMIC:
        tl.atomic_add(y_ptr, total)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + total)


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    """``c = a @ b`` of one tile, by wgmma."""
    i = tl.arange(0, N)
    places = i[:, None] * N + i[None, :]
    tl.store(c_ptr + places, tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places)))


@gluon.jit
def _fill_and_store(desc, tile, FAULT: gl.constexpr):
    """A tile of ones, through shared memory and TMA."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    tile.store(gl.full([64, 32], 1.0, gl.float32, layout))
    fence_async_shared()
    tma_store(desc, [0, 0], tile)
    if FAULT != "store not waited for":
        tma_store_wait(0)


@gluon.jit
def _copy(source, target, tile, ready, FAULT: gl.constexpr):
    """A tile by TMA to shared memory, plus one, and back."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    mbarrier.expect(ready, source.block_type.nbytes * (2 if FAULT == "bytes" else 1))
    tma_load(source, [0, 0], ready, tile)
    if FAULT != "load not waited for":
        mbarrier.wait(ready, 0)
    plus_one = tile.load(layout) + 1.0
    if FAULT == "over-arrival":
        mbarrier.arrive(ready, count=2)
    tile.store(plus_one)
    fence_async_shared()
    tma_store(target, [0, 0], tile)
    tma_store_wait(0)


@gluon.jit
def _tiles_kernel(source, target, LOADS: gl.constexpr, FAULT: gl.constexpr):
    """A tile written by ordinary stores, or copied, by one program."""
    tile = gl.allocate_shared_memory(gl.float32, [64, 32], target.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    if LOADS:
        _copy(source, target, tile, ready, FAULT)
    else:
        _fill_and_store(target, tile, FAULT)


def double(guarded: bool) -> torch.Tensor:
    x, y = torch.arange(1000.0), torch.full((1000,), torch.nan)
    _double_kernel[(4,)](x, y, x.numel(), GUARDED=guarded, BLOCK=256)
    return y


def total(atomic: bool) -> torch.Tensor:
    y = torch.zeros(1)
    _sum_kernel[(6,)](torch.arange(6 * 128.0), y, ATOMIC=atomic, BLOCK=128)
    return y


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.full((64, 64), torch.nan)
    _product_kernel[(1,)](a, b, c, N=64)
    return c


def tiles(loads: bool, fault: str = "") -> torch.Tensor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    x, y = torch.arange(64.0 * 32).view(64, 32), torch.full((64, 32), torch.nan)
    source, target = (TensorDescriptor.from_tensor(t, [64, 32], layout) for t in (x, y))
    _tiles_kernel[(1,)](source, target, LOADS=loads, FAULT=fault, num_warps=4)
    return y
