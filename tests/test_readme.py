"""The README is true: its code runs, and its support matrix is what the backends say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn

README = (Path(__file__).parents[1] / "README.md").read_text()

# What each row of the support matrix means, as calls: (query options, arguments of attention).
CALLS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "float16, bfloat16, float32": [({"dtype": d}, {}) for d in (torch.float16, torch.bfloat16, torch.float32)],
    "float64": [({"dtype": torch.float64}, {})],
    "head size 1 to 256, value size apart": [({"head_dim": d, "value_dim": 24}, {}) for d in (1, 256)],
    "head size above 256": [({"head_dim": 257}, {})],
    "causal, top-left and bottom-right": [
        ({}, {"is_causal": True, "causal_alignment": alignment}) for alignment in ("top_left", "bottom_right")
    ],
    "boolean mask, any broadcast": [
        ({}, {"attn_mask": torch.ones(shape, dtype=torch.bool)}) for shape in ((3, 5), (2, 1, 1, 5), (1, 4, 3, 1))
    ],
    "additive mask, any broadcast": [
        ({}, {"attn_mask": torch.zeros(shape)}) for shape in ((3, 5), (2, 1, 1, 5), (1, 4, 3, 1))
    ],
    "gradient of an additive mask": [({}, {"attn_mask": torch.zeros(3, 5, requires_grad=True)})],
    "key padding": [({}, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)})],
    "grouped-query heads": [({"kv_heads": 2}, {}), ({"kv_heads": 1}, {})],
    "dropout": [({}, {"dropout_p": 0.5})],
    "averaged and per-head weights, with gradient": [
        ({"requires_grad": True}, {"need_weights": True, "average_attn_weights": average}) for average in (True, False)
    ],
    "LSE, with gradient": [({"requires_grad": True}, {"return_lse": True})],
    "second derivative, forward mode, vmap": [({"requires_grad": True}, {"return_lse": True})],
}


def matrix() -> dict[str, dict[str, str]]:
    assert "| feature | triton | torch |" in README
    rows = re.findall(r"^\| (.+?) \| (yes|no) \| (yes|no) \|$", README, flags=re.MULTILINE)
    return {feature: {"triton": triton, "torch": torch_} for feature, triton, torch_ in rows}


def test_readme_matrix_rows_are_the_ones_checked():
    assert list(matrix()) == list(CALLS)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature", CALLS)
def test_readme_matrix_cell_is_true(feature, backend, device):
    options: dict[str, Any]
    arguments: dict[str, Any]
    for options, arguments in CALLS[feature]:
        options = {"dtype": torch.float32, "head_dim": 16, "value_dim": 16, "kv_heads": 4, **options}
        make: dict[str, Any] = {
            "dtype": options["dtype"],
            "device": device,
            "requires_grad": options.get("requires_grad", False),
        }
        query = torch.randn(2, 4, 3, options["head_dim"], **make)
        key = torch.randn(2, options["kv_heads"], 5, options["head_dim"], **make)
        value = torch.randn(2, options["kv_heads"], 5, options["value_dim"], **make)
        arguments = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
        runs = fastattn.explain(query, key, value, backend=backend, **arguments).backend == backend
        assert runs == (matrix()[feature][backend] == "yes")
        if runs:
            result = fastattn.attention(query, key, value, backend=backend, **arguments)
            for tensor in result if isinstance(result, tuple) else (result,):
                assert tensor.isfinite().all()


def test_readme_code_runs():
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(code, "README.md", "exec"), {})
