"""Triton's own CUDA driver and launcher on a libcuda that only counts, so that launches cost the host what they do on a
GPU.

:func:`install` is called once, before the first launch, in a process that does not interpret. Kernels are compiled for
sm_90 and loaded. The tensors that they are launched on lie in the process's own memory, and nothing reads or writes
them: so no result can be checked. The same launches are proved elsewhere (docs/proof.md).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("libcuda.c")
_BUILD = Path(__file__).parents[2] / "build" / "host"


class Counter:
    """The launches since the counter was last reset, the first 4096 of them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stand_in_kernel.restype = ctypes.c_void_p

    def reset(self) -> None:
        """Begin to count anew."""
        self._library.stand_in_reset()

    @property
    def launches(self) -> list[str]:
        """The name of the kernel of each launch, in their order."""
        return [ctypes.string_at(kernel).decode() for kernel in self._kernels()]

    @property
    def kernels(self) -> int:
        """How many compiled kernels these are: one function of the source may be compiled several times."""
        return len(set(self._kernels()))

    def _kernels(self) -> list[int]:
        return [self._library.stand_in_kernel(i) for i in range(self._library.stand_in_launches())]


def install() -> Counter:
    """Make triton compile for sm_90 and launch on the library that counts; fastattn takes tensors of the CPU for a
    GPU's."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(_library().parent)
    # triton's launcher opens libcuda.so.1, and finds the one that was opened before under this name
    library = ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from fastattn.ops.common import backends

    class Driver(CudaDriver):
        """Triton's own, of one H200 whose memory is the process's."""

        def __init__(self) -> None:
            super().__init__()
            # torch answers these on a GPU, in C and within a tenth of a microsecond
            answers: dict[str, Any] = {
                "get_device_capability": (9, 0),
                "get_current_device": 0,
                "get_current_stream": 0,
            }
            for name, value in answers.items():
                setattr(self, name, lambda *_, value=value: value)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    backends.DEVICES = ("cpu",)
    return Counter(library)


@functools.cache
def _library() -> Path:
    """The library, compiled where its source has changed, with the C compiler that triton needs, too.

    Raises:
        RuntimeError: it does not compile; the message holds what the compiler says.
    """
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    key = hashlib.sha256(_SOURCE.read_bytes() + triton.__version__.encode()).hexdigest()[:16]
    library = _BUILD / key / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            options = ["-shared", "-fPIC", "-O2", f"-Wl,-soname,{library.name}", f"-I{headers}"]
            compiler = os.environ.get("CC", "cc")
            done = subprocess.run([compiler, *options, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler} does not compile {_SOURCE.name}:\n{done.stderr}")
            made.replace(library)
    return library
