"""What the machine can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure.timing import Timing, time_on_cpu, time_on_cuda
from benchmarks.variants import Work

_MIB = {"cuda": 512, "cpu": 128}  # of a copy's source: more than the caches hold
_SIZE = {"cuda": 8192, "cpu": 1024}  # of a product's square matrices
_LONGEST_SECONDS = 0.1  # of one product: a CPU that lacks the instructions for a dtype takes seconds

# TB/s, and dense TFLOP/s in 16 bits, TF32, float32 and float64, from NVIDIA's datasheets of the H100 and the H200 (SXM;
# they give the rates of sparse matrices, twice these) and of the A100 80GB (SXM). Boards of other names differ.
_DATASHEETS = {
    "NVIDIA H100 80GB HBM3": (3.35, (989.0, 495.0, 67.0, 67.0)),
    "NVIDIA H200": (4.8, (989.0, 495.0, 67.0, 67.0)),
    "NVIDIA A100-SXM4-80GB": (2.039, (312.0, 156.0, 19.5, 19.5)),
}


# ------------------------------------------------------------------------------------------------------------- measured


def ceilings(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """The machine's rates: of a copy, and of a matrix product in each dtype that has one; and those of its datasheet.

    Returns:
        ``{"copy_tb_per_s": rate, "matmul_tflops": {dtype name: rate}, "datasheet": as of datasheet()}``.
    """
    rates = {str(dtype).removeprefix("torch."): matmul_rate(device, dtype) for dtype in dict.fromkeys(dtypes)}
    return {
        "copy_tb_per_s": copy_rate(device),
        "matmul_tflops": {name: rate for name, rate in rates.items() if rate is not None},
        "datasheet": datasheet(device),
    }


def copy_rate(device: str, *, mib: int | None = None, seconds: float = 0.3) -> float:
    """TB/s of copying a tensor, the bytes read and those written counted."""
    source = torch.ones((mib or _MIB[torch.device(device).type]) << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fast_seconds(lambda: target.copy_(source), device, seconds) / 1e12


def matmul_rate(device: str, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.3) -> float | None:
    """TFLOP/s of a product of square matrices, in torch's current precision; None where the dtype has none.

    The best of two sizes, the larger one only where it does not take too long, and on a CPU of two libraries: on some
    processors oneDNN, which convolutions and recurrences run on, does twice what the BLAS behind ``matmul`` does.
    """
    size = size or _SIZE[torch.device(device).type]
    rates: list[float] = []
    for edge in (size // 4, size):
        flops = 2.0 * edge**3
        if rates and flops / max(rates) / 1e12 > _LONGEST_SECONDS:
            break
        for product in _products(edge, dtype, device):
            try:
                rates.append(flops / _fast_seconds(product, device, seconds / 4) / 1e12)
            except RuntimeError:  # not implemented, or no memory for it
                continue
    return max(rates, default=None)


def _products(edge: int, dtype: torch.dtype, device: str) -> list[Callable[[], object]]:
    """Of random numbers: with equal ones a GPU draws less power, and is faster than it ever will be."""
    generator = torch.Generator(device).manual_seed(edge)
    left, right = (torch.randn(edge, edge, device=device, generator=generator).to(dtype) for _ in range(2))
    products: list[Callable[[], object]] = [functools.partial(torch.matmul, left, right)]
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        with contextlib.suppress(RuntimeError):  # a dtype that it does not have
            products.append(functools.partial(F.linear, left.to_mkldnn(), right.to_mkldnn()))
    return products


def _fast_seconds(step: Callable[[], object], device: str, seconds: float) -> float:
    """The 20th percentile: a ceiling is what the machine can do, not what others left of it meanwhile."""
    step()
    time_steps = time_on_cuda if torch.device(device).type == "cuda" else time_on_cpu
    timing = time_steps({"step": step}, "step", seconds=seconds)["step"]
    assert isinstance(timing, Timing)  # without a limit nothing is too slow
    return timing.wall_ms.p20 / 1e3


def datasheet(device: str) -> dict[str, Any] | None:
    """The maker's figures by the device's name: ``{"tb_per_s": rate, "matmul_tflops": {dtype name: rate}}``.

    That of float32 is the tensor cores' in TF32 where torch may use them for products, else that without them.
    """
    if torch.device(device).type != "cuda":
        return None
    sheet = _DATASHEETS.get(torch.cuda.get_device_name(device))
    if sheet is None:
        return None
    tb_per_s, (half, tf32, single, double) = sheet
    single = single if torch.get_float32_matmul_precision() == "highest" else tf32
    rates = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return {"tb_per_s": tb_per_s, "matmul_tflops": rates}


# --------------------------------------------------------------------------------------------------- what follows of it


def floor_ms(work: Work, dtype_name: str, ceilings: dict[str, Any]) -> float | None:
    """Milliseconds that the measured rates ask for at least; None where the work or a rate that it needs is missing."""
    return _floor_ms(work, dtype_name, ceilings.get("copy_tb_per_s"), ceilings.get("matmul_tflops"))


def of_datasheet(work: Work, dtype_name: str, milliseconds: float, ceilings: dict[str, Any]) -> float | None:
    """The least time by the datasheet's rates over the time that was taken: 1 is as fast as the maker says."""
    sheet = ceilings.get("datasheet") or {}
    floor = _floor_ms(work, dtype_name, sheet.get("tb_per_s"), sheet.get("matmul_tflops"))
    return None if floor is None else floor / milliseconds


def _floor_ms(
    work: Work, dtype_name: str, tb_per_s: float | None, matmul_tflops: dict[str, float] | None
) -> float | None:
    """The longer of the two times: a step that reads, computes and writes at once takes no less."""
    times = []
    for amount, rate in ((work.flops, (matmul_tflops or {}).get(dtype_name)), (work.moved_bytes, tb_per_s)):
        if amount is not None:
            if not rate:
                return None
            times.append(amount / rate / 1e9)
    return max(times, default=None)
