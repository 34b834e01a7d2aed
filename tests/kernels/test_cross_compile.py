"""Every kernel compiles for GPUs that are not here, without spills and inside their shared memory.

Each target has a process of its own, because triton decides at import whether it interprets.
"""

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
    "plain": {"causal": True},
    "masked": {"causal": True, "mask": True, "bias": True, "padding": True},
    "heavy": {
        **{"causal": True, "mask": True, "bias": True, "padding": True, "dropout": True, "weights": True},
        "careful": True,
    },
}


def compile_for(target: str, cases: list[dict]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    script = str(ROOT / "tests" / "kernels" / "cross_compile.py")
    result = subprocess.run(
        [sys.executable, script, target, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "target"), [*(("bfloat16", t) for t in TARGETS), *(("float32", t) for t in FLOAT)])
def test_every_configuration_compiles_without_spills(target, head_dim, dtype):
    loads = ["plain", "masked", "heavy"] if dtype == "bfloat16" else ["heavy"]  # float32 has one tile for all three
    cases = [{"dtype": dtype, "head_dim": head_dim, **LOADS[load]} for load in loads]
    cases = [{**case, "passes": ["fwd", "bwd", *["weights"] * ("dropout" in case)]} for case in cases]
    rows = compile_for(target, cases)
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel"} <= {
        row["kernel"] for row in rows
    }
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        if not row["careful"]:  # the careful pass runs where NaN came out, and may be slow
            assert row["spilled"] == 0, what
        if row["kernel"] != "_delta_kernel":
            assert row["products"] > 0, what
            if dtype != "float32" and target.startswith("cuda"):
                assert row["tensor_core_products"] > 0, what


def test_run_time_values_do_not_recompile():
    """Lengths that are multiples of nothing, down to 1, share each kernel."""
    shared = {"dtype": "bfloat16", "head_dim": 64, "causal": True, "careful": True, "passes": ["fwd", "bwd"]}
    cases = [
        {**shared, "length": length, "keys": keys}
        for length, keys in ((97, 130), (1, 3), (33, 1), (511, 1023), (130, 97))
    ]
    rows = compile_for("cuda:90", cases)
    compiled = {}
    for row in rows:
        compiled.setdefault((row["kernel"], row["careful"]), set()).add(row["hash"])
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)
    assert len(compiled) == 7  # forward, dK/dV and dQ, each with its careful form, and delta
