"""``python -m fastattn``: what a bug report needs: versions, devices, what would run and why not the rest, settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import fastattn

SHAPE = (2, 8, 1024, 64)  # [B, H, L, D] of a typical call
# Where settings come from that change what runs, or how: every variable whose name begins so is shown.
VARIABLES = ("FASTATTN_", "TRITON_", "TORCH", "PYTORCH_", "CUDA_", "HIP_", "ROCR_", "OMP_", "MKL_")


def report() -> Iterator[str]:
    """The lines, one by one: should one of them fail, those before it have been said."""
    yield f"fastattn {fastattn.__version__} in {Path(fastattn.__file__).parent}"
    yield f"python {platform.python_version()} ({platform.python_implementation()}) on {platform.platform()}"
    runtimes = [f"{name} {v}" for name in ("cuda", "hip", "xpu") if (v := getattr(torch.version, name, None))]
    yield f"torch {torch.__version__}, built for {' '.join(runtimes) or 'CPU only'}"
    yield _triton()
    yield f"cpu: {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = list(devices())
    yield from found or ["no GPU"]
    device = torch.accelerator.current_accelerator(check_available=True) if found else None
    yield from _typical_call(device or torch.device("cpu"))
    yield (
        f"torch's switches: float32 products in {torch.get_float32_matmul_precision()!r} precision, deterministic "
        f"algorithms {'on' if torch.are_deterministic_algorithms_enabled() else 'off'}"
    )
    settings = sorted(f"{name}={value!r}" for name, value in os.environ.items() if name.startswith(VARIABLES))
    yield f"environment: {' '.join(settings) or 'nothing set of ' + ', '.join(f'{name}*' for name in VARIABLES)}"


def _triton() -> str:
    """Its version, and where it keeps what it has compiled."""
    try:
        import triton
        from triton import knobs
    except ModuleNotFoundError as error:
        return "triton is not installed" if error.name == "triton" else f"triton cannot be imported: {error!r}"
    except Exception as error:  # a half-installed one may raise anything, and that is what the report is for
        return f"triton cannot be imported: {error!r}"
    there = Path(knobs.cache.dir)
    return f"triton {triton.__version__}, its cache is {there}{'' if there.is_dir() else ' (which does not exist yet)'}"


def devices() -> Iterator[str]:
    """A line for each GPU."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            arch = gpu.gcnArchName if torch.version.hip else f"capability {gpu.major}.{gpu.minor}"
            memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
            yield f"cuda:{index}: {gpu.name}, {arch}, {memory}"
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            yield f"xpu:{index}: {torch.xpu.get_device_name(index)}"


def _typical_call(device: torch.device) -> Iterator[str]:
    """Which backend and kernels a call in training would run on, and why not the others."""
    query, key, value = (torch.empty(SHAPE, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    yield f"a causal call in training, {list(SHAPE)} in bfloat16 on {device}:"
    for line in str(fastattn.explain(query, key, value, is_causal=True)).splitlines():
        yield f"  {line}"


if __name__ == "__main__":
    for line in report():
        print(line, flush=True)
