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

PLAIN = {"causal": True}
MASKED = {"causal": True, "mask": True, "bias": True, "padding": True}
HEAVY = {**MASKED, "dropout": True, "weights": True}

# The head sizes that have configurations of their own, each with the most that can be asked of one.
CASES = [
    *({"dtype": "bfloat16", "head_dim": d, **PLAIN, "passes": ["fwd", "bwd"]} for d in (64, 128, 256)),
    *({"dtype": "bfloat16", "head_dim": d, **MASKED, "passes": ["fwd", "bwd", "weights"]} for d in (64, 128, 256)),
    {"dtype": "bfloat16", "head_dim": 128, **HEAVY},
    {"dtype": "float32", "head_dim": 128, **MASKED},
]


def compile_for(target: str, cases: list[dict]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    script = str(ROOT / "tests" / "kernels" / "cross_compile.py")
    result = subprocess.run(
        [sys.executable, script, target, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:120", "hip:gfx942"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values() if not isinstance(v, list)))
def test_kernels_compile_without_spills(target, case):
    rows = compile_for(target, [case])
    assert rows
    for row in rows:
        what = f"{row['kernel']} for {target}: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], what
        if not row["careful"]:  # the careful pass runs where NaN came out, and may be slow
            assert row["spilled"] == 0, what
        if "delta_kernel" not in row["kernel"] or "weights" in row["kernel"]:
            assert row["products"] > 0, what
        if case["dtype"] != "float32" and "tensor_core_products" in row and "_attention_" in row["kernel"]:
            assert row["tensor_core_products"] > 0, what


def test_run_time_values_do_not_recompile():
    """Lengths, batch and head counts that are not multiples of 16 share one kernel."""
    cases = [
        {"dtype": "bfloat16", "head_dim": 64, "causal": True, "length": length, "keys": keys, "passes": ["fwd"]}
        for length, keys in ((97, 130), (1, 3), (33, 1), (511, 1023), (130, 97))
    ]
    rows = compile_for("cuda:90", cases)
    assert len({row["hash"] for row in rows if not row["careful"]}) == 1
