"""Where and on what a measurement was made."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def _first_line(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else None


def _changes() -> str | bool:
    """A mark of what differs from the commit; False where nothing does."""
    try:
        run = subprocess.run(["git", "diff", "HEAD"], cwd=Path(__file__).parent, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return hashlib.sha1(run.stdout).hexdigest()[:10] if run.returncode == 0 and run.stdout else False


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def load() -> float:
    """Processes that wanted a core over the last minute."""
    return os.getloadavg()[0]


def environment() -> dict[str, Any]:
    """Versions, devices, threads, load and commit."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "modified": _changes(),
        "backend": os.environ.get("FASTATTN_BACKEND", "auto"),
        "kernels": os.environ.get("FASTATTN_KERNELS", "auto"),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _first_line("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"),
        }
    return facts
