"""What is added to the scores keeps its precision, and scores keep theirs, whatever else is asked for."""

import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs, measure_error, random_tensor
from tests.ops.attention_cases import attend

B, H, L, S, D = 2, 2, 40, 56, 16
OUTPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"need_weights": True},
    "lse": {"return_lse": True},
    "dropout": {"dropout_p": 1e-9},
}


def output_of(results):
    return results[0] if isinstance(results, tuple) else results


def in_dtype(dtype, tensors, **words: Any):
    return reference(*(t.detach().to(dtype) for t in tensors), **words)


def in_float64(tensors, **words: Any):
    return in_dtype(torch.float64, tensors, **words)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float16, "alone"), *((torch.bfloat16, more) for more in ("alone", "causal", "padding", "key_bias"))],
)
def test_attention_float32_mask_beside_16_bits_is_never_narrowed(dtype, more, training, outputs, backend, device):
    """A bias around 300 in float32 tells keys apart that bfloat16 rounds to one number: the output was off by 0.76."""
    tensors = [t.requires_grad_(training) for t in attention_inputs(B, H, L, S, D, dtype=dtype, device=device, seed=2)]
    bias = 300 + random_tensor(1 if more == "key_bias" else L, S, seed=3, device=device)
    arguments: dict[str, Any] = {"is_causal": True} if more == "causal" else {}
    words: dict[str, Any] = {"upper": 0} if more == "causal" else {}
    if more == "padding":
        padding = (torch.arange(S, device=device) > 50).expand(B, S)
        arguments, words = {"key_padding_mask": padding}, {"key_padding_mask": padding}
    output: Any = output_of(attend(*tensors, attn_mask=bias, **arguments, **OUTPUTS[outputs], backend=backend))
    truth = in_float64(tensors, bias=bias.double(), **words).output
    peer = in_dtype(torch.float32, tensors, bias=bias, **words).output.to(dtype)
    assert_within_budget(output, truth=truth, peer=peer, name="output")
    if training:
        d_output = random_tensor(*output.shape, seed=4, dtype=dtype, device=device)
        for gradient in torch.autograd.grad(output, tensors, d_output):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_attention_float64_mask_beside_float32_is_never_narrowed(training, outputs, device):
    """Differences of 1 at a magnitude of 1e9, where float32 has steps of 64. (The kernels refuse float64.)"""
    tensors = [t.requires_grad_(training) for t in attention_inputs(B, H, L, S, D, device=device, seed=2)]
    bias = 1e9 + random_tensor(L, S, seed=3, device=device).double()
    output = output_of(attend(*tensors, attn_mask=bias, **OUTPUTS[outputs], backend="torch"))
    truth = in_float64(tensors, bias=bias).output
    assert measure_error(output, truth).maximum < 1e-5
    if training:
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        d_output = random_tensor(*output.shape, seed=4, device=device)
        expected = torch.autograd.grad(reference(*leaves, bias=bias).output, leaves, d_output.double())
        for ours, theirs in zip(torch.autograd.grad(output, tensors, d_output), expected):
            assert measure_error(ours, theirs).maximum < 1e-4


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.float32, None], ids=["float32_mask", "own_mask"])
def test_attention_finite_mask_never_hides(dtype, mask_dtype, outputs, backend, device):
    """finfo.min for every key is a softmax of equal numbers: float32's, beside 16 bits, would be -inf in 16 bits."""
    tensors = attention_inputs(B, H, L, S, D, dtype=dtype, device=device, seed=2)
    mask_dtype = mask_dtype or dtype
    bias = torch.full((L, S), torch.finfo(mask_dtype).min, dtype=mask_dtype, device=device)
    output = output_of(attend(*tensors, attn_mask=bias, **OUTPUTS[outputs], backend=backend))
    mean = tensors[2].double().mean(dim=2, keepdim=True).expand_as(output)
    if mask_dtype == torch.float16:  # 65504 is not so large that scores are lost beside it
        mean = in_float64(tensors).output
        assert measure_error(output, mean).maximum < 0.05
    else:
        assert measure_error(output, mean).maximum < torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("float_mask_first", [False, True])
def test_module_sum_of_two_finite_masks_never_hides(float_mask_first, device):
    """finfo.min in both masks of nn.MultiheadAttention, as code that builds them apart has it, is no -inf."""
    layer = fastattn.MultiheadAttention(16, 2, batch_first=True, device=device)
    x = random_tensor(1, 6, 16, seed=1, device=device)
    low = torch.finfo(torch.float32).min
    padding = torch.tensor([[0, low, low, 0, 0, low]], device=device)
    rows = torch.zeros(6, 6, device=device)
    rows[2] = low
    rows[3, 4] = -math.inf
    output, weights = layer(x, x, x, key_padding_mask=padding, attn_mask=rows)
    assert weights[0, 2].min() > 0  # every key carries -finfo.min or twice that, and none is hidden
    assert weights[0, 3, 4] == 0
    assert output.isfinite().all()


@pytest.mark.parametrize("value", [-1e9, 1e9, -1e6, 3e4, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("shape", [(B, 1, 1, S), (1, H, L, S)], ids=["keys", "heads"])
@pytest.mark.parametrize("extra", ["alone", "causal", "sinks"])
def test_attention_gradients_where_all_keys_of_a_row_carry_a_large_bias(value, shape, extra, backend, device):
    """Such a row is a softmax like any other. torch's CPU kernel keeps its LSE in float32, in which the logarithm of
    the sum is lost beside the bias, so that its gradients were wrong by the number of keys."""
    tensors = [t.requires_grad_() for t in attention_inputs(B, H, L, S, D, device=device, seed=2)]
    bias = torch.zeros(shape, device=device)
    bias[..., : max(1, shape[2] // 2), :] = value
    d_output = random_tensor(B, H, L, D, seed=4, device=device)
    arguments: dict[str, Any] = {"is_causal": True} if extra == "causal" else {}
    words: dict[str, Any] = {"upper": 0} if extra == "causal" else {}
    # a sink of finfo.min overflows in the kernels' base 2
    leaves = [*tensors, torch.full((H,), max(value, -1e9), device=device, requires_grad=True)]
    if extra == "sinks":  # as large as each of the keys
        arguments = {"sinks": leaves[3]}
    else:
        del leaves[3]
    found = torch.autograd.grad(attend(*tensors, attn_mask=bias, **arguments, backend=backend), leaves, d_output)

    own = [t.detach().requires_grad_() for t in leaves]
    more: dict[str, Any] = {"sinks": own[3][None]} if extra == "sinks" else words
    expected = torch.autograd.grad(reference(*own[:3], bias=bias, **more).output, own, d_output)
    # Not float64, in which scores keep the differences that float32 rounds away beside the bias. At 1e9 it leaves none,
    # and all keys are alike; at 1e6 neighbours may be rounded apart, one way here and the other there.
    step = abs(value) * torch.finfo(torch.float32).eps
    limit = 1e-4 + (20 * step if step < 1 else 0.0)
    for name, ours, theirs in zip(("query", "key", "value", "sinks"), found, expected):
        error, largest = measure_error(ours, theirs.double()).maximum, theirs.abs().max().item()
        assert error <= limit * largest + 1e-6, f"{name}: {error}, largest {largest}"


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_attention_float16_scores_beyond_its_range(outputs, backend, device):
    """64 products of 100 * 100 are 640000, in float16 inf; with weights as without they are scores like others."""
    query = torch.full((1, 1, 4, 64), 100.0, dtype=torch.float16, device=device)
    key = query.clone()
    key[:, :, 2] = 99.0
    value = random_tensor(1, 1, 4, 8, seed=1, dtype=torch.float16, device=device)
    results: Any = attend(query, key, value, **OUTPUTS[outputs], backend=backend)
    output = output_of(results)
    truth = in_float64((query, key, value))
    assert measure_error(output, truth.output).maximum < 2e-3
    if outputs == "weights":
        assert measure_error(results[1], truth.weights.mean(1)).maximum < 1e-3


@pytest.mark.parametrize("size", [(1, 2, 24, 16), (2, 4, 640, 32)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_errors_with_weights_are_no_larger_than_without(dtype, size, device):
    """At scores of a deviation of 9, bfloat16 rounds them to steps of an eighth: with weights, the torch backend made
    ten times the errors that it made without."""
    batch, heads, length, head_dim = size
    query, key, value = attention_inputs(batch, heads, length, length, head_dim, dtype=dtype, device=device, seed=2)
    query, key = 3 * query, 3 * key
    truth = in_float64((query, key, value)).output
    errors = {}
    for name, arguments in OUTPUTS.items():
        if name != "dropout":
            output = output_of(attend(query, key, value, **arguments, backend="torch"))
            errors[name] = measure_error(output, truth)
    for name in ("weights", "lse"):
        assert errors[name].maximum <= 2 * errors["plain"].maximum, errors
        assert errors[name].rms <= 1.2 * errors["plain"].rms, errors


@pytest.mark.parametrize("outputs", ["weights", "lse"])
@pytest.mark.parametrize("length", [24, 800])
def test_attention_under_autocast_keeps_scores_in_float32(length, outputs, device):
    """Autocast says in which dtype query, key and value are, and not in which the torch backend multiplies."""
    tensors = [2 * t for t in attention_inputs(1, 2, length, length, 16, device=device, seed=2)]
    leaves, own = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = output_of(attend(*leaves, **OUTPUTS[outputs], backend="torch"))
    output.float().square().sum().backward()
    expected = output_of(attend(*(t.bfloat16() for t in own), **OUTPUTS[outputs], backend="torch"))
    expected.float().square().sum().backward()
    assert torch.equal(output, expected)
    for ours, theirs in zip(leaves, own):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_16_bits_keeps_scores_in_float32(dtype, need_weights, device):
    """nn.MultiheadAttention's own inference function rounds scores to 16 bits, and overflows float16 at 65504."""
    layer = fastattn.MultiheadAttention(16, 2, batch_first=True, device=device).to(dtype).eval()
    x = 40 * random_tensor(2, 12, 16, seed=1, dtype=dtype, device=device)
    with torch.no_grad():
        output, weights = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
        q, k, v = (
            torch.nn.functional.linear(x, w, b).unflatten(2, (2, 8)).transpose(1, 2)
            for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
        )
        truth = in_float64((q, k, v))
        merged = truth.output.to(dtype).transpose(1, 2).flatten(2)
        expected = torch.nn.functional.linear(merged, layer.out_proj.weight, layer.out_proj.bias)
    # the product with out_proj rounds an output that is one rounding away
    assert measure_error(output, expected.double()).maximum < 8 * torch.finfo(dtype).eps * expected.abs().max()
    if need_weights:
        assert measure_error(weights, truth.weights).maximum < 2 * torch.finfo(dtype).eps
