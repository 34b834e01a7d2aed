"""SelfAttention2d: the formula, views instead of copies, the gate, both backends, errors."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import testing
from fastattn.modules import self_attention_2d
from fastattn.modules.self_attention_2d import SelfAttention2d


def make(channels: int = 12, num_heads: int = 2, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return SelfAttention2d(channels, num_heads, dtype=dtype, **options)


def textbook(layer, x):
    """The definition, each position a row, every intermediate made; the result and the weights a head."""
    batch, _, height, width = x.shape
    size = height * width

    def rows(convolution, heads):
        y = torch.einsum("oc,bcp->bpo", convolution.weight[:, :, 0, 0], x.flatten(2))
        y = y if convolution.bias is None else y + convolution.bias
        return y.unflatten(2, (heads, -1)).transpose(1, 2)

    query, key, value = (rows(c, layer.num_heads) for c in (layer.query, layer.key, layer.value))
    scale = 1 / math.sqrt(query.shape[-1]) if layer.scale is None else layer.scale
    weights = (scale * query @ key.mT).softmax(-1)
    attended = (weights @ value).transpose(1, 2).reshape(batch, size, -1).mT.reshape(batch, -1, height, width)
    added = F.conv2d(attended, layer.output.weight, layer.output.bias)
    return x + (added if layer.gate is None else layer.gate * added), weights


OPTIONS = {
    "plain": {},
    "one-head": {"num_heads": 1},
    "narrow-queries": {"qk_channels": 4, "value_channels": 6},
    "wide-values": {"value_channels": 20},
    "unscaled": {"scale": 1.0, "bias": False},
    "gate": {"gate": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
def test_self_attention_2d_is_the_formula(options, channels_last, seed):
    layer = make(**options)
    if layer.gate is not None:
        layer.gate.data.fill_(0.7)
    x = testing.random_tensor(2, 12, 3, 5, seed=seed, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected, _ = textbook(layer, x)
    with fastattn.use_backend("torch"):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(layer(x, need_weights=True)[0], expected, rtol=0, atol=1e-13)


def test_self_attention_2d_weights_are_of_positions(seed):
    """The first pair of axes is where it is looked from, the second where to."""
    layer = make()
    x = testing.random_tensor(2, 12, 3, 5, seed=seed, dtype=torch.float64)
    _, expected = textbook(layer, x)
    _, each = layer(x, need_weights=True, average_attn_weights=False)
    _, average = layer(x, need_weights=True)
    assert each.shape == (2, 2, 3, 5, 3, 5)
    assert average.shape == (2, 3, 5, 3, 5)
    torch.testing.assert_close(each[:, :, 2, 1, 0, 4], expected[:, :, 2 * 5 + 1, 4], rtol=0, atol=1e-13)
    torch.testing.assert_close(average, each.mean(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(average.sum((-1, -2)), torch.ones(2, 3, 5, dtype=x.dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 12, 3, 5), (1, 12, 1, 7), (3, 12, 4, 1)], ids=str)
def test_self_attention_2d_attends_to_views_of_the_convolutions_outputs(channels_last, shape, monkeypatch):
    """No copy: what attention is given lies in the storage that the convolutions wrote, and is all of it."""
    layer = make(value_channels=20, qk_channels=6)
    made, given = [], []
    for convolution in (layer.query, layer.key, layer.value):
        convolution.register_forward_hook(lambda module, arguments, output: made.append(output))

    def spy(*tensors, **options):
        given.extend(tensors)
        return fastattn.attention(*tensors, **options)

    monkeypatch.setattr(self_attention_2d, "attention", spy)
    x = testing.random_tensor(*shape, seed=1, dtype=torch.float64)
    layer(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    assert len(made) == len(given) == 3
    for feature_map, tensor in zip(made, given):
        assert tensor.untyped_storage().data_ptr() == feature_map.untyped_storage().data_ptr()
        assert tensor.shape == (shape[0], 2, shape[2] * shape[3], feature_map.shape[1] // 2)
        assert tensor.numel() == feature_map.numel()


@pytest.mark.parametrize("options", [{}, {"qk_channels": 2, "value_channels": 8}, {"qk_channels": 1}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_self_attention_2d_allocates_no_tensor_of_positions_times_positions(training, channels_last, options):
    """In no layout, and with values that are as wide as the queries or not."""
    threads, side = torch.get_num_threads(), 48
    torch.set_num_threads(1)  # torch's kernel has some room for each
    layer = SelfAttention2d(16, 1, backend="torch", **options)
    x = testing.random_tensor(1, 16, side, side, seed=1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.set_grad_enabled(training), torch.profiler.profile(activities=activities, profile_memory=True) as found:
        y = layer(x)
        if training:
            y.sum().backward()
    torch.set_num_threads(threads)
    events: Any = found.events()
    assert any("flash_attention_for_cpu" in event.name for event in events)
    largest = max(event.cpu_memory_usage for event in events)
    assert x.nbytes <= largest < side**4 * 4 / 4


@pytest.mark.parametrize("options", [{"value_channels": 6}, {"qk_channels": 2}], ids=str)
def test_self_attention_2d_derivatives_of_two_orders(options):
    """Through rows that are widened for torch's kernel, too."""
    layer = make(4, **options)
    x = testing.random_tensor(1, 4, 1, 3, seed=2, dtype=torch.float64).requires_grad_()
    with fastattn.use_backend("torch"):
        assert torch.autograd.gradcheck(layer, [x], fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, [x], fast_mode=True)


def test_self_attention_2d_with_a_new_gate_is_the_identity(seed):
    """And learns all the same: the gate first, then, once it is open, everything behind it."""
    layer = make(gate=True)
    x = testing.random_tensor(2, 12, 3, 4, seed=seed, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert layer.gate.grad.abs() > 0
    assert not layer.value.weight.grad.any()
    layer.gate.data.fill_(0.1)
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in layer.named_parameters() if name != "key.bias")


def test_self_attention_2d_gradients_reach_every_parameter_and_the_input(seed):
    """But for the keys' bias: it adds the same to all scores of a row, which softmax does not see."""
    layer = make(num_heads=3, qk_channels=6)
    x = testing.random_tensor(2, 12, 3, 4, seed=seed, dtype=torch.float64).requires_grad_()
    y = layer(x).square().sum()
    assert torch.autograd.grad(y, x, retain_graph=True)[0].abs().min() > 0
    y.backward()
    found = {name for name, parameter in layer.named_parameters() if parameter.grad.abs().max() > 1e-10}
    assert found == {name for name, _ in layer.named_parameters()} - {"key.bias"}


def test_self_attention_2d_permutes_as_its_input(seed):
    """It knows no order of positions, neither of rows nor of columns."""
    layer = make()
    x = testing.random_tensor(1, 12, 4, 4, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(layer(x.mT), layer(x).mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer(x.flip(3)), layer(x).flip(3), rtol=0, atol=1e-13)


def test_self_attention_2d_on_kernels_matches_torch(seed):
    """A training step: output and every gradient, on the kernels within twice the error of eager torch."""
    x = testing.random_tensor(2, 12, 3, 5, seed=seed)

    def step(backend: Any, dtype: torch.dtype) -> dict[str, Any]:
        layer = make(qk_channels=4, value_channels=6, dtype=torch.float32).to(dtype)
        leaf = x.to(dtype).detach().clone().requires_grad_()
        with fastattn.use_backend(backend):
            y = layer(leaf)
            y.square().sum().backward()
        return {"y": y.detach(), "dx": leaf.grad, **{n: p.grad for n, p in layer.named_parameters() if n != "key.bias"}}

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, tensor in actual.items():
        # Two float32 computations with different orders of sums of some 30 terms
        allowance = 30 * testing.ulp(truth[name].abs().max().item(), torch.float32)
        testing.assert_within_budget(tensor, truth=truth[name], peer=peer[name], name=name, allowance=allowance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, r"channels=0: expected a positive number"),
        ({"channels": 8, "num_heads": 3}, r"qk_channels=8: num_heads=3 does not divide it"),
        ({"channels": 8, "num_heads": 2, "value_channels": 5}, r"value_channels=5: num_heads=2 does not divide it"),
        ({"channels": 8, "backend": "cuda"}, r"backend='cuda'"),
    ],
)
def test_self_attention_2d_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention2d(**arguments)


def test_self_attention_2d_refuses_what_is_no_number():
    with pytest.raises(TypeError, match=r"num_heads=2.0: expected an int, got float"):
        SelfAttention2d(4, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 12, 15), (2, 11, 3, 5), (2, 12, 0, 5)], ids=str)
def test_self_attention_2d_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 12, H, W\]"):
        make(dtype=torch.float32)(torch.zeros(shape))
