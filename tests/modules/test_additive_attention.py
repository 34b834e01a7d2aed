"""The module of additive attention: its formula, its arguments, its parameters, and that it learns."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.modules import AdditiveAttention
from fastattn.reference import additive_attention as reference
from fastattn.testing import assert_within_budget, random_tensor

B, L, S = 2, 3, 6


@pytest.fixture
def inputs(device):
    return random_tensor(B, L, 5, seed=0, device=device), random_tensor(B, S, 7, seed=1, device=device)


def make(device, **options):
    torch.manual_seed(0)
    return AdditiveAttention(5, 7, 4, device=device, **options)


def defined(module, query, key, value, **arguments):
    projected = module.query_projection(query)[:, None], module.key_projection(key)[:, None], value[:, None]
    found = reference(*projected, module.weight[None], **arguments)
    return found.output[:, 0], found.weights[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "mask"])
def test_additive_module_is_the_formula_with_gradients(masks, bias, inputs, backend, device):
    query, key = inputs
    module = make(device, bias=bias, backend=backend)
    value = random_tensor(B, S, 8, seed=2, device=device)
    arguments, words = {}, {}
    if masks == "padding":
        arguments["key_padding_mask"] = words["key_padding_mask"] = torch.arange(S, device=device).expand(B, S) > 3
    if masks == "mask":
        arguments["attn_mask"] = torch.rand(B, L, S, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
        words["mask"] = arguments["attn_mask"][:, None]

    def results(module, function, dtype):
        leaves = [t.to(dtype) for t in (query, key, value)]
        outputs = function(module, *leaves)
        return [*outputs, *torch.autograd.grad(outputs[0].square().sum() + outputs[1].square().sum(),
                                               list(module.parameters()))]  # fmt: skip

    wide = copy.deepcopy(module).double()
    found = results(module, lambda m, *t: m(*t, **arguments, need_weights=True), torch.float32)
    truth = results(wide, lambda m, *t: defined(m, *t, **words), torch.float64)
    peer = results(module, lambda m, *t: defined(m, *t, **words), torch.float32)
    names = ["context", "weights", *(name for name, _ in module.named_parameters())]
    assert len(names) == len(found) == 5 + 2 * bias
    for name, a, t, p in zip(names, found, truth, peer):
        # roundings of a few sums of at most 42 terms, of which the peer's may have cancelled
        allowance = 8 * torch.finfo(torch.float32).eps * max(1.0, t.abs().max().item())
        assert_within_budget(a, truth=t, peer=p, name=name, allowance=allowance)


def test_additive_module_values_are_the_keys_by_default(inputs, device):
    module = make(device)
    query, key = inputs
    context, weights = module(query, key)
    assert weights is None
    assert torch.equal(context, module(query, key, key)[0])
    assert context.shape == (B, L, 7)


def test_additive_module_takes_a_projected_key(inputs, device):
    """A decoder projects the encoder's states once; then the projection is not called again."""
    module = make(device)
    query, key = inputs
    expected, _ = module(query, key)
    projected = module.project_key(key)
    calls = []
    module.key_projection.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(module(query, key, projected_key=projected)[0], expected)
    assert not calls


def test_additive_module_step_by_step_is_all_at_once(inputs, device):
    module = make(device)
    query, key = inputs
    whole, _ = module(query, key)
    steps = [module(query[:, i : i + 1], key)[0] for i in range(L)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_additive_module_padding_changes_nothing(inputs, backend, device):
    module = make(device, backend=backend)
    query, key = inputs
    longer = torch.cat([key, torch.full((B, 3, 7), torch.nan, device=device)], dim=1)
    padding = torch.arange(S + 3, device=device).expand(B, -1) >= S
    context, weights = module(query, longer, key_padding_mask=padding, need_weights=True)
    expected, of_keys = module(query, key, need_weights=True)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(weights[..., :S], of_keys)
    assert not weights[..., S:].any()


def test_additive_module_under_autocast(inputs, backend, device):
    """What the projections give is bfloat16, the value float32 as it came."""
    query, key = inputs
    module = make(device, backend=backend)
    expected, _ = module(query, key)
    with torch.autocast(device.type, torch.bfloat16):
        context, weights = module(query, key, need_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16
    # a weighted mean of keys up to 3 or so; every factor has 8 bits
    torch.testing.assert_close(context.float(), expected, rtol=0, atol=8 * 2**-8)


def test_additive_module_causal_is_its_mask(inputs, backend, device):
    module = make(device, backend=backend)
    query, key = inputs
    mask = torch.ones(L, S, dtype=torch.bool, device=device).tril()
    expected, of_keys = module(query, key, attn_mask=mask, need_weights=True)
    context, weights = module(query, key, is_causal=True, need_weights=True)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(weights, of_keys)


def test_additive_module_parameters(device):
    module = make(device, dtype=torch.float64)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"weight": (4,), "query_projection.weight": (4, 5), "key_projection.weight": (4, 7)}
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert isinstance(module.query_projection, nn.Linear)
    assert {"query_projection.bias", "key_projection.bias"} <= set(make(device, bias=True).state_dict())
    before = [p.detach().clone() for p in module.parameters()]
    module.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert module.weight.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((0, 7, 4), {}, "query_dim=0: expected a positive number"),
        ((5, -1, 4), {}, "key_dim=-1"),
        ((5, 7, 0), {}, "attention_dim=0"),
        ((5, 7, 4), {"backend": "cuda"}, "backend='cuda': expected one of"),
    ],
)
def test_additive_module_refuses_by_name(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        AdditiveAttention(*sizes, **options)


def test_additive_module_learns_which_key_is_meant(device):
    """A one-hot query names the key whose value is wanted: after training the weights point to it."""
    torch.manual_seed(0)
    module = AdditiveAttention(4, 4, 16, device=device, backend="torch")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    query = key = torch.eye(4, device=device)[None]
    with fastattn.use_backend("torch"):
        for _ in range(150):
            context, weights = module(query, key, need_weights=True)
            loss = (context - query).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(weights.argmax(-1)[0], torch.arange(4, device=device))
    assert weights[0].diagonal().min() > 0.9


def test_additive_module_under_checkpointing_and_state_dict(inputs, device):
    module, other = make(device), AdditiveAttention(5, 7, 4, device=device)
    other.load_state_dict(module.state_dict())
    context = checkpoint(other, *inputs, use_reentrant=False)[0]
    assert torch.equal(context, module(*inputs)[0])
    context.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in other.parameters())
