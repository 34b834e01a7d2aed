"""What a Python function may do to be made a program, against the function itself on all pairs at once."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastattn.ops.attention.functions.memory import traced
from fastattn.reference import attention as reference
from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend

TABLE = random_tensor(3, 4, seed=1)
INTEGERS = torch.arange(5)
QUERY = random_tensor(1, 2, 4, 16, seed=2)
WEIGHT = 0.5


class Biased(nn.Module):
    """Has a parameter, a buffer, a submodule and a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(TABLE.clone())
        self.register_buffer("shift", torch.tensor(0.25))
        self.inner = nn.Linear(2, 2)
        self.factor = 1.5

    @property
    def twice(self):
        return 2 * self.factor

    def scaled(self, score):
        return score * self.twice

    def score_mod(self, score, batch, head, query_index, key_index):
        return self.scaled(score) + self.weight[head, key_index] * self.shift - self.inner.weight[head, 1]


MODULE = Biased()
BY_NAME = {"first": TABLE, "rest": [INTEGERS, (2 * TABLE,)]}


FLAT = TABLE.T.contiguous().T  # not contiguous


def with_default(s, b, h, q, k, table=TABLE, factor=3):
    return s + factor * table[h, k]


def in_place(s, b, h, q, k):
    s += TABLE[h, k]
    s *= 2
    return s


def nested(s, b, h, q, k):
    def inner(i):
        return TABLE[h, i] * WEIGHT

    return s + inner(k) + inner(q)


# Each with a form that runs on all pairs at once.
UNDERSTOOD: dict[str, tuple[Any, Any]] = {
    "a method of a module": (MODULE.score_mod, MODULE.score_mod),
    "a callable module": (type("Called", (Biased,), {"forward": Biased.score_mod})(), None),
    "functools.partial": (
        functools.partial(lambda table, s, b, h, q, k, factor: s + factor * table[h, k], TABLE, factor=2),
        lambda s, b, h, q, k: s + 2 * TABLE[h, k],
    ),
    "default arguments": (with_default, with_default),
    "nested functions and globals": (nested, nested),
    "containers": (
        lambda s, b, h, q, k: s + BY_NAME["first"][h, k] * BY_NAME["rest"][1][0][h, BY_NAME["rest"][0][k]],
        lambda s, b, h, q, k: s + 2 * TABLE[h, k] ** 2,
    ),
    "chained indexing": (lambda s, b, h, q, k: s + TABLE[h][k], lambda s, b, h, q, k: s + TABLE[h, k]),
    "a slice in front": (lambda s, b, h, q, k: s + TABLE[:, k][h], lambda s, b, h, q, k: s + TABLE[h, k]),
    "a slice of an axis": (lambda s, b, h, q, k: s + TABLE[1:, k][h], lambda s, b, h, q, k: s + TABLE[h + 1, k]),
    "an ellipsis": (lambda s, b, h, q, k: s + TABLE[..., k][h], lambda s, b, h, q, k: s + TABLE[h, k]),
    "a transposed table": (lambda s, b, h, q, k: s + TABLE.T[k, h], lambda s, b, h, q, k: s + TABLE[h, k]),
    "a prologue": (
        lambda s, b, h, q, k: s + torch.softmax(TABLE @ TABLE.T, 0)[h, k % 3] + TABLE.mean(),
        lambda s, b, h, q, k: s + torch.softmax(TABLE @ TABLE.T, 0)[h, k % 3] + TABLE.mean(),
    ),
    "a flat view of a transposed table": (
        lambda s, b, h, q, k: s + FLAT.reshape(-1)[h] * FLAT.flatten()[k],
        lambda s, b, h, q, k: s + TABLE[0, h] * TABLE[0, k],
    ),
    "writing to the score": (in_place, lambda s, b, h, q, k: 2 * (s + TABLE[h, k])),
    "a literal": (
        lambda s, b, h, q, k: s * torch.tensor([0.5, 2.0])[h] + torch.tensor(0.25),
        lambda s, b, h, q, k: s * torch.tensor([0.5, 2.0])[h] + 0.25,
    ),
    "a loop over numbers": (
        lambda s, b, h, q, k: sum((s * i for i in range(3)), s) + len(TABLE) + TABLE.shape[1],
        lambda s, b, h, q, k: 4 * s + 7,
    ),
    "a condition on numbers": (
        lambda s, b, h, q, k: (s * WEIGHT if WEIGHT < 1 and len(TABLE) > 2 else s) + math.sqrt(2) * k,
        lambda s, b, h, q, k: s * 0.5 + math.sqrt(2) * k,
    ),
    "a boolean as a number": (
        lambda s, b, h, q, k: s * (q >= k) + (q > 1), lambda s, b, h, q, k: torch.where(q >= k, s, 0) + (q > 1).int(),
    ),
    "a number": (lambda s, b, h, q, k: 2, lambda s, b, h, q, k: torch.full_like(s, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_function_is_understood(name, backend):
    function, form = UNDERSTOOD[name]
    if form is None:
        form = function.score_mod
    found = attend(QUERY, QUERY, QUERY, score_mod=function, backend=backend)
    truth = reference(QUERY.double(), QUERY.double(), QUERY.double(), score_mod=form).output
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prologue_of_a_narrow_tensor_is_in_float32(dtype, backend):
    """Its cast is one that the trace, which is in float32, does not see."""
    table = TABLE.to(dtype).requires_grad_()
    query = QUERY.detach()

    def score_mod(score, batch, head, query_index, key_index):
        return score + (table.float() / 3).exp()[head, key_index]

    def in_float64(score, batch, head, query_index, key_index):
        return score + (table.double() / 3).exp()[head, key_index]

    output = attend(query, query, query, score_mod=score_mod, backend=backend)
    truth = reference(*[query.double()] * 3, score_mod=in_float64).output
    torch.testing.assert_close(output.double(), truth, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(each.square().sum(), table)[0] for each in (output, truth))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_numbers_and_masks_of_python_are_understood(backend):
    assert torch.equal(
        attend(QUERY, QUERY, QUERY, mask_mod=lambda b, h, q, k: True, backend=backend),
        attend(QUERY, QUERY, QUERY, mask_mod=lambda b, h, q, k: (q >= 0) | (k < 0), backend=backend),
    )


def test_parameters_of_a_module_get_their_gradients(backend):
    module = Biased()
    found, expected = (
        torch.autograd.grad(output.square().sum(), list(module.parameters()), allow_unused=True)
        for output in (
            attend(QUERY, QUERY, QUERY, score_mod=module.score_mod, backend=backend),
            reference(QUERY, QUERY, QUERY, score_mod=module.score_mod).output,
        )
    )
    for d, d_expected in zip(found, expected):
        torch.testing.assert_close(d, d_expected, rtol=1e-4, atol=1e-4)


def test_function_is_traced_without_the_modes_of_the_call():
    """A default device, autocast and a transform around the call are the call's, and not the trace's."""
    expected = traced("score_mod", nested, ())[0].text
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert traced("score_mod", lambda *arguments: nested(*arguments), ())[0].text == expected
