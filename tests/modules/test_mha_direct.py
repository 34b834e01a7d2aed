"""The short way of ``MultiheadAttention`` on the CPU: which calls take it, and that it gives what the long way does."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.modules import _mha_core, _mha_direct, multihead_attention
from fastattn.testing import assert_within_budget

E, H, N, L = 12, 2, 3, 5
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * L, [False] * 3 + [True] * 2, [False] * 4 + [True]])
OF_HEADS = torch.zeros(N * H, L, L, dtype=torch.bool)
OF_HEADS[::2, 1, 2] = True
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": CAUSAL},
    "promise": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "heads": {"attn_mask": OF_HEADS},
    "bias": {"attn_mask": torch.linspace(-2.0, 2.0, L * L, dtype=torch.float64).view(L, L)},
    "hiding bias": {"attn_mask": torch.zeros(L, L, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf)},
    "biases": {
        "attn_mask": torch.zeros(L, L, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf),
        "key_padding_mask": torch.zeros(N, L, dtype=torch.float64).masked_fill(PADDING, -torch.inf),
    },
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "output": {"need_weights": False},
    "average": {},
    "heads": {"average_attn_weights": False},
}


def make(dtype=torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    module = fastattn.MultiheadAttention(E, H, **{"batch_first": True, **options}, dtype=dtype, backend="torch")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


def inputs(module, crossed=False):
    x, memory = torch.randn(2, N, L, E, dtype=module.out_proj.weight.dtype)
    if not module.batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    return x, memory if crossed else x


@pytest.fixture
def direct_alone(monkeypatch):
    """Calls that take the long way fail."""

    def long_way(*_):
        raise AssertionError("took the long way")

    monkeypatch.setattr(multihead_attention, "attend", long_way)


def refuse(*_):
    return None


# ------------------------------------------------------------------------------------------------------------- results


def results(module, x, memory, trains, arguments):
    """Output, weights, and in training the gradients of everything, the weights' part included."""
    leaves: list[Any] = [t.detach().requires_grad_() for t in ((x,) if memory is x else (x, memory))]
    with torch.set_grad_enabled(trains):
        output, weights = module(leaves[0], leaves[-1], leaves[-1], **arguments)
    found = [output] if weights is None else [output, weights]
    if not trains:
        return found
    torch.manual_seed(1)
    cotangents = [torch.randn_like(t) for t in found]
    return [*found, *torch.autograd.grad(found, [*leaves, *module.parameters()], cotangents)]


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "crossed"])
def test_short_way_gives_what_the_long_way_gives(monkeypatch, crossed, call, weights, trains):
    for options in ({}, {"batch_first": False, "bias": False}):
        module = make(**options)
        x, memory = inputs(module, crossed)
        arguments = (module, x, memory, trains, {**CALLS[call], **WEIGHTS[weights]})
        with monkeypatch.context() as patch:
            patch.setattr(multihead_attention, "attend_directly", refuse)
            expected = results(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(multihead_attention, "attend", refuse)  # a call of it fails
            found = results(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", ["output", "average"])
def test_gradients_of_large_calls_are_not_stacked(monkeypatch, weights):
    module = make()
    x, _ = inputs(module)
    arguments = (module, x, x, True, {**CALLS["both"], **WEIGHTS[weights]})
    expected = results(*arguments)
    monkeypatch.setattr(_mha_core, "_MOST_STACKED", 0)
    monkeypatch.setattr(torch, "stack", None)
    torch.testing.assert_close(results(*arguments), expected)
    x.requires_grad_()
    output, _ = module(x, x, x, **arguments[-1])
    cotangents = torch.randn(2, *output.shape, dtype=x.dtype)
    wanted = [x, module.in_proj_weight]
    batched = torch.autograd.grad(output, wanted, cotangents, is_grads_batched=True, retain_graph=True)
    for index, cotangent in enumerate(cotangents):
        found = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
        torch.testing.assert_close(tuple(t[index] for t in batched), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["output", "average"])
@pytest.mark.parametrize("call", ["plain", "both"])
def test_short_way_is_as_exact_as_torch(dtype, weights, call):
    truth = make()
    plain_module, module = nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype), make(dtype)
    for each in (plain_module, module):
        each.load_state_dict(truth.state_dict())
    truth.load_state_dict(module.state_dict())
    x, _ = inputs(module)
    arguments = {**CALLS[call], **WEIGHTS[weights]}
    kinds = {torch.float64: truth, dtype: module}
    exact, found = (results(kinds[t], cast := x.to(t), cast, True, arguments) for t in kinds)
    plain = results(plain_module, cast := x.to(dtype), cast, True, arguments)
    for index, (ours, theirs, true) in enumerate(zip(found, plain, exact)):
        assert_within_budget(ours, truth=true, peer=theirs, name=f"result {index}")


@pytest.mark.parametrize("weights", ["output", "average"])
@pytest.mark.parametrize("call", ["plain", "both", "bias"])
def test_second_derivatives_are_those_of_the_long_way(monkeypatch, call, weights):
    module = make()
    x, _ = inputs(module)
    tensors, found = [x.requires_grad_(), *module.parameters()], []
    for way in ("attend", "attend_directly"):
        with monkeypatch.context() as patch:
            patch.setattr(multihead_attention, way, refuse)
            output, _ = module(x, x, x, **CALLS[call], **WEIGHTS[weights])
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([t.square().sum() for t in first]).sum(), tensors))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_output_may_be_changed_in_place(direct_alone, weights):
    """``x += attention(x)[0]`` failed in training: autograd took the output for a view made inside a Function."""
    module = make()
    x, _ = inputs(module)
    gradients = []
    for add in (torch.Tensor.add, torch.Tensor.add_):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf, leaf, leaf, **WEIGHTS[weights])
        gradients.append(torch.autograd.grad(add(output, leaf).square().sum(), [leaf, *module.parameters()]))
    torch.testing.assert_close(*gradients)


def test_nested_memory_keeps_its_error():
    module = make()
    x, memory = inputs(module, crossed=True)
    nested = torch.nested.nested_tensor(list(memory))
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        module(x, nested, nested)


@pytest.mark.parametrize("weights", ["output", "average"])
def test_second_derivatives_behind_a_checkpoint(weights):
    """Checkpointing unpacks each saved tensor a single time in a backward, which read them twice and failed."""
    module = make()
    x, _ = inputs(module)
    x.requires_grad_()

    def attended(x):
        return module(x, x, x, **CALLS["both"], **WEIGHTS[weights])[0]

    found = []
    for output in (attended(x), checkpoint(attended, x, use_reentrant=False)):
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x))
    torch.testing.assert_close(*found)


def test_what_a_gradient_holds_at_hidden_pairs_does_not_matter():
    module = make()
    x, _ = inputs(module)
    output, weights = module(x, x, x, attn_mask=CAUSAL)
    gradients = []
    for hole in (0.0, torch.nan):
        d_weights = torch.ones_like(weights).masked_fill(CAUSAL, hole)
        found = torch.autograd.grad(
            (output, weights), list(module.parameters()), (torch.ones_like(output), d_weights), retain_graph=True
        )
        gradients.append(found)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_of_some_parameters_alone(direct_alone):
    module = make()
    x, _ = inputs(module)
    wanted = [module.in_proj_bias, module.out_proj.weight]
    every = torch.autograd.grad(module(x, x, x)[0].sum(), list(module.parameters()))
    module.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_()
    found = torch.autograd.grad(module(x, x, x)[0].sum(), wanted)
    names = [name for name, _ in module.named_parameters()]
    expected = [every[names.index(name)] for name in ("in_proj_bias", "out_proj.weight")]
    torch.testing.assert_close(found, tuple(expected))


# -------------------------------------------------------------------------------------------------- which calls take it


def taken(module, query, key=None, value=None, **options):
    key = query if key is None else key
    arguments: dict[str, Any] = {"key_padding_mask": None, "need_weights": False, "attn_mask": None}
    arguments |= {"average_attn_weights": True, "is_causal": False, **options}
    return _mha_direct.attend(module, module.backend, query, key, key if value is None else value, **arguments)


@pytest.mark.parametrize(
    "options", [{"kdim": E + 1}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.5}], ids=str
)
def test_modules_that_take_the_long_way(options):
    module = make(**options)
    x, _ = inputs(module)
    assert taken(make(), x) is not None
    assert taken(module, x) is None


def test_calls_that_take_the_long_way():
    module = make()
    x, memory = inputs(module, crossed=True)
    assert taken(module, x, memory) is not None
    assert taken(module, x, memory, x) is None  # three products
    assert taken(module, x[0]) is None
    assert taken(module, x.float()) is None
    assert taken(module, x, memory[:1]) is None
    assert taken(module, x, attn_mask=CAUSAL.int()) is None
    assert taken(module, x, attn_mask=CAUSAL[:1]) is None
    assert taken(module, x, is_causal=True) is None
    assert taken(module, x, attn_mask=CAUSAL, key_padding_mask=PADDING.double()) is None
    assert taken(module, x, attn_mask=torch.zeros(L, L, dtype=x.dtype, requires_grad=True)) is None
    assert taken(module, x, attn_mask=torch.full((L, L), -1e9, dtype=x.dtype)) is None  # its LSE would be rounded
    with torch.autocast("cpu"):
        assert taken(module, x) is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert taken(module, x) is None
    assert torch.func.vmap(lambda x: x if taken(module, x) is None else x + 1)(x[None]).equal(x[None])
    module.out_proj = nn.Linear(E, E + 2).to(x.dtype)
    assert taken(module, x) is None


def test_calls_in_which_something_is_not_finite_take_the_long_way():
    module = make()
    x, _ = inputs(module)
    x[1, 3:] = torch.nan
    for trains in (False, True):
        with torch.set_grad_enabled(trains):
            assert taken(module, x, key_padding_mask=PADDING) is None
            assert module(x, x, x, key_padding_mask=PADDING)[0][0].isfinite().all()
            assert taken(module, x) is not None  # nothing is hidden: the NaN is everybody's
