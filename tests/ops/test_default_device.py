"""``torch.set_default_device``: every tensor that a call makes lies where the call's own tensors lie."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import random_tensor

FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}
SLOPES = torch.tensor([0.5, 0.1])
PADDING = (torch.arange(200) >= 190)[None]
CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (20, 5)},
    "alibi": {"alibi_slopes": SLOPES, "is_causal": True},
    "alibi_and_padding": {"alibi_slopes": SLOPES, "key_padding_mask": PADDING},
    "weights": {"alibi_slopes": SLOPES, "need_weights": True},
    "rows_without_keys": {"is_causal": True, "causal_alignment": "bottom_right", "window": (9, None)},
}


def test_every_tensor_that_is_made_has_a_device():
    root = Path(fastattn.__file__).parent
    unnamed = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in ("models", "modules", "ops", "reference")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]
    assert unnamed == []


@pytest.mark.parametrize("trains", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CALLS)
def test_call_on_the_cpu_under_another_default_device(name, trains):
    """Windows of more than 128 rows, and ALiBi with weights, failed: part of their masks was on the default device."""
    query, key, value = (random_tensor(1, 2, 200, 8, seed=seed) for seed in range(3))
    if name == "rows_without_keys":
        key, value = key[:, :, :150], value[:, :, :150]

    def results():
        leaves = [t.detach().requires_grad_(trains) for t in (query, key, value)]
        output: Any = fastattn.attention(*leaves, **CALLS[name], backend="torch")
        output = output[0] if isinstance(output, tuple) else output
        return (output, *torch.autograd.grad(output, leaves, torch.ones_like(output))) if trains else (output,)

    expected = results()
    with torch.device("meta"):
        found = results()
    torch.testing.assert_close(found, expected)
