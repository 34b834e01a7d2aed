"""Compile what the launchers launch, for a target that need not be at hand, and read back what it takes.

A stand-in driver names the target, every launch only compiles, and the tensors stay on the CPU. Run in a process of its
own, without TRITON_INTERPRET: ``python cross_compile.py cuda:90 '[{"dtype": "bfloat16", ...}]'`` prints JSON.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

# What a block may use, which the compiler does not check.
SHARED_MEMORY = {
    "cuda:75": 65536,
    "cuda:80": 166912,
    "cuda:86": 101376,
    "cuda:89": 101376,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "cuda:120": 101376,
    "hip:gfx90a": 65536,
    "hip:gfx942": 65536,
    "hip:gfx1100": 65536,
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
    """Collects the kernels that launches compile instead of running them."""

    def __init__(self, target: str) -> None:
        self.kernels: list[Any] = []
        triton.runtime.driver.set_active(StandInDriver(parse_target(target)))
        launch = JITFunction.run

        def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
            self.kernels.append(kernel)
            return kernel

        JITFunction.run = compile_only  # type: ignore[method-assign]


def resources(kernel: Any, target: str) -> dict[str, Any]:
    """Name, registers, bytes spilled, shared memory, and the opcodes of matrix products of a compiled kernel."""
    row: dict[str, Any] = {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "hash": kernel.hash,
        "careful": _constant(kernel, "CAREFUL"),
    }
    if target.startswith("hip"):
        assembly = kernel.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])  # type: ignore[index]
        row["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])  # type: ignore[index]
        row["products"] = len(re.findall(r"v_(?:mfma|wmma)_", assembly))
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    row["registers"], row["spilled"] = int(match[1]), int(match[2])
    row["products"] = len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|FFMA2?)\b", code))
    row["tensor_core_products"] = len(re.findall(r"\b(?:HGMMA|HMMA)\b", code))
    row["tile"] = math.prod(_constant(kernel, name) or 1 for name in ("BLOCK_M", "BLOCK_N", "OWN", "OTHER", "CHUNK"))
    row["tangents"] = len(re.findall(r"\bMUFU\.TANH\b", code))
    row["local_memory"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return row


def _constant(kernel: Any, name: str) -> Any:
    """The value of a kernel's compile-time argument; None where it has no such argument."""
    names = kernel.src.fn.arg_names
    return kernel.src.constants.get((names.index(name),)) if name in names else None


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([_NVIDIA_TOOLS / "cuobjdump", *arguments], capture_output=True, text=True, check=True).stdout


def tiles_of(case: dict[str, Any], load: Any) -> dict[str, Any]:
    """The tiles that a case's kernels have under a load."""
    from fastattn_kernels import attention_config as config

    arguments = torch.device("cpu"), getattr(torch, case["dtype"]), case["head_dim"], case["head_dim"], load
    backward = config.backward_config(*arguments)
    return {"fwd": config.forward_config(*arguments), "dkdv": backward.dkdv, "dq": backward.dq}


def launch_all(case: dict[str, Any], passes: tuple[str, ...]) -> None:
    """Launch attention kernels for ``case``: dtype, head sizes, the features that it names, whether carefully.

    The passes are fwd, dkdv, dq, bias and weights; with ``unless_under`` those are left out whose tile that heavier
    load has too.
    """
    from fastattn_kernels import attention_bias_bwd, attention_bwd, attention_fwd, attention_weights
    from fastattn_kernels.attention_problem import Problem, WeightsGradient
    from fastattn_kernels.attention_tile_map import tile_map_for

    dtype = getattr(torch, case["dtype"])
    batch, heads, kv_heads, length, keys = 2, 4, 2, case.get("length", 128), case.get("keys", 256)
    head_dim, value_dim = case["head_dim"], case.get("value_dim", case["head_dim"])
    query = torch.empty(batch, heads, length, head_dim, dtype=dtype)
    key = torch.empty(batch, kv_heads, keys, head_dim, dtype=dtype)
    value = torch.empty(batch, kv_heads, keys, value_dim, dtype=dtype)

    class OncePerLaunch(Problem):
        """Without the careful launch, which takes as long to compile as all else."""

        def masks_pairs(self) -> bool:
            return False

    def only(feature: str, value: Any) -> Any:
        return value if case.get(feature) else None

    problem = (Problem if case.get("careful") else OncePerLaunch)(
        query,
        key,
        value,
        scale=0.1,
        bias=only("bias", torch.empty(1, heads, length, keys, dtype=dtype)),
        slopes=only("slopes", torch.empty(1, heads)),
        sinks=only("sinks", torch.empty(1, heads)),
        mask=only("mask", torch.ones(batch, 1, length, keys, dtype=torch.bool)),
        key_padding_mask=only("padding", torch.zeros(batch, keys, dtype=torch.bool)),
        query_documents=only("documents", torch.zeros(batch, length, dtype=torch.int32)),
        key_documents=only("documents", torch.zeros(batch, keys, dtype=torch.int32)),
        prefix=only("prefix", torch.zeros(batch, dtype=torch.int32)),
        lower=only("window", keys - length - 100),
        upper=only("causal", keys - length),
        shift=keys - length,
        softcap=only("softcap", 30.0),
        seed=only("dropout", torch.zeros(2, dtype=torch.int64)),
        dropout_p=0.1 if case.get("dropout") else 0.0,
    )
    output = torch.empty(batch, heads, length, value_dim, dtype=dtype)
    lse, statistics = torch.empty(batch, heads, length), torch.empty(batch, heads, 2, length)
    d_weights = WeightsGradient(torch.empty(batch, length, keys, dtype=dtype), heads) if case.get("weights") else None
    if "unless_under" in case:
        tiles, heavier = tiles_of(case, problem.load(d_weights)), tiles_of(case, case["unless_under"])
        passes = tuple(p for p in passes if p not in tiles or tiles[p] != heavier[p])
    if "fwd" in passes:
        attention_fwd.launch_attention_fwd(problem, output, lse, statistics, tile_map_for(problem))
    for name in ("dkdv", "dq"):
        if name in passes:
            delta = attention_bwd.launch_attention_delta(output, output, None)
            nothing = query[:0]
            d_query, d_key, d_value = (nothing, key, value) if name == "dkdv" else (query, nothing, nothing)
            attention_bwd.launch_attention_bwd(
                problem, output, statistics, delta, d_weights, d_query, d_key, d_value,
                only("slopes", torch.zeros(batch, heads, length)), tile_map_for(problem),
            )  # fmt: skip
    if "bias" in passes:
        attention_bias_bwd.launch_attention_bias_bwd(problem, output, statistics, lse, d_weights)
    if "weights" in passes:
        weights = torch.empty(batch, length, keys, dtype=dtype)
        attention_weights.launch_attention_weights(problem, statistics, weights, average=True)
        gradient = WeightsGradient(weights, heads)
        attention_weights.launch_attention_weights_delta(problem, statistics, gradient, lse)


def launch_norm(case: dict[str, Any]) -> None:
    """Launch the norm kernels for ``case``: dtype, size, rows, kind ("layer" or "rms"), and the features it names
    (residual, x_bias, row_scale, dropout, unit_offset, vectors: weight and bias; float32_residual)."""
    from fastattn_kernels.residual_norm_bwd import launch_residual_norm_bwd
    from fastattn_kernels.residual_norm_fwd import launch_residual_norm_fwd
    from fastattn_kernels.residual_norm_problem import NormProblem

    dtype, rows, size = getattr(torch, case["dtype"]), case.get("rows", 4096), case["size"]
    residual_dtype = torch.float32 if case.get("float32_residual") else dtype

    def only(feature: str, *shape: int, dtype: torch.dtype = dtype) -> Any:
        return torch.empty(shape, dtype=dtype) if case.get(feature) else None

    x, total = torch.empty(rows, size, dtype=dtype), torch.empty(rows, size, dtype=residual_dtype)
    d_output = x
    if case.get("strided"):  # heads that lie inside, in front and in the gradient
        x, total = (t.view(2, 4, rows // 8, size) for t in (x, total))
        d_output = x.transpose(1, 2).contiguous().transpose(1, 2)
    problem = NormProblem(
        x,
        total if case.get("residual") else None,
        only("vectors", size),
        only("vectors", size),
        only("x_bias", size),
        only("row_scale", rows, 1, dtype=torch.float32),
        is_rms=case.get("kind") == "rms",
        unit_offset=bool(case.get("unit_offset")),
        seed=only("dropout", 2, dtype=torch.int64),
        dropout_p=0.1 if case.get("dropout") else 0.0,
    )
    added = any(case.get(feature) for feature in ("residual", "x_bias", "row_scale", "dropout"))
    statistics = torch.empty(3, rows)
    output = torch.empty_like(d_output)
    launch_residual_norm_fwd(problem, output, total if added else None, statistics, residual_dtype)
    apart = case.get("row_scale") or case.get("dropout") or residual_dtype != dtype
    vectors = (bool(case.get("vectors")), bool(case.get("vectors")), bool(case.get("x_bias")))
    launch_residual_norm_bwd(
        problem, d_output, total if added else None, total, statistics, total if apart else None, x, vectors,
        bool(case.get("row_scale")), dtype,
    )  # fmt: skip


def launch_additive(case: dict[str, Any]) -> None:
    """Launch the kernels of additive attention for ``case``: dtype, attention_dim, value_dim, whether carefully, and
    the features it names (causal, padding, mask, bias, weights)."""
    from fastattn_kernels.additive_attention_bwd import launch_additive_bwd
    from fastattn_kernels.additive_attention_fwd import launch_additive_fwd
    from fastattn_kernels.additive_attention_pairs import launch_additive_weights
    from fastattn_kernels.additive_attention_problem import AdditiveProblem
    from fastattn_kernels.attention_problem import WeightsGradient
    from fastattn_kernels.attention_tile_map import tile_map_for

    dtype, size, value_dim = getattr(torch, case["dtype"]), case["attention_dim"], case.get("value_dim", 64)
    batch, heads, length, keys = 2, 2, case.get("length", 256), case.get("keys", 512)

    def only(feature: str, value: Any) -> Any:
        return value if case.get(feature) else None

    class OncePerLaunch(AdditiveProblem):
        """Without the careful launch."""

        def masks_pairs(self) -> bool:
            return False

    query, key = (
        torch.empty(batch, heads, length, size, dtype=dtype),
        torch.empty(batch, heads, keys, size, dtype=dtype),
    )
    value = torch.empty(batch, heads, keys, value_dim, dtype=dtype)
    problem = (AdditiveProblem if case.get("careful") else OncePerLaunch)(
        query,
        key,
        value,
        scale=1.0,
        bias=only("bias", torch.empty(1, heads, length, keys, dtype=dtype)),
        mask=only("mask", torch.ones(batch, 1, length, keys, dtype=torch.bool)),
        key_padding_mask=only("padding", torch.zeros(batch, keys, dtype=torch.bool)),
        upper=only("causal", 1) and 0,
        weight=torch.empty(1, size, dtype=dtype),
    )
    output, tile_map = torch.empty(batch, heads, length, value_dim, dtype=dtype), tile_map_for(problem)
    statistics, weights = torch.empty(batch, heads, 2, length), torch.empty(batch, heads, length, keys, dtype=dtype)
    launch_additive_fwd(problem, output, statistics, tile_map)
    if case.get("weights"):
        launch_additive_weights(problem, statistics, weights)
    launch_additive_bwd(
        problem, output, statistics, torch.empty(batch, heads, length), only("weights", weights),
        only("weights", WeightsGradient(weights, heads)), query, key, value, tile_map,
    )  # fmt: skip


def main() -> None:
    """Compile every case given as JSON for the target and print one row a kernel."""
    target, cases = sys.argv[1], json.loads(sys.argv[2])
    compiled = Compiled(target)
    rows = []
    for case in cases:
        compiled.kernels.clear()
        if "size" in case:
            launch_norm(case)
        elif "attention_dim" in case:
            launch_additive(case)
        else:
            launch_all(case, tuple(case.get("passes", ("fwd", "dkdv", "dq", "bias", "weights"))))
        rows += [{**resources(kernel, target), "case": case} for kernel in compiled.kernels]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
