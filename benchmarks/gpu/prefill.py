"""``python -m benchmarks.gpu.prefill --out FILE``: what the two calls launch, compiled without a GPU, as one archive.

Run it with the Python, triton and ptxas of the machine with the GPU, as ``make gpu-cache`` does. Nothing is executed:
a stand-in driver names the target and every launch only compiles, so what is computed is garbage, and the parity tests,
run for the kernels that they launch, all fail. In the order of the calls:

1. the first launches, which are compiled as the timed cases of the same kind are;
2. the steps of this package in the matrix's other families, on small problems;
3. with ``--parity`` the parity tests.

What does not compile is named and counted; it is not in the archive.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch
import triton

from benchmarks.cases import AttentionCase, Case, NormCase
from benchmarks.families import families, kernels
from benchmarks.gpu import cache, first_launches
from benchmarks.gpu.calls import PARITY_OPTIONS, PARITY_TESTS
from benchmarks.laboratory.stand_in import Compiled
from benchmarks.reporting.document import OURS
from benchmarks.selection import Settings, entries
from benchmarks.variants import Refused
from fastattn.ops.common import backends

ROOT = Path(__file__).parents[2]
TARGET = "cuda:90"
_SMALL_ROWS = 4096  # of a norm: more programs than run at once, as in the timed ones


def stub_libcuda(folder: Path) -> Path:
    """A libcuda.so.1 with the functions that triton's C code calls, each of which fails: enough to link and to load."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    text = "".join((nvidia / name).read_text() for name in ("driver.c", "driver.py"))
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", text)))
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    return library


class Filler:
    """Compiles what is launched, and builds the launcher of each kernel.

    Attributes:
        failures: of the tasks that did not compile, in words.
    """

    def __init__(self, folder: Path) -> None:
        library = stub_libcuda(folder)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # what is linked against it finds it loaded
        self._compiled = Compiled(TARGET)
        self._seen: set[str] = set()
        self.failures: list[str] = []
        backends.DEVICES = ("cpu",)  # the tensors stay there
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        # The module that loads binaries is built and cached, too; newer launchers are methods of it
        driver: Any = triton.runtime.driver.active
        driver.utils = CudaUtils()
        self._launcher = CudaLauncher

    def do(self, name: str, work: Callable[[], object]) -> None:
        """Do a piece of work for the sake of its launches."""
        started, before = time.process_time(), len(self._seen)
        self._compiled.kernels.clear()
        try:
            work()
            self.build_launchers()
            said = "ok"
        except Refused as refusal:
            said = f"refused: {refusal}"
        except Exception as error:  # whatever a compiler may raise; the rest is none the worse
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.failures.append(f"{name}: {said}")
            self.build_launchers()
        took = time.process_time() - started
        print(f"{name}: {said}, {len(self._seen) - before} new kernels, {took:.1f} s", flush=True)
        gc.collect()

    def build_launchers(self) -> None:
        """Build the launchers of what was launched since the last time."""
        for kernel in self._compiled.kernels:
            if kernel.hash not in self._seen:
                self._seen.add(kernel.hash)
                self._launcher(kernel.src, kernel.metadata)
        self._compiled.kernels.clear()


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """The first launches, each as the device would have it and for a length that is no multiple of the tile."""
    for task in first_launches.tasks_of(entries(Settings(quick=False, device="cuda"))):
        name, case = task.arguments
        variant = kernels.FAMILY.variant(name)
        case = dataclasses.replace(case, device="cpu")
        for shape in filter(None, (case, kernels.ragged(case))):
            yield f"{name}: {shape.name}", lambda build=variant.build, shape=shape: build(shape, shape.dtype)()


def steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """A step of this package for every case of the matrix outside the kernels' own family, made small."""
    met = set()
    for case, names in entries(Settings(quick=False, device="cuda")):
        if case.family == kernels.FAMILY.name or OURS not in names:
            continue
        small = dataclasses.replace(_small(case), device="cpu")
        if small not in met:
            met.add(small)
            build = families()[case.family].variant(OURS).build
            yield f"{OURS}: {small.name}", lambda build=build, small=small: build(small, small.dtype)()


def _small(case: Case) -> Case:
    """Of the same kernels, with less work for a CPU."""
    if isinstance(case, NormCase):
        return dataclasses.replace(case, rows=min(case.rows, max(_SMALL_ROWS, (1 << 22) // case.size)))
    if isinstance(case, AttentionCase):
        return dataclasses.replace(case, batch=min(case.batch, 2), seqlen=min(case.seqlen, 512))
    return case


def run_parity(seconds: float) -> None:
    """The parity tests, for what they launch, in a process of their own: their conftest.py comes before triton."""
    options = ["-q", *PARITY_OPTIONS, "--tb=no", "-rN", "--budget", f"{seconds:.0f}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "benchmarks.gpu.prefill_parity", *options]
    subprocess.run([*command, *PARITY_TESTS], cwd=ROOT, stdout=sys.stdout)  # they fail: what they compute is garbage


def main(arguments: list[str] | None = None) -> int:
    """The command line: 1 where the archive holds no kernel."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prefill", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the archive, as in build/gpu-cache.tar.xz"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="triton's cache; what is there already is not compiled"
    )
    parser.add_argument(
        "--parity", type=float, default=0.0, metavar="SECONDS", help="for the parity tests (default: 0)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="what has TEXT in its name")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        filled = (options.cache or Path(folder) / "cache").resolve()
        os.environ["TRITON_CACHE_DIR"] = str(filled)
        filler = Filler(Path(folder))
        for pieces in (launches(), steps()):
            for name, work in pieces:
                if options.only in name:
                    filler.do(name, work)
        if options.parity:
            run_parity(options.parity)
        manifest = cache.pack(filled, options.out)
    for failure in filler.failures:
        print(f"not compiled: {failure}")
    size = options.out.stat().st_size / 2**20
    counts = f"{manifest['kernels']} kernels, {manifest['launchers']} launchers"
    print(f"{options.out}: {size:.1f} MiB, {counts}, triton {manifest['triton']}, torch {torch.__version__}")
    return 0 if manifest["kernels"] else 1


if __name__ == "__main__":
    sys.exit(main())
