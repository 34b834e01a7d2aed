"""``MultiheadAttention`` in inference by one plan: to the last bit the same as by the long way, and never stale."""

from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

pytest.importorskip("triton", reason="triton is not installed")

import fastattn
from fastattn.modules import multihead_attention
from tests.machines import DEVICE
from tests.ops.short_way_cases import counted, forget, long_way

CALLS = multihead_attention._CALLS
E, H, N, L, S = 16, 2, 2, 5, 7


@pytest.fixture(autouse=True)
def forgetful():
    forget()
    CALLS.clear()
    yield
    forget()
    CALLS.clear()


def module_of(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    options: dict[str, Any] = {"batch_first": True, "dropout": 0.5, "backend": "triton", **options}
    return fastattn.MultiheadAttention(E, H, **options).to(DEVICE, dtype).eval()


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _itself(draw):
    x = draw(N, L, E)
    return x, x, x


def _other(draw):
    memory = draw(N, S, E)
    return draw(N, L, E), memory, memory


def _sequence_first(draw):
    x = draw(L, N, E)
    return x, x, x


def _without_batch(draw):
    x = draw(L, E)
    return x, x, x


def _causal(draw):
    return torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1)


# module's options, the three inputs, the call's other arguments
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "itself": ({}, _itself, {"need_weights": False}),
    "averaged weights": ({}, _itself, {}),
    "weights of heads": ({}, _itself, {"average_attn_weights": False}),
    "another sequence": ({}, _other, {"need_weights": False}),
    "three": ({}, lambda draw: (draw(N, L, E), draw(N, S, E), draw(N, S, E)), {}),
    "three widths": (
        {"kdim": 12, "vdim": 20}, lambda draw: (draw(N, L, E), draw(N, S, 12), draw(N, S, 20)), {"need_weights": False}
    ),
    "the query is the value": ({}, lambda draw: (x := draw(N, L, E), draw(N, L, E), x), {}),
    "sequence first": ({"batch_first": False}, _sequence_first, {}),
    "without a batch": ({}, _without_batch, {}),
    "without biases": ({"bias": False}, _itself, {"need_weights": False}),
    "appended keys": ({"add_bias_kv": True, "add_zero_attn": True}, _itself, {}),
    "causal": ({}, _itself, {"attn_mask": _causal, "is_causal": True, "need_weights": False}),
    "causal, with weights": ({}, _itself, {"attn_mask": _causal, "is_causal": True}),
    "padding": ({}, _itself, {"key_padding_mask": lambda draw: draw(N, L) > 0.5, "need_weights": False}),
    "floating masks": (
        {}, _itself, {"key_padding_mask": lambda draw: draw(N, L), "attn_mask": lambda draw: draw(N * H, L, L)}
    ),
    "bfloat16": ({"dtype": torch.bfloat16}, _itself, {"need_weights": False}),
}  # fmt: skip


def call(name, seed, module=None):
    """``(output, weights or None)`` of a case, on tensors of its own."""
    options, inputs, words = CASES[name]
    module = module_of(**options) if module is None else module
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def next_draw(*shape):
        return draw(next(seeds), *shape, dtype=options.get("dtype", torch.float32))

    with torch.no_grad():
        given = {name: value(next_draw) if callable(value) else value for name, value in words.items()}
        return module(*inputs(next_draw), **given)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())


@pytest.mark.parametrize("name", CASES)
def test_inference_is_the_same_by_the_short_way(name):
    with counted() as taken:
        found = [call(name, seed) for seed in range(4)]
    assert taken.planned == 2, "the third and the fourth call run by the module's plan"
    assert len(CALLS) == 1
    with long_way():
        for seed, each in enumerate(found):
            assert_same(each, call(name, seed))


def test_cases_one_after_another():
    """Each differs from another in one thing; taken for one another, they would compute something else."""
    with long_way():
        expected = {name: call(name, number) for number, name in enumerate(CASES)}
    for _ in range(3):
        for number, name in enumerate(CASES):
            assert_same(call(name, number), expected[name])
    assert len(CALLS) == len(CASES)


def test_weights_are_those_of_now():
    """Those of another module, of a state dict, and of an optimizer's step in place."""
    module = module_of(seed=1)
    for seed in range(3):
        call("itself", seed, module)
    other = module_of(seed=2)
    for change in (
        lambda: other,
        lambda: module.load_state_dict(module_of(seed=3).state_dict()) and module,
        lambda: (module.out_proj.weight.data.mul_(2.0), module)[1],
        lambda: (setattr(module, "in_proj_weight", torch.nn.Parameter(draw(9, 3 * E, E))), module)[1],
    ):
        changed = change()
        with counted() as taken:
            found = call("itself", 5, changed)
        assert taken.planned == 1
        with long_way():
            assert_same(found, call("itself", 5, changed))


class _Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2.0 * weight


@pytest.mark.parametrize("of", ["in_proj_weight", "out_proj.weight"])
def test_computed_parameters_take_the_long_way(of):
    module = module_of()
    expected = call("itself", 0, module)[0]
    owner = module if of == "in_proj_weight" else module.out_proj
    parametrize.register_parametrization(owner, of.rpartition(".")[2], _Doubled())
    with counted() as taken:
        found = [call("itself", 0, module)[0] for _ in range(3)]
    assert len(CALLS) == 0 or taken.planned == 0
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(found[0], expected)


def test_training_and_gradients_take_the_long_way():
    module = module_of(dropout=0.0)
    x = draw(0, N, L, E)
    for _ in range(3):
        output = module(x, x, x, need_weights=False)[0]
        assert output.requires_grad
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(x, x, x, need_weights=False)
    assert len(CALLS) == 0


def test_errors_are_those_of_the_long_way():
    module = module_of()
    x, wrong = draw(0, N, L, E), draw(0, N, L, E - 1)
    with torch.no_grad():
        for _ in range(3):
            module(x, x, x)
            with pytest.raises(AssertionError, match="was expecting embedding dimension of 16, but got 15"):
                module(wrong, wrong, wrong)
            with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                module(x, x, x, is_causal=True)


def test_backend_asked_for_by_name_is_the_one_that_runs():
    module = module_of(backend=None)
    with fastattn.use_backend("triton"):
        for seed in range(3):
            call("itself", seed, module)
    with fastattn.use_backend("torch"), counted() as taken:
        for seed in range(3):
            call("itself", seed, module)
    assert taken.planned == 0


def test_inference_mode_has_plans_of_its_own():
    module, x = module_of(), draw(0, N, L, E)
    for context in (torch.no_grad, torch.inference_mode) * 3:
        with context():
            output = module(x, x, x, need_weights=False)[0]
        assert output.is_inference() == (context is torch.inference_mode)
