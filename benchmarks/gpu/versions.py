"""``python -m benchmarks.gpu.versions``: what this machine has, as JSON; asked in a process of its own, since a driver
may hang."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.gpu import cache

TOOLS = ("nvidia-smi", "ncu", "compute-sanitizer", "gcc")
PACKAGES = ("numpy", "pytest", "pytest-xdist", "expecttest", "flash-attn", "flash-attn-3", "xformers", "liger-kernel")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Date, environment, what compiled kernels depend on, where tools are, and which packages there are."""
    try:
        compiler = cache.describe()
    except ImportError as error:
        compiler = {"triton": None, "reason": str(error)}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "has_gpu": torch.cuda.is_available(),
        "environment": environment(),
        "compiler": compiler,
        "tools": {name: shutil.which(name) for name in TOOLS},
        "packages": {name: _version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    print(json.dumps(versions()))
