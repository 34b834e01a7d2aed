"""The machine ``ptx`` sees what it is for: tiny kernels, right ones and wrong ones, through triton's own launcher."""

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import machines
from tests.machines.findings import Finding

pytest.importorskip("triton", reason="triton is not installed")

from tests.machines.soft_gpu import launcher
from tests.machines.soft_gpu.races import SharedMemoryWatch
from tests.machines.tiny_kernels import double, product, tiles, total

pytestmark = pytest.mark.skipif(
    machines.NAME != "ptx", reason=f"the machine is {machines.NAME}: {machines.VARIABLE}=ptx"
)


def test_kernels_compute_what_they_say() -> None:
    assert torch.equal(double(guarded=True), 2 * torch.arange(1000.0))
    assert total(atomic=True).item() == 768 * 767 / 2
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    torch.testing.assert_close(product(a, b), a.float() @ b.float())
    assert torch.equal(tiles(loads=True), torch.arange(64.0 * 32).view(64, 32) + 1)
    assert torch.equal(tiles(loads=False), torch.ones(64, 32))


FAULTS: dict[str, Any] = {
    "out of bounds": lambda: double(guarded=False),
    "race": lambda: total(atomic=False),
    "unfinished": lambda: tiles(False, "store not waited for"),
    "deadlock": lambda: tiles(True, "bytes"),
    "over-arrival": lambda: tiles(True, "over-arrival"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_fail_the_launch_with_their_kind_and_place(kind: str) -> None:
    with pytest.raises(Finding) as found:
        FAULTS[kind]()
    assert found.value.kind == kind
    assert kind == "unfinished" or re.search(r"line \d+ of the PTX of .*tiny_kernels\.py:\d+", str(found.value))


def test_missing_fence_fails_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out of the PTX: since 3.7 triton itself puts a fence where the source lacks one."""
    run = launcher.run
    monkeypatch.setattr(launcher, "run", lambda ptx, *rest: run(re.sub(r"fence\.proxy\.async\S*;", "", ptx), *rest))
    with pytest.raises(Finding, match=r"fence: .* reads what warp . stored"):
        tiles(loads=False)


@pytest.mark.parametrize("fenced_by", ["writer", "reader", "another", "reader before it knows", "nobody"])
def test_fence_counts_between_the_store_and_the_product_that_reads(fenced_by: str) -> None:
    """Of the warp that stored, or of the one that reads, once it is synchronised with the other."""
    writer, reader, another = warps = [SimpleNamespace(id=i, clock=np.array([1, 1, 1], np.int32)) for i in range(3)]
    for warp in warps:
        warp.clock[[i for i in range(3) if i != warp.id]] = 0
    watch: Any = SharedMemoryWatch(64, 4, 3)
    units = np.arange(4)
    watch.write(writer, units, "generic")
    if fenced_by == "reader before it knows":
        watch.fence(reader)
    for warp in (reader, another):
        warp.clock[0] = 1  # as behind a bar.sync
    if fenced_by in ("writer", "reader", "another"):
        watch.fence({"writer": writer, "reader": reader, "another": another}[fenced_by])
    if fenced_by in ("writer", "reader"):
        watch.read(reader, units, "async")
    else:
        with pytest.raises(Finding, match="fence: TMA or wgmma reads what warp 0 stored"):
            watch.read(reader, units, "async")


def test_what_has_not_landed_races_with_its_reader() -> None:
    with pytest.raises(Finding, match=r"race: read of shared byte .* which TMA writes"):
        tiles(True, "load not waited for")


@pytest.mark.parametrize("seed", range(3))
def test_order_of_events_is_drawn_from_a_seed(seed: int) -> None:
    with machines.order_of_events(seed):
        assert torch.equal(tiles(loads=True), torch.arange(64.0 * 32).view(64, 32) + 1)


def test_what_it_does_not_execute_is_named() -> None:
    """A form of an instruction that nobody has written a step for fails where it is executed, by name."""
    ptx = """.visible .entry odd(
    .param .u64 odd_param_0
)
.reqntid 32
{
    .reg .f32 %f<2>;
    add.rz.f32 %f1, 0f00000000, 0f00000000;
    ret;
}
"""
    with pytest.raises(NotImplementedError, match=r"\.rz: line 7 of the PTX of odd"):
        launcher.run(ptx, "odd", (1, 1, 1), 32, 0, (ctypes.c_void_p * 1)(ctypes.addressof(ctypes.c_uint64(0))), [])
