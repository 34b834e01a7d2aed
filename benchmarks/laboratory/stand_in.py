"""Compile what the launchers launch, for a target that need not be at hand, and read back what it takes.

A stand-in driver names the target, every launch only compiles, and the tensors stay on the CPU. It wants a process of
its own, without TRITON_INTERPRET, as :mod:`benchmarks.laboratory.compile` starts it:
``python -m benchmarks.laboratory.stand_in cuda:90 '[{"dtype": "bfloat16", ...}]' [DIRECTORY]`` prints JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from benchmarks.laboratory import sass
from benchmarks.laboratory.hopper import replays
from benchmarks.laboratory.launch_case import launch
from benchmarks.laboratory.model import bound
from benchmarks.laboratory.targets import blocks_resident
from fastattn_kernels.common import plans

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The compile-time arguments that say how large a tile is: of attention, of columns and lists, of sums.
_TILE = ("BLOCK_M", "BLOCK_N", "OWN", "OTHER", "CHUNK", "ROWS", "COLS")


class StandInDriver(DriverBase):
    """A driver that knows its target and nothing else."""

    def __init__(self, target: Any) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:  # pyrefly: ignore[bad-override]  # a static method upstream in some versions
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


def parse_target(name: str) -> GPUTarget:
    """``"cuda:90"`` or ``"hip:gfx942"``."""
    backend, arch = name.split(":")
    if backend == "hip":
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch), 32)


class Compiled:
    """Collects the kernels that launches compile instead of running them.

    Attributes:
        kernels: those that were launched since the list was last cleared.
        careful: whether careful launches are compiled, too, which takes as long as all else; if not, they do nothing.
    """

    def __init__(self, target: str) -> None:
        self.kernels: list[Any] = []
        self.careful = False
        triton.runtime.driver.set_active(StandInDriver(parse_target(target)))
        plans.ENABLED = False  # nothing is launched
        run = JITFunction.run

        def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if kwargs.get("CAREFUL") and not self.careful:
                return None
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            self.kernels.append(kernel)
            return kernel

        JITFunction.run = compile_only  # type: ignore[method-assign]


def resources(kernel: Any, target: str) -> dict[str, Any]:
    """What a compiled kernel takes: registers, bytes spilled, shared memory, how many blocks of it are resident; its
    opcodes; and on NVIDIA its loops around matrix products and what ptxas has to say about them."""
    row: dict[str, Any] = {
        "kernel": kernel.metadata.name,
        "for_hopper": ".hopper." in kernel.src.fn.__module__,
        "target": target,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "hash": kernel.hash,
        "careful": _constant(kernel, "CAREFUL"),
        "again": bool(_constant(kernel, "AGAIN_N")),  # the careful loops stand behind as many others
        "sides": [side for name in _TILE if (side := _constant(kernel, name))],
    }
    row["tile"] = math.prod(row["sides"])
    row |= _read_back(kernel, target.partition(":")[0])
    row["blocks"] = blocks_resident(target, row["registers"], row["shared"], row["warps"])
    return row


_known: dict[str, dict[str, Any]] = {}  # by the kernel's hash: cases launch many a kernel twice


def _read_back(kernel: Any, backend: str) -> dict[str, Any]:
    """What the binary says."""
    if kernel.hash not in _known:
        _known[kernel.hash] = _of_amd(kernel) if backend == "hip" else _of_nvidia(kernel)
    return dict(_known[kernel.hash])


def _of_nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("cuobjdump", "--dump-sass", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    instructions = sass.parse(text)
    counts, loops = sass.count(instructions), sass.hot_loops(instructions)
    # where warps specialise, two warpgroups multiply, each in code of its own
    specialised = counts["USETMAXREG"] > 0
    warpgroups = 2 if specialised else max(kernel.metadata.num_warps // 4, 1)
    replayed = replays(kernel.metadata.name, kernel.src.signature, loops) if specialised else None
    return {
        "registers": int(match[1]),
        "spilled": int(match[2]),
        "products": sum(counts[name] for name in (*sass.PRODUCTS, "FFMA", "FFMA2")),
        "tensor_core_products": sum(counts[name] for name in sass.PRODUCTS),
        "product": next((name for name in sorted(sass.PRODUCTS) if counts[name]), ""),
        "tangents": sum(step.opcode.startswith("MUFU.TANH") for step in instructions),
        "local_memory": sum(counts[name] for name in sass.SPILLS),
        "counts": dict(sorted(counts.items())),
        "loops": [_loop(loop, warpgroups, specialised) for loop in loops],
        "replays": [dataclasses.asdict(turn) | {"teraflops": turn.teraflops} for turn in replayed or ()],
        "warnings": _warnings(kernel),
        "code": text,
    }


def _loop(loop: sass.Loop, warpgroups: int, specialised: bool) -> dict[str, Any]:
    """A loop's size and, if it multiplies by wgmma, how fast it can be."""
    row: dict[str, Any] = {
        "instructions": len(loop.instructions),
        "products": loop.products,
        "spills": loop.spills,
    }
    if loop.counts["HGMMA"]:
        # a barrier of all warps in the loop keeps them together; where they specialise, it is of one warpgroup
        fastest = bound(loop, warpgroups, in_step=not specialised and loop.counts["BAR"] > 0)
        row |= {"overlap": fastest.overlap, "teraflops": fastest.teraflops}
    return row


def _warnings(kernel: Any) -> list[str]:
    """What ptxas says of serialised wgmma (C75xx): nowhere else does it show that products wait for each other.

    It says so when it compiles, and the kernel may come from a cache: triton assembles it again, with its own options.
    """
    if "wgmma" not in kernel.asm["ptx"]:
        return []
    target = kernel.metadata.target
    said = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        make_backend(target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)  # type: ignore[attr-defined]
    return sorted(set(re.findall(r"C75\d\d", said.getvalue())))


def _of_amd(kernel: Any) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]
    opcodes = re.findall(r"^\s+([a-z]+_\w+)", assembly, re.MULTILINE)
    products = [name for name in opcodes if name.startswith(("v_mfma_", "v_wmma_"))]
    groups = {
        "MUFU": ("v_exp_", "v_log_", "v_rcp_", "v_sqrt_", "v_rsq_"),
        "LDG": ("global_load", "buffer_load"),
        "STG": ("global_store", "buffer_store"),
        "BAR": ("s_barrier",),
        "PRMT": ("v_perm_",),
    }
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),  # type: ignore[index]
        "spilled": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),  # type: ignore[index]
        "products": len(products),
        "tensor_core_products": len(products),
        "product": products[0][2:6].upper() if products else "",
        "local_memory": sum(name.startswith("scratch_") for name in opcodes),
        "counts": {group: sum(name.startswith(starts) for name in opcodes) for group, starts in groups.items()},
        "loops": [],
        "replays": [],
        "warnings": [],
        "code": assembly,
    }


def _constant(kernel: Any, name: str) -> Any:
    """The value of a kernel's compile-time argument; None where it has no such argument."""
    names = kernel.src.fn.arg_names
    return kernel.src.constants.get((names.index(name),)) if name in names else None


def _tool(name: str, *arguments: str) -> str:
    """What a program of the CUDA toolkit inside the triton wheel prints."""
    return subprocess.run([_NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile every case given as JSON for the target and print a row for each kernel, and what did not compile; write
    machine code if told where."""
    target, cases = sys.argv[1], json.loads(sys.argv[2])
    directory = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    compiled = Compiled(target)
    rows, failures = [], []
    for case in cases:
        compiled.kernels.clear()
        compiled.careful = bool(case.get("careful"))
        try:
            launch(case)
        except Exception as error:  # whatever a compiler may raise; the other cases are none the worse
            failures.append(f"{case.get('name', case)} for {target} does not compile: {error!r}"[:4000])
            traceback.print_exc()
        for kernel in compiled.kernels:
            row = resources(kernel, target)
            code = row.pop("code")
            if directory is not None:
                words = (row["kernel"].strip("_"), target, case.get("name", ""), row["hash"][:8])
                (directory / ("-".join(words).replace(" ", "-").replace(":", "") + ".sass")).write_text(code)
            rows.append({**row, "case": case, "triton": triton.__version__})
    json.dump({"rows": rows, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
