"""Kernels that call a user's function on scores, in the predicate, or both: every result against the formula."""

from typing import Any, NamedTuple

import pytest
import torch

from fastattn.testing import assert_within_budget, attention_inputs, random_tensor
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass
from fastattn_kernels.common.problem import Problem
from tests.kernels.functions import FUNCTIONS, MASKS, Drawn, Upstream, attend, expected_of

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """What a problem with functions is like."""

    function: str | None = None
    mask: str | None = None
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (2, 1)
    lengths: tuple[int, int] = (97, 130)
    head_dim: int = 16
    value_dim: int = 16
    lower: int | None = None
    upper: int | None = None
    bias: bool = False
    padding: bool = False
    softcap: float | None = None
    scale: float = 0.4
    dropout: float = 0.0
    weights: bool = False

    def __str__(self):
        changed = [(name, value) for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return "-".join(f"{name}={value}" for name, value in changed)


def draw(case: Case, device) -> Drawn:
    """A problem of two batch entries, and the gradients that come in."""
    batch, (heads, kv_heads), (rows, keys) = 2, case.heads, case.lengths
    inputs: Any = attention_inputs(
        batch, heads, rows, keys, case.head_dim, value_dim=case.value_dim, kv_heads=kv_heads, dtype=case.dtype,
        device=device,
    )  # fmt: skip
    sizes = batch, heads, rows, keys
    function = None if case.function is None else FUNCTIONS[case.function]
    mask = None if case.mask is None else MASKS[case.mask]
    padding = torch.arange(keys)[None] % 11 == torch.tensor([[4], [5]])
    problem = Problem(
        *inputs,
        scale=case.scale,
        bias=random_tensor(1, heads, rows, 1, seed=9) if case.bias else None,
        key_padding_mask=padding if case.padding else None,
        lower=case.lower,
        upper=case.upper,
        softcap=case.softcap,
        score_mod=None if function is None else function.modifier(function.captured(*sizes)),
        mask_mod=None if mask is None else mask.modifier(mask.captured(*sizes)),
        seed=torch.tensor([7, 3]) if case.dropout else None,
        dropout_p=case.dropout,
    )
    d_output = random_tensor(batch, heads, rows, case.value_dim, seed=11, dtype=case.dtype)
    d_weights = random_tensor(batch, rows, keys, seed=12, dtype=case.dtype) if case.weights else None
    return Drawn(problem, function, mask, Upstream(d_output, random_tensor(batch, heads, rows, seed=13), d_weights))


def check(case: Case, device, **options) -> None:
    """All results within their budgets. Gradients are sums over rows, keys or all pairs, in an order that is another on
    each processor, and so walk at random: by a rounding for each term, of which the peer's own walk shows but one."""
    drawn = draw(case, device)
    actual = attend(drawn, **options)
    truth, peer = (expected_of(drawn, dtype) for dtype in (torch.float64, case.dtype))
    assert set(truth) == set(actual)
    for name, tensor in actual.items():
        budget: dict[str, Any] = {"truth": truth[name], "peer": peer[name], "feature": "functions", "backend": "triton"}
        if name.startswith("d_"):
            terms = max(case.lengths) if tensor.dim() == 4 else drawn.problem.query[..., 0].numel() * case.lengths[1]
            size = truth[name].nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt().item()
            budget["allowance"] = torch.finfo(torch.float32).eps * terms**0.5 * size
        assert_within_budget(tensor, name=name, **budget)


BF16, FP16 = torch.bfloat16, torch.float16
# A tile of the interpreter is 64 by 32: one row or key more is what a second tile takes.
CASES = [
    Case("softcap", softcap=3.0, dtype=BF16, scale=-0.7, lengths=(65, 33)),
    Case("table of differences", heads=(4, 2), upper=0, lengths=(66, 70)),
    Case("table of differences", "documents", dtype=FP16, bias=True, lengths=(65, 100)),
    Case("pairs", lengths=(65, 70), head_dim=24, value_dim=40),
    Case("pairs", dtype=BF16, padding=True, weights=True, lengths=(20, 67)),
    Case("scales", dropout=0.2, lengths=(40, 66)),
    Case("scales", "of the head", upper=5, lower=-60, dtype=BF16, lengths=(66, 70)),
    Case("rows and flags", lengths=(3, 70), heads=(3, 3)),
    Case("hidden", "flags of keys", dtype=FP16, upper=30, bias=True, lengths=(66, 70)),
    Case("of the indices alone", dtype=BF16, heads=(2, 2), lengths=(20, 33)),
    Case(mask="of the head", dtype=BF16, lengths=(70, 131)),
    Case(mask="dilated", softcap=2.0, padding=True, lengths=(66, 66)),
    Case(mask="nothing", lengths=(10, 70)),
    Case(mask="first keys", upper=3, weights=True, lengths=(67, 76)),
]


@pytest.mark.parametrize("case", quick(CASES, CASES[7]), ids=str)
def test_attention_with_functions_matches_formula(case, device):
    check(case, device)


@pytest.mark.parametrize("case", [CASES[3], CASES[8]], ids=str)
def test_attention_with_functions_in_one_pass_matches_formula(case, device):
    check(case, device, launch_bwd=launch_attention_bwd_one_pass)
