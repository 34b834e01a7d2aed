"""PyTorch's own sample inputs for ``F.layer_norm`` and ``F.rms_norm``, driven through ours."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget

pytest.importorskip("expecttest", reason="torch.testing._internal needs the expecttest package")

from torch.testing._internal.common_methods_invocations import op_db

INFOS = {
    kind: next(info for info in op_db if info.name == f"nn.functional.{kind}_norm" and not info.variant_test_name)
    for kind in ("layer", "rms")
}
OURS: dict[str, Any] = {"layer": fastattn.layer_norm, "rms": fastattn.rms_norm}
THEIRS: dict[str, Any] = {"layer": F.layer_norm, "rms": F.rms_norm}
# Every dtype that torch samples, for the torch backend; complex numbers have an RMS norm.
DTYPES = [(kind, dtype) for kind, info in INFOS.items() for dtype in sorted(info.dtypes, key=str)]


def samples(kind: str, dtype: torch.dtype) -> list[Any]:
    found = list(INFOS[kind].sample_inputs("cpu", dtype, requires_grad=True))
    assert len(found) >= 6
    return found


def leaves_of(sample: Any) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (sample.input, *sample.args[1:]) if torch.is_tensor(t)]


def results_and_gradients(function: Any, sample: Any, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The norm and the gradients of the input and the vectors, computed in another dtype where one is given."""
    leaves = [t if dtype is None else t.detach().to(dtype).requires_grad_() for t in leaves_of(sample)]
    vectors = dict(zip(("weight", "bias"), leaves[1:]))
    output = function(leaves[0], normalized_shape=sample.args[0], **vectors, **sample.kwargs)
    cotangent = torch.arange(1, output.numel() + 1).view(output.shape).cos().to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def rounding_of_gradient(kind: str, sample: Any) -> float:
    """Two float32 roundings of the largest term that the input's gradient is a difference of, which may cancel: of a
    single element's layer norm, of which the deviation is the root of eps, they do so altogether."""
    x, *vectors = (t.double() for t in (sample.input.detach(), *sample.args[1:]))
    axes = tuple(range(-len(sample.args[0]), 0))
    variance = x.square().mean(axes) - (x.mean(axes).square() if kind == "layer" else 0.0)
    eps = sample.kwargs.get("eps", 1e-5)
    rstd = (variance + eps).rsqrt().nan_to_num(0.0)
    weight = vectors[0].abs().max().item() if vectors else 1.0
    return 2 * torch.finfo(torch.float32).eps * weight * (rstd.max().item() if rstd.numel() else 0.0)


@pytest.mark.parametrize(("kind", "dtype"), DTYPES, ids=lambda v: str(v).removeprefix("torch."))
def test_sample_inputs_match_torch(kind, dtype):
    """Some samples have a negative eps, whose root is not a number for either.

    Within torch.testing's tolerances; in 16 bits, where torch rounds even the statistics of a layer norm to them, and
    ours do not, no further from the truth than twice as far as torch is.
    """
    for index, sample in enumerate(samples(kind, dtype)):
        expected = results_and_gradients(THEIRS[kind], sample)
        actual = results_and_gradients(lambda *a, **k: OURS[kind](*a, **k, backend="torch"), sample)
        if dtype not in (torch.float16, torch.bfloat16):
            if kind == "layer" and math.prod(sample.args[0]) == 1:
                # the weight's gradient is 0, in place of which torch's has what rounding leaves, up to 1e-4
                expected = [t.to(dtype) for t in results_and_gradients(THEIRS[kind], sample, torch.float64)]
            torch.testing.assert_close(actual, expected, equal_nan=True)
            continue
        truth = results_and_gradients(THEIRS[kind], sample, torch.float64)
        for a, p, t in zip(actual, expected, truth):
            assert a.dtype == p.dtype
            finite = t.isfinite()
            assert torch.equal(a.isfinite(), finite)
            assert_within_budget(
                a[finite],
                truth=t[finite],
                peer=p[finite],
                name=f"{kind} sample {index}",
                allowance=rounding_of_gradient(kind, sample),
            )


@pytest.mark.parametrize("kind", INFOS)
def test_sample_inputs_second_derivatives_match_torch(kind):
    for sample in samples(kind, torch.float64):
        found = []
        for function in (THEIRS[kind], lambda *a, **k: OURS[kind](*a, **k, backend="torch")):
            leaves = leaves_of(sample)
            output = function(leaves[0], sample.args[0], *leaves[1:], **sample.kwargs)
            first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad([t.square().sum() for t in first], leaves, allow_unused=True)
            found.append([*first, *(t for t in second if t is not None)])
        torch.testing.assert_close(found[1], found[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", INFOS)
def test_sample_inputs_on_triton_are_within_budget(kind, dtype):
    """Against the formula in float64, no further than twice as far as the formula in the same dtype."""
    pytest.importorskip("triton", reason="triton is not installed")

    def by_formula(x, normalized_shape, eps=None, **vectors):
        axes = len(normalized_shape)
        flat = {name: t.flatten() for name, t in vectors.items()}
        default = 1e-5 if kind == "layer" else torch.finfo(torch.float32).eps
        found = reference(x.flatten(-axes), **flat, kind=kind, eps=default if eps is None else eps)
        return found.output.view(x.shape)

    for index, sample in enumerate(samples(kind, dtype)):
        actual = results_and_gradients(lambda *a, **k: OURS[kind](*a, **k, backend="triton"), sample)
        peer = results_and_gradients(by_formula, sample)
        truth = results_and_gradients(by_formula, sample, torch.float64)
        for a, p, t in zip(actual, peer, truth):
            assert a.dtype == dtype
            assert torch.equal(a.isnan(), t.isnan())
            finite = t.isfinite()
            assert_within_budget(
                a[finite],
                truth=t[finite],
                peer=p[finite],
                name=f"{kind} sample {index}",
                allowance=rounding_of_gradient(kind, sample),
            )


@pytest.mark.parametrize("kind", INFOS)
def test_what_torch_raises_for_ours_raises_for(kind, backend):
    """torch says RuntimeError, this package what kind of error it is."""
    errors = list(INFOS[kind].error_inputs("cpu")) if INFOS[kind].error_inputs_func else []
    assert errors or kind == "layer", "torch has error inputs for the RMS norm alone"
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            THEIRS[kind](sample.input, *sample.args, **sample.kwargs)
        with pytest.raises((TypeError, ValueError), match=r"normalized_shape|normalised"):
            OURS[kind](sample.input, *sample.args, **sample.kwargs, backend=backend)


@pytest.mark.parametrize("kind", INFOS)
def test_error_inputs_of_the_other_norm(kind, backend):
    """Those of the RMS norm are no less wrong for a layer norm."""
    for error in INFOS["rms"].error_inputs("cpu"):
        sizes, weight, eps = error.sample_input.args
        with pytest.raises((TypeError, ValueError)):
            OURS[kind](error.sample_input.input, sizes, weight, eps=eps, backend=backend)


# ------------------------------------------------------------------------------------------ what else torch's take

EXTRA: dict[str, Any] = {
    "list": lambda: (torch.randn(2, 3), [3], {}),
    "size": lambda: (torch.randn(2, 3), torch.Size([3]), {}),
    "by_keyword": lambda: (torch.randn(2, 3), (3,), {"weight": None, "eps": 1e-3}),
    "eps_zero": lambda: (torch.randn(2, 3), (3,), {"eps": 0}),
    "eps_int": lambda: (torch.randn(2, 3), (3,), {"eps": 1}),
    "eps_numpy": lambda: (torch.randn(2, 3), (3,), {"eps": pytest.importorskip("numpy").float32(1e-3)}),
    "eps_tensor": lambda: (torch.randn(2, 3), (3,), {"eps": torch.tensor(1e-3)}),
    "eps_inf": lambda: (torch.randn(2, 3), (3,), {"eps": float("inf")}),
    "sizes_numpy": lambda: (torch.randn(2, 3), (pytest.importorskip("numpy").int64(3),), {}),
    "all_axes": lambda: (torch.randn(2, 3), (2, 3), {}),
    "one_axis": lambda: (torch.randn(3), (3,), {}),
    "no_columns": lambda: (torch.randn(2, 0), (0,), {}),
    "no_rows": lambda: (torch.randn(0, 2, 3), (2, 3), {}),
    "no_inner_axis": lambda: (torch.randn(2, 0, 3), (0, 3), {}),
    "channels_last": lambda: (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), (3, 4, 5), {}),
    "strided": lambda: (torch.randn(4, 3).t(), (4,), {}),
    "expanded": lambda: (torch.randn(1, 3).expand(4, 3), (3,), {}),
    "wide_weight": lambda: (torch.randn(2, 3).bfloat16(), (3,), {"weight": torch.randn(3)}),
    "strided_weight": lambda: (torch.randn(2, 3, 4), (3, 4), {"weight": torch.randn(4, 3).t()}),
    "parameter": lambda: (torch.nn.Parameter(torch.randn(2, 3)), (3,), {"weight": torch.nn.Parameter(torch.randn(3))}),
    "meta": lambda: (torch.randn(2, 3, device="meta"), (3,), {"weight": torch.randn(3, device="meta")}),
    "inference": lambda: (torch.inference_mode()(torch.randn)(2, 3), (3,), {}),
}


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("kind", INFOS)
def test_takes_what_torch_takes(kind, name):
    """Drop-ins refuse nothing that torch takes: the torch backend computes what the kernels do not."""
    torch.manual_seed(0)
    x, sizes, arguments = EXTRA[name]()
    expected = THEIRS[kind](x, sizes, **arguments)
    for backend in ("torch", "auto"):
        actual = OURS[kind](x, sizes, **arguments, backend=backend)
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.device == expected.device
        if not actual.is_meta:
            tolerance = 4 * torch.finfo(expected.dtype).eps
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", INFOS)
def test_signatures_are_torchs_and_a_backend(kind):
    """Name for name, default for default: what is passed by position to torch's means the same here."""

    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    *ours, (last, _) = parameters(OURS[kind])
    assert ours == parameters(THEIRS[kind])
    assert last == "backend"
