"""Rates from known times, the floors that follow from them, and the maker's figures. No real speed decides here."""

import types

import pytest
import torch

from benchmarks.measure import ceilings as module
from benchmarks.measure.ceilings import ceilings, copy_rate, datasheet, floor_ms, matmul_rate, of_datasheet
from benchmarks.measure.spread import Spread
from benchmarks.measure.timing import Timing
from benchmarks.variants import Work

MEASURED = {
    "copy_tb_per_s": 2.0,
    "matmul_tflops": {"float32": 50.0, "bfloat16": 400.0},
    "datasheet": {"tb_per_s": 4.0, "matmul_tflops": {"float32": 67.0, "bfloat16": 800.0}},
}


@pytest.fixture
def stopwatch(monkeypatch):
    """Runs each step once; it takes ``p20`` milliseconds, and longer most of the time. ``calls`` are the devices'."""
    watch = types.SimpleNamespace(p20=lambda: 0.5, calls=[])

    def on(device):
        def time_steps(steps, peer, *, seconds):
            steps[peer]()
            watch.calls.append(device)
            fast = watch.p20()
            return {peer: Timing(Spread(2 * fast, fast, 3 * fast, fast, fast), None, None, None, None, None, 6)}

        return time_steps

    monkeypatch.setattr(module, "time_on_cpu", on("cpu"))
    monkeypatch.setattr(module, "time_on_cuda", on("cuda"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    return watch


def test_copy_rate_counts_bytes_read_and_written(stopwatch):
    assert copy_rate("cpu", mib=1) == pytest.approx(2 * 2**20 / 0.5e-3 / 1e12)
    assert stopwatch.calls == ["cpu"]


def test_matmul_rate_is_the_better_of_two_sizes(stopwatch):
    times = iter([1e-4, 1.0])  # the smaller product's rate is 156 times that of the larger
    stopwatch.p20 = lambda: next(times)
    assert matmul_rate("cpu", torch.float32, size=64) == pytest.approx(2 * 16**3 / 1e-7 / 1e12)
    times = iter([1e-4, 1e-4])
    assert matmul_rate("cpu", torch.float32, size=64) == pytest.approx(2 * 64**3 / 1e-7 / 1e12)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_matmul_rate_is_the_better_of_two_libraries(monkeypatch, stopwatch):
    """On this processor, and others, one of them does twice what the other does."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    times = iter([2.0, 1.0, 1e9, 1e9])
    stopwatch.p20 = lambda: next(times)
    assert matmul_rate("cpu", torch.float32, size=64) == pytest.approx(2 * 16**3 / 1e-3 / 1e12)
    assert len(stopwatch.calls) == 4


def test_matmul_rate_leaves_out_a_size_that_takes_too_long(stopwatch):
    """A dtype without instructions for it: 2 ms at a quarter of the size is 128 ms at the whole."""
    stopwatch.p20 = lambda: 2.0
    assert matmul_rate("cpu", torch.float16, size=64) == pytest.approx(2 * 16**3 / 2e-3 / 1e12)
    assert len(stopwatch.calls) == 1
    stopwatch.p20 = lambda: 1.0
    matmul_rate("cpu", torch.float16, size=64)
    assert len(stopwatch.calls) == 3


def test_ceilings_leave_out_a_dtype_without_products(monkeypatch, stopwatch):
    monkeypatch.setattr(module, "_SIZE", {"cpu": 32})
    monkeypatch.setattr(module, "_MIB", {"cpu": 1})
    found = ceilings("cpu", [torch.bfloat16, torch.bool, torch.float32, torch.bfloat16])
    assert list(found["matmul_tflops"]) == ["bfloat16", "float32"]
    assert found["copy_tb_per_s"] == copy_rate("cpu")
    assert found["datasheet"] is None
    assert len(stopwatch.calls) == 2 * 2 + 2


def test_ceilings_with_the_real_stopwatch(monkeypatch):
    monkeypatch.setattr(module, "_SIZE", {"cpu": 32})
    rate = matmul_rate("cpu", torch.float32, seconds=0.0)
    assert rate is not None
    assert rate > 0.0
    assert copy_rate("cpu", mib=1, seconds=0.0) > 0.0
    assert matmul_rate("cpu", torch.bool, seconds=0.0) is None


@pytest.mark.parametrize(
    ("work", "floor", "share"),
    [
        (Work(flops=1e12), 2.5, 1.25),  # 1e12 / 400e12 s, of 1 ms; 1e12 / 800e12 s
        (Work(moved_bytes=10**10), 5.0, 2.5),
        (Work(flops=1e12, moved_bytes=10**10), 5.0, 2.5),
        (Work(flops=4e12, moved_bytes=10**10), 10.0, 5.0),
        (Work(), None, None),
    ],
    ids=["flops", "bytes", "bytes-bind", "flops-bind", "nothing"],
)
def test_floor_is_the_longer_time(work, floor, share):
    assert floor_ms(work, "bfloat16", MEASURED) == (None if floor is None else pytest.approx(floor))
    assert of_datasheet(work, "bfloat16", 1.0, MEASURED) == (None if share is None else pytest.approx(share))
    assert of_datasheet(work, "bfloat16", 4.0, MEASURED) == (None if share is None else pytest.approx(share / 4))


def test_floor_is_none_where_a_rate_is_missing():
    both = Work(flops=1e12, moved_bytes=10**10)
    assert floor_ms(both, "float64", MEASURED) is None  # not "as fast as the copy": nobody knows
    assert floor_ms(Work(moved_bytes=10**10), "float64", MEASURED) == pytest.approx(5.0)
    assert floor_ms(both, "float32", {}) is None
    assert of_datasheet(both, "float32", 1.0, {**MEASURED, "datasheet": None}) is None
    assert of_datasheet(both, "float32", 1.0, {}) is None


@pytest.mark.parametrize(
    ("name", "tb_per_s", "half"),
    [("NVIDIA H100 80GB HBM3", 3.35, 989.0), ("NVIDIA H200", 4.8, 989.0), ("NVIDIA A100-SXM4-80GB", 2.039, 312.0)],
)
def test_datasheet_of_a_known_board(monkeypatch, name, tb_per_s, half):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    sheet = datasheet("cuda")
    assert sheet is not None
    assert sheet["tb_per_s"] == tb_per_s
    assert sheet["matmul_tflops"]["bfloat16"] == sheet["matmul_tflops"]["float16"] == half


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA L4"])
def test_datasheet_of_another_board_is_none(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert datasheet("cuda") is None


def test_datasheet_of_float32_follows_torchs_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for precision, rate in (("highest", 67.0), ("high", 495.0)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        sheet = datasheet("cuda")
        assert sheet is not None
        assert sheet["matmul_tflops"]["float32"] == rate
