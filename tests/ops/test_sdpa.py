"""``fastattn.scaled_dot_product_attention`` is torch's: on PyTorch's own samples, and on shapes of every kind."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.testing import assert_within_budget, random_tensor

NAME = "nn.functional.scaled_dot_product_attention"


def op_info():
    """PyTorch's own description of the function, with which it tests its own implementations."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs the expecttest package")
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == NAME)


def weight_error(query, key):
    """The relative error of a weight in float32: PyTorch's samples have scores of 100, and so 100 roundings of 1.

    So has eager's, but the few elements of a sample are too few to derive a budget from: this is the bound itself.
    """
    scores = query.detach().abs().amax() * key.detach().abs().sum(dim=-1).amax() / query.shape[-1] ** 0.5
    return torch.finfo(torch.float32).eps * scores.item()


def expected(function_arguments):
    """The same call in float64 (zero where a row sees nothing) and in its own dtype, by torch's math path."""
    (query, key, value), rest = function_arguments

    def run(dtype):
        arguments = dict(rest)
        mask = arguments.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            arguments["attn_mask"] = mask.to(dtype)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), **arguments)

    return run(torch.float64), run(query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_sdpa_takes_pytorchs_own_samples(dtype, backend, device):
    info, taken = op_info(), 0
    for sample in info.sample_inputs(device, dtype, requires_grad=False):
        query, (key, value), arguments = sample.input, sample.args, dict(sample.kwargs)
        dropout_p = arguments.get("dropout_p", 0.0)
        with fastattn.use_backend(backend):
            output = fastattn.scaled_dot_product_attention(query, key, value, **arguments)
        exact, eager = expected(((query, key, value), {**arguments, "dropout_p": 0.0}))
        assert output.shape == exact.shape
        assert output.dtype == dtype
        if dropout_p == 0.0:  # else the two draw different numbers
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            assert_within_budget(
                output,
                truth=exact.nan_to_num(),
                peer=eager.nan_to_num(),
                name=f"output of {shapes} {' '.join(arguments)}",
                allowance=weight_error(query, key) * value.abs().amax().item(),
            )
        taken += 1
    assert taken >= 10


@pytest.mark.parametrize("sample_index", range(6))
def test_sdpa_gradients_of_pytorchs_own_samples(sample_index, backend, device):
    samples = list(op_info().sample_inputs(device, torch.float32, requires_grad=True))
    samples = [s for s in samples if not s.kwargs.get("dropout_p")]
    sample = samples[sample_index * len(samples) // 6]
    leaves = [t.detach().requires_grad_() for t in (sample.input, *sample.args)]
    with fastattn.use_backend(backend):
        output = fastattn.scaled_dot_product_attention(*leaves, **sample.kwargs)
    d_output = random_tensor(*output.shape, seed=1, device=device)
    actual = torch.autograd.grad(output, leaves, d_output)

    def truth(dtype):
        exact = [t.detach().to(dtype).requires_grad_() for t in leaves]
        found, _ = expected((exact, sample.kwargs))
        return torch.autograd.grad(found, exact, d_output.to(found.dtype))

    for found, exact in zip(actual, truth(torch.float64)):
        atol = weight_error(*leaves[:2]) * exact.abs().amax().item()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=atol)


def test_sdpa_has_torchs_signature():
    words = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    documented = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(words) == documented
    head = (F.scaled_dot_product_attention.__doc__ or "").partition("->")[0]
    assert [w for w in documented if w in head] == documented
    defaults = [p.default for p in words.values()][3:]
    assert defaults == [None, 0.0, False, None, False]


@pytest.mark.parametrize(
    ("query", "key", "mask", "enable_gqa"),
    [
        ((5, 8), (7, 8), None, False),
        ((5, 8), (7, 8), (5, 7), False),
        ((3, 5, 8), (3, 7, 8), (5, 7), False),
        ((3, 5, 8), (3, 7, 8), (3, 1, 7), False),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 5, 7), False),
        ((2, 3, 5, 8), (1, 3, 7, 8), (3, 5, 7), False),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 5, 7), False),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 1, 1, 5, 7), False),
        ((2, 1, 3, 5, 8), (1, 2, 3, 7, 8), None, False),
        ((2, 6, 5, 8), (2, 3, 7, 8), (2, 6, 5, 7), True),
        ((6, 5, 8), (2, 7, 8), (5, 7), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_sdpa_of_any_number_of_dimensions(query, key, mask, enable_gqa, kind, backend, device):
    tensors = [random_tensor(*shape, seed=i, device=device) for i, shape in enumerate((query, key, key))]
    arguments: dict[str, Any] = {"enable_gqa": enable_gqa}
    if mask is not None:
        scores = random_tensor(*mask, seed=3, device=device)
        arguments["attn_mask"] = scores > -1 if kind == "bool" else scores
    exact, eager = expected((tensors, arguments))
    with fastattn.use_backend(backend):
        output = fastattn.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], **arguments)
    assert output.shape == exact.shape
    assert_within_budget(output, truth=exact.nan_to_num(), peer=eager.nan_to_num(), name="output")
