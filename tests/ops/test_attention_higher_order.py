"""vmap, forward mode and second derivatives: exact where they work, never silently wrong."""

from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask, random_tensor
from tests.ops.attention_cases import attend

B, H, L, S, D = 2, 2, 4, 5, 3


def inputs(dtype, device, **options):
    return attention_inputs(B, H, L, S, D, dtype=dtype, device=device, seed=1, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- float64, by differences

CALLS: dict[str, dict[str, Any]] = {
    "plain": {"return_lse": True},
    "causal": {"is_causal": True, "return_lse": True},
    "average": {"need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False, "return_lse": True},
}


def float64_function(name, device, bias):
    leaves = [*attention_inputs(1, 2, 2, 3, 2, dtype=torch.float64, device=device, seed=1)]
    if bias:
        leaves.append(random_tensor(1, 1, 2, 3, seed=5, dtype=torch.float64, device=device))

    def function(query, key, value, attn_mask=None):
        return attend(query, key, value, attn_mask=attn_mask, **CALLS[name], backend="torch")

    return function, tuple(t.requires_grad_() for t in leaves)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", CALLS)
def test_attention_gradcheck(name, bias, device):
    function, leaves = float64_function(name, device, bias)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", CALLS)
def test_attention_gradgradcheck(name, bias, device):
    function, leaves = float64_function(name, device, bias)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------ float32, against the reference


def both(arguments):
    """fastattn and the reference with the same masks, output and LSE."""
    mask, padding = arguments.get("attn_mask"), arguments.get("key_padding_mask")

    def ours(backend):
        return lambda *qkv: attend(*qkv, **arguments, return_lse=True, backend=backend)

    def truth(query, key, value):
        found = reference(
            query,
            key,
            value,
            mask=mask,
            key_padding_mask=padding,
            upper=0 if arguments.get("is_causal") else None,
        )
        return found.output, found.lse

    return ours, truth


def masks(device):
    return {
        "attn_mask": attention_mask(B, H, L, S, broadcast="head", device=device, seed=2),
        "key_padding_mask": key_padding_mask(B, S, minimum=2, device=device, seed=3),
        "is_causal": True,
    }


def second_order(function, leaves):
    """Gradients of the squared norm of the gradients: every second derivative of attention takes part."""
    results = function(*leaves)
    d_results = [random_tensor(*r.shape, seed=i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    seen = torch.stack([torch.where(r.isfinite(), r, 0).mul(d).sum() for r, d in zip(results, d_results)])
    first = torch.autograd.grad(seen.sum(), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention_double_backward_matches_reference(masked, backend, device):
    """Nobody else's fused attention has one; PyTorch's silently has none but in its math path (pytorch#116350)."""
    ours, truth = both(masks(device) if masked else {})
    leaves = [t.requires_grad_() for t in inputs(torch.float32, device)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    actual = second_order(ours(backend), leaves)
    for found, wanted in zip(actual, second_order(truth, exact)):
        assert wanted.abs().max() > 1e-3
        assert_close(found.double(), wanted)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention_jvp_matches_reference(masked, backend, device):
    ours, truth = both(masks(device) if masked else {})
    primals = inputs(torch.float32, device)
    tangents = tuple(random_tensor(*p.shape, seed=7 + i, device=device) for i, p in enumerate(primals))
    values, derivatives, *_ = jvp(ours(backend), primals, tangents)
    exact = jvp(truth, tuple(p.double() for p in primals), tuple(t.double() for t in tangents))
    for found, wanted in zip((*values, *derivatives), (*exact[0], *exact[1])):
        visible = wanted.isfinite()
        assert_close(found.double()[visible], wanted[visible])
    assert derivatives[0].any()


# ---------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, 0), (None, 1, 1), (0, None, None)], ids=str)
def test_attention_vmap_is_a_loop(in_dims, backend, device):
    samples = 3

    def stacked(tensor, dim):
        return tensor if dim is None else torch.stack([tensor * (i + 1) for i in range(samples)], dim)

    tensors = [stacked(t, d) for t, d in zip(inputs(torch.float32, device), in_dims)]

    def function(*qkv):
        return attend(*qkv, is_causal=True, need_weights=True, return_lse=True, backend=backend)

    found = vmap(function, in_dims=in_dims)(*tensors)
    loop = [function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims))) for i in range(samples)]
    for batched, single in zip(found, zip(*loop)):
        assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("what", ["mask", "padding"])
def test_attention_vmap_over_masks(what, backend, device):
    samples, qkv = 3, inputs(torch.float32, device)
    if what == "mask":
        many = torch.stack([attention_mask(B, H, L, S, broadcast="batch_head", seed=i) for i in range(samples)])
    else:
        many = torch.stack([key_padding_mask(B, S, seed=i) for i in range(samples)])
    many = many.to(device)

    def function(mask):
        argument = {"attn_mask" if what == "mask" else "key_padding_mask": mask}
        return attend(*qkv, **argument, return_lse=True, backend=backend)

    for batched, single in zip(vmap(function)(many), zip(*(function(m) for m in many))):
        assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("weights", [False, True], ids=["output", "weights"])
def test_attention_per_sample_gradients(weights, backend, device):
    """vmap of grad, as differential privacy needs it (pytorch#176265)."""
    query, key, value = inputs(torch.float32, device)
    queries = torch.stack([query * (i + 1) for i in range(3)])

    def loss(query, key, value):
        found = attend(query, key, value, need_weights=weights, return_lse=True, backend=backend)
        return sum(t.square().sum() for t in found)

    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(queries, key, value)
    loop = [grad(loss, argnums=(0, 1, 2))(q, key, value) for q in queries]
    for batched, single in zip(found, zip(*loop)):
        assert_close(batched, torch.stack(single))


def test_attention_per_sample_gradients_of_a_bias(device):
    """On the backend that has one."""
    query, key, value = inputs(torch.float32, device)
    biases = random_tensor(3, 1, 1, L, S, seed=4, device=device)

    def loss(bias):
        output, lse = attend(query, key, value, attn_mask=bias, return_lse=True, backend="torch")
        return output.square().sum() + lse.sum()

    assert_close(vmap(grad(loss))(biases), torch.stack([grad(loss)(bias) for bias in biases]))
