"""Every kernel compiles for GPUs that are not here, without spills and inside their shared memory.

Each target has a process of its own, because triton decides at import whether it interprets.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cross_compile import SHARED_MEMORY

ROOT = Path(__file__).parents[2]

TARGETS = ["cuda:80", "cuda:90", "cuda:120", "hip:gfx942"]
FLOAT = ["cuda:90", "hip:gfx942"]  # the tiles of float32 are the same on every NVIDIA architecture
# What a tile of scores carries beside itself; the last asks for all there is.
LOADS = {
    "plain": {"causal": True, "sinks": True},
    "masked": dict.fromkeys(("causal", "window", "prefix", "mask", "padding", "documents", "sinks"), True),
}
LOADS["biased"] = {**LOADS["masked"], "bias": True, "slopes": True}
LOADS["heavy"] = {**LOADS["biased"], "softcap": True, "dropout": True, "weights": True}


def compile_for(target: str, cases: list[dict]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    script = str(ROOT / "tests" / "kernels" / "cross_compile.py")
    result = subprocess.run(
        [sys.executable, script, target, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


QUICK_NORMS = [("bfloat16", "cuda:90"), ("float32", "hip:gfx942")]
# A few of every kind; `make resources` compiles all of them, which takes a quarter of an hour.
QUICK = [
    *(("bfloat16", target, 128) for target in ("cuda:80", "cuda:90")),
    ("bfloat16", "cuda:90", 64),
    ("bfloat16", "cuda:120", 512),
    ("bfloat16", "hip:gfx942", 64),
    ("float32", "cuda:90", 64),
    ("float32", "hip:gfx942", 128),
]
EVERY = [
    (dtype, target, head_dim)
    for dtype, targets in (("bfloat16", TARGETS), ("float32", FLOAT))
    for target in targets
    for head_dim in (64, 128, 256, 512)
]


@pytest.mark.parametrize(
    ("dtype", "target", "head_dim"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.resources) for case in EVERY],
)
def test_every_configuration_compiles_without_spills(dtype, target, head_dim):
    """Every tile under the heaviest load that has it."""
    shared, loads = {"dtype": dtype, "head_dim": head_dim}, list(LOADS)
    # the careful pass takes the most shared memory where there is the least of it
    careful = head_dim == 512 and target in ("cuda:120", "hip:gfx942")
    cases: list[dict] = [{**shared, **LOADS["heavy"], "careful": careful}]
    for load, heavier in itertools.pairwise(loads):
        cases.append({**shared, **LOADS[load], "unless_under": heavier, "passes": ["fwd", "dkdv", "dq"]})
    rows = compile_for(target, cases)
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel"} <= {
        row["kernel"] for row in rows
    }
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        # the careful pass runs where NaN came out, and may be slow; float32 heads this wide are slow anyway
        if not row["careful"] and not (dtype == "float32" and head_dim == 512):
            assert row["spilled"] == 0, what
        if "attention" in row["kernel"]:
            assert row["products"] > 0, what
            if dtype != "float32" and target.startswith("cuda"):
                assert row["tensor_core_products"] > 0, what


# Every way in which a row becomes tiles: many rows a tile, one, one in two parts, in several, and odd ones.
NORM_SIZES = (7, 64, 1000, 4096, 8192, 16384, 65536)
NORM_FEATURES: dict[str, dict] = {
    "layer": {"residual": True, "vectors": True},
    "rms": {"residual": True, "vectors": True, "kind": "rms"},
    "mixed": {"residual": True, "vectors": True, "float32_residual": True},
}
NORM_FEATURES["strided"] = {**NORM_FEATURES["layer"], "strided": True}
NORM_FEATURES["everything"] = {
    **NORM_FEATURES["mixed"],
    **dict.fromkeys(("x_bias", "row_scale", "dropout", "unit_offset"), True),
}


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        pytest.param(dtype, target, marks=() if (dtype, target) in QUICK_NORMS else pytest.mark.resources)
        for dtype in ("bfloat16", "float32")
        for target in TARGETS
    ],
)
def test_every_norm_configuration_compiles_without_spills(dtype, target):
    cases = [
        {"dtype": dtype, "size": size, **features}
        for size in NORM_SIZES
        for features in NORM_FEATURES.values()
        if dtype != "float32" or features is not NORM_FEATURES["mixed"]
    ]
    rows = compile_for(target, cases)
    kernels = {"_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel", "_row_means_kernel", "_sum_over_groups_kernel"}
    assert kernels == {row["kernel"] for row in rows}
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        assert row["spilled"] == 0, what


def test_run_time_rows_do_not_recompile_norms():
    """All numbers of rows share each kernel, but for one row, whose stride is 0; a size may have kernels of its own."""
    rows = (2, 3, 17, 999, 4097, 70001)
    cases = [{"dtype": "bfloat16", "size": 100, "rows": n, **NORM_FEATURES["layer"]} for n in rows]
    compiled: dict[str, set] = {}
    for row in compile_for("cuda:90", cases):
        compiled.setdefault(row["kernel"], set()).add(row["hash"])
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


@pytest.mark.parametrize("load", ["plain", "heavy"])
def test_run_time_values_do_not_recompile(load):
    """Lengths that are multiples of nothing share each kernel; under masks, those that are worth a tile map."""
    lengths = ((97, 130), (1, 3), (33, 1), (511, 1023), (130, 97)) if load == "plain" else ((197, 331), (511, 1023))
    passes = ["fwd", "dkdv", "dq", *["bias", "weights"] * (load == "heavy")]
    shared = {**LOADS[load], "dtype": "bfloat16", "head_dim": 64, "careful": load == "plain", "passes": passes}
    cases = [{**shared, "length": length, "keys": keys} for length, keys in lengths]
    rows = compile_for("cuda:90", cases)
    compiled = {}
    for row in rows:
        compiled.setdefault((row["kernel"], row["careful"]), set()).add(row["hash"])
    # the lists of rows have two sizes of tile, those of keys one
    expected = dict.fromkeys(compiled, 1) | ({("_tile_lists_kernel", None): 3} if load == "heavy" else {})
    assert {name: len(hashes) for name, hashes in compiled.items()} == expected
