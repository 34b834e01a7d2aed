"""Launches: triton compiles for sm_90 up to PTX, its own launcher calls a stand-in libcuda, and the blocks run here.

:func:`install` is called once, before the first launch, in a process that does not interpret.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import machines

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("driver.c")
BUILD = ROOT / "build" / "machines" / "ptx"
_RESIDENT = 4  # the most blocks that run side by side

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p)
)


class _Launch:
    """The launch under way: the tensors it was given, and what went wrong with it."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.error: BaseException | None = None


_launch = _Launch()


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    """The tensors among a kernel's arguments: alone, in tuples, behind descriptors."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from _tensors(argument)
        elif hasattr(argument, "base"):
            yield from _tensors([argument.base])


def _on_launch(
    ptx: bytes, name: bytes, grid_x: int, grid_y: int, grid_z: int, threads: int, shared: int, parameters: Any
) -> int:
    try:
        with np.errstate(all="ignore"):
            run(ptx.decode(), name.decode(), (grid_x, grid_y, grid_z), threads, shared, parameters, _launch.tensors)
    except BaseException as error:  # nothing may pass through the launcher's C; `launch` raises it behind
        _launch.error = error
        return 1
    return 0


def run(
    ptx: str, name: str, grid: tuple[int, int, int], threads: int, shared: int, parameters: Any,
    tensors: list[torch.Tensor],
) -> None:  # fmt: skip
    """Run every block of a grid: a few side by side, in an order that :func:`tests.machines.order` decides."""
    from tests.machines.soft_gpu.instructions import load
    from tests.machines.soft_gpu.machine import Block
    from tests.machines.soft_gpu.memory import GlobalMemory

    program = load(ptx, name)
    if threads != program.threads:
        raise ValueError(f"threads={threads}: {name} was compiled for {program.threads}")
    values = [ctypes.string_at(parameters[i], size) for i, (_, size) in enumerate(program.parameters)]
    memory, seed = GlobalMemory(tensors), machines.order()
    choice = random.Random(f"{seed} {name}")
    waiting = [
        (x, y, z) for z in reversed(range(grid[2])) for y in reversed(range(grid[1])) for x in reversed(range(grid[0]))
    ]
    resident: list[Block] = []
    while waiting or resident:
        if waiting and len(resident) < _RESIDENT:
            place = waiting.pop()
            resident.append(Block(program, values, place, grid, shared, memory, f"{seed} {name} {place}"))
        elif not (block := choice.choice(resident)).advance():
            resident.remove(block)


def install() -> None:
    """Make triton compile for sm_90 and launch here."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(_build().parent)
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "cache"))  # modules that end at PTX are of no use elsewhere
    library = ctypes.CDLL(str(_build()), mode=ctypes.RTLD_GLOBAL)  # by its soname, which triton opens, it is found
    library.soft_gpu_on_launch(_callback)

    import triton
    from triton.backends.nvidia import compiler, driver

    # The driver is handed the PTX itself, as it may be on a GPU: no time goes into ptxas.
    compiler.CUDABackend.make_cubin = lambda self, src, *_: src.encode() + b"\0"  # type: ignore[method-assign]

    class Launcher(driver.CudaLauncher):
        """triton's own, which hands over the tensors and raises what went wrong."""

        def __call__(self, *arguments: Any) -> None:
            _launch.tensors, _launch.error = list(_tensors(arguments)), None
            try:
                super().__call__(*arguments)
            except RuntimeError:
                if _launch.error is None:
                    raise
            finally:
                _launch.tensors = []
            if _launch.error is not None:
                error, _launch.error = _launch.error, None
                raise error

    class Driver(driver.CudaDriver):
        """triton's own, of one H200 whose memory is the process's."""

        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            answers: dict[str, Any] = {
                "get_device_capability": (9, 0), "get_current_device": 0, "get_current_stream": 0,
                "set_current_device": None,
            }  # fmt: skip
            for name, value in answers.items():
                setattr(self, name, lambda *_, value=value: value)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())


_callback = _CALLBACK(_on_launch)  # the library keeps its address: it has to live as long


@functools.cache
def _build() -> Path:
    """The stand-in libcuda, compiled where its source has changed, with the compiler that triton itself needs."""
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    key = hashlib.sha256(SOURCE.read_bytes() + triton.__version__.encode()).hexdigest()[:16]
    library = BUILD / f"driver-{key}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [
                compiler,
                "-shared",
                "-fPIC",
                "-O1",
                f"-Wl,-soname,{library.name}",
                f"-I{headers}",
                str(SOURCE),
                "-o",
                str(made),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler} does not compile {SOURCE.name}:\n{done.stderr}")
            made.replace(library)
    return library
