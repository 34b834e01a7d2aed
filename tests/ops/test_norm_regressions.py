"""What users of other fused norms report, each as a test that tells its story, and what this one got wrong once."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.machines import INTERPRETING
from tests.ops.norm_cases import FUNCTIONS, Case, check

KINDS = ["layer", "rms"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def norm(kind: str, *args: Any, **kwargs: Any) -> Any:
    return FUNCTIONS[kind](*args, **kwargs)


def draw(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("offset", [1000.0, 30000.0])
@pytest.mark.parametrize("size", [769, 2049])
def test_norm_of_rows_far_from_zero(size, offset, kind, backend, device):
    """Masked lanes that enter the variance, or ``E[x^2] - E[x]^2``, are wrong by 17 % at a thousand deviations."""
    check("far from zero", Case(kind=kind, size=size, offset=offset, residual="none", outputs="norm"), backend, device)


def test_layer_norm_far_from_zero_is_exact_to_float32(device):
    """The mean in two parts: the kernels lose nothing that the float32 input still has, where torch's lose digits."""
    pytest.importorskip("triton", reason="triton is not installed")
    x = draw(64, 1000, seed=1, device=device) + 1000.0
    truth = F.layer_norm(x.double(), (1000,))
    error = (fastattn.layer_norm(x, (1000,), backend="triton").double() - truth).abs().max().item()
    assert error < 8 * torch.finfo(torch.float32).eps
    of_torch = (F.layer_norm(x.cpu(), (1000,)).double() - truth.cpu()).abs().max().item()
    assert error <= of_torch


def test_gradient_of_a_bfloat16_norms_weight(kind, backend, device):
    """Statistics kept in bfloat16 cost the weight's gradient 0.9 %."""
    check("many rows", Case(kind=kind, dtype="bf16", size=64, rows=(500,), outputs="norm"), backend, device)


def test_norm_of_a_constant_row(kind, backend, device):
    """Zero variance: the layer norm is the bias, whatever rounding has made of the mean."""
    x = torch.full((3, 769), 0.1, device=device)
    output = norm(kind, x, bias=torch.full((769,), 2.0, device=device), backend=backend)
    expected = 2.0 if kind == "layer" else 2.0 + 0.1 / math.sqrt(0.01 + torch.finfo(torch.float32).eps)
    torch.testing.assert_close(output, torch.full_like(output, expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5])
def test_epsilon_is_what_was_asked_for(eps, kind, backend, device):
    x = draw(4, 50, seed=1, device=device) * 1e-3
    truth = reference(x.double(), kind=kind, eps=eps).output
    peer = reference(x, kind=kind, eps=eps).output
    assert_within_budget(norm(kind, x, eps=eps, backend=backend), truth=truth, peer=peer, name="output")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(value, kind, backend, device):
    """Rows share tiles, and sums of gradients, but not each other's NaN."""
    x = draw(9, 40, seed=1, device=device)
    x[4, 7] = value
    x.requires_grad_()
    output, total = norm(kind, x, x.detach() * 0 + 1, return_residual=True, backend=backend)
    assert output[4].isnan().any()
    others = [i for i in range(9) if i != 4]
    assert output[others].isfinite().all()
    (d_x,) = torch.autograd.grad(output[others].sum() + total[others].sum(), x)
    assert d_x[others].isfinite().all()


# ------------------------------------------------------------------------------------------------ shapes and strides


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7), (2, 0, 2, 0, 7)])
def test_any_rank(shape, kind, backend, device):
    """FlagGems#5392: three axes were taken for two."""
    x, residual = (draw(*shape, seed=i, device=device) for i in (1, 2))
    output, total = norm(kind, x, residual, return_residual=True, backend=backend)
    assert output.shape == total.shape == shape
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(output, reference(x, residual, kind=kind, eps=1e-5).output, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 130, 257])
def test_gradients_of_vectors_for_any_number_of_rows(rows, kind, backend, device):
    """attorch#18: as many partial sums as rows divided by the block, rounded down, under a grid rounded up."""
    check("rows", Case(kind=kind, size=33, rows=(rows,), x_bias="own"), backend, device)


def test_offsets_beyond_32_bits(kind, device):
    """Row times stride in 32 bits wraps: two rows, more than 2^31 elements apart (never touched in between)."""
    pytest.importorskip("triton", reason="triton is not installed")
    size, apart = 40, 2**31 + 8
    buffer = torch.empty(apart + size, dtype=torch.bfloat16, device=device)
    x = buffer.as_strided((2, size), (apart, 1))
    x.copy_(draw(2, size, seed=1, device=device, dtype=torch.bfloat16))
    far = x.detach().requires_grad_()
    near = x.clone().requires_grad_()
    weight = draw(size, seed=2, device=device, dtype=torch.bfloat16)
    found = []
    for leaf in (far, near):
        output = norm(kind, leaf, None, weight, backend="triton")
        found.append((output, *torch.autograd.grad(output.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_views_are_read_as_they_lie(kind, device, monkeypatch):
    """No copy: neither of rows with gaps, nor of a transposed batch, nor of what broadcasts."""
    pytest.importorskip("triton", reason="triton is not installed")

    def refuse(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        assert tensor.is_contiguous(), "a copy was made"
        return tensor

    views = [
        draw(6, 20, seed=1, device=device)[:, 3:13],
        draw(3, 2, 10, seed=1, device=device).transpose(0, 1),
        draw(1, 3, 10, seed=1, device=device).expand(2, 3, 10),
        draw(6, 20, seed=1, device=device)[:, ::2],
        draw(2, 3, 4, 10, seed=1, device=device).transpose(1, 2),  # [B, H, L, D] of [B, L, H, D]
    ]
    expected = [norm(kind, v.contiguous(), v.contiguous(), backend="triton") for v in views]
    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    for view, output in zip(views, expected):
        assert torch.equal(norm(kind, view, view, backend="triton"), output)


# --------------------------------------------------------------------------------------------------------- gradients


def test_inputs_and_gradients_are_left_as_they_were(kind, backend, device):
    """Liger-Kernel wrote dX over dY, which another consumer of the same gradient then read."""
    x, residual, d_output, d_total = (draw(5, 40, seed=i, device=device) for i in range(4))
    weight = draw(40, seed=5, device=device)
    everything = (x, residual, weight, d_output, d_total)
    before = [t.clone() for t in everything]
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    results = norm(kind, *leaves, return_residual=True, backend=backend)
    torch.autograd.grad(results, leaves, (d_output, d_total))
    assert all(torch.equal(t, b) for t, b in zip(everything, before))


@pytest.mark.parametrize(
    "wanted", ["x", "residual", "weight", "bias", "x_bias", "row_scale", "x residual", "weight bias"]
)
def test_only_some_gradients_are_wanted(wanted, kind, backend, device):
    """unsloth's layer norm had no gradient of the weight at all; here any of them, alone, is what it is among all."""
    names = ("x", "residual", "weight", "bias", "x_bias", "row_scale")
    shapes = {**dict.fromkeys(names, (24,)), **dict.fromkeys(("x", "residual"), (6, 24)), "row_scale": (6,)}
    tensors = {name: draw(*shapes[name], seed=i, device=device) for i, name in enumerate(names)}
    d_output = draw(6, 24, seed=9, device=device)

    def gradients(wanted: list[str]) -> tuple[torch.Tensor, ...]:
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        output = norm(kind, **leaves, backend=backend)
        return torch.autograd.grad(output, [leaves[name] for name in wanted], d_output)

    chosen = wanted.split()
    every = dict(zip(names, gradients(list(names))))
    assert all(torch.equal(g, every[name]) for g, name in zip(gradients(chosen), chosen))


def test_only_the_sum_or_only_the_norm_is_used(kind, backend, device):
    """One of the two results has no gradient at all."""
    x, residual = (draw(5, 40, seed=i, device=device).requires_grad_() for i in (1, 2))
    output, total = norm(kind, x, residual, return_residual=True, backend=backend)
    g = draw(5, 40, seed=3, device=device)
    assert all(torch.equal(d, g) for d in torch.autograd.grad(total, (x, residual), g, retain_graph=True))
    alone = norm(kind, x, residual, backend=backend)
    assert torch.equal(alone, output)
    for d, expected in zip(torch.autograd.grad(output, (x, residual), g), torch.autograd.grad(alone, (x, residual), g)):
        assert torch.equal(d, expected)


def test_shared_gradients_of_leaves_do_not_alias(kind, backend, device):
    """dx and dr are one buffer inside; what is accumulated into ``.grad`` of one must not show in the other's."""
    x, residual = (draw(5, 40, seed=i, device=device).requires_grad_() for i in (1, 2))
    norm(kind, x, residual, backend=backend).square().sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    kept = residual.grad.clone()
    x.grad.add_(1.0)
    assert torch.equal(residual.grad, kept)


@pytest.mark.parametrize("axes", [(8,), (2, 4)])
def test_second_backward_adds_to_each_gradient_once(axes, kind, backend, device):
    """Nor must it where the axes to normalise are made one, so that the gradients are views."""
    x, residual = (draw(3, *axes, seed=i, device=device).requires_grad_() for i in (1, 2))
    expected = torch.zeros_like(x)
    for _ in range(4):  # by the long way and by the short one
        output = norm(kind, x, residual, normalized_shape=axes, backend=backend)
        (found,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
        output.square().sum().backward()
        expected += found
    for leaf in (x, residual):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


def test_one_tensor_as_both_x_and_residual(kind, backend, device):
    x = draw(5, 40, seed=1, device=device).requires_grad_()
    output = norm(kind, x, x, eps=1e-5, backend=backend)
    expected = reference(x, x, kind=kind, eps=1e-5).output
    g = draw(5, 40, seed=2, device=device)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(o, x, g)[0] for o in (output, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [96, 1025])
def test_twenty_equal_runs(size, kind, backend, device):
    """No atomics: every result is bitwise the same in every run."""
    tensors = [
        draw(*shape, seed=i, device=device) for i, shape in enumerate([(70, size)] * 2 + [(size,)] * 3 + [(70,)])
    ]
    leaves = [t.requires_grad_() for t in tensors]
    names = ("x", "residual", "weight", "bias", "x_bias", "row_scale")
    runs = []
    # an interpreter runs one program after another, and says in the second run what it says in all
    for _ in range(2 if INTERPRETING and backend == "triton" else 20 if size == 96 else 4):
        torch.manual_seed(3)
        results = norm(
            kind, **dict(zip(names, leaves)), dropout_p=0.2, return_residual=True, backend=backend
        )  # fmt: skip
        runs.append([*results, *torch.autograd.grad([r.square().sum() for r in results], leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


# ----------------------------------------------------------------------------------------------------- what is kept


def test_sum_in_another_dtype_is_what_is_normalised(backend, device):
    """A float32 stream beside bfloat16 branches: the sum keeps its digits, the norm leaves in the branch's dtype."""
    x = draw(4, 64, seed=1, device=device, dtype=torch.bfloat16)
    residual = draw(4, 64, seed=2, device=device)
    output, total = fastattn.add_layer_norm(x, residual, return_residual=True, backend=backend)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + x)


@pytest.mark.parametrize("round_residual", [True, False])
def test_norm_of_the_rounded_sum(round_residual, backend, device):
    """By default the norm is that of the sum that is returned, to the last bit."""
    x, residual = (draw(4, 64, seed=i, device=device, dtype=torch.bfloat16) for i in (1, 2))
    options = {"out_dtype": torch.float32, "backend": backend}
    output, total = norm("layer", x, residual, return_residual=True, round_residual=round_residual, **options)
    again = norm("layer", total, **options)
    assert torch.equal(output, again) == round_residual


def test_nothing_added_returns_x_itself(kind, backend, device):
    x = draw(4, 64, seed=1, device=device)
    _, total = norm(kind, x, return_residual=True, backend=backend)
    assert total.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("of_x", "of_residual"), [((3, 1), (3, 8)), ((2, 1, 8), (1, 3, 8)), ((1, 8), (5, 8)), ((2, 3, 8), (3, 8))]
)
def test_shapes_broadcast(of_x, of_residual, kind, backend, device):
    """As they do in ``x + residual``: positions beside a batch, one row for all."""
    x, residual = (draw(*shape, seed=i, device=device).requires_grad_() for i, shape in enumerate((of_x, of_residual)))
    output = norm(kind, x, residual, eps=1e-5, backend=backend)
    total = x + residual
    expected = reference(total, kind=kind, eps=1e-5).output
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)
    g = draw(*output.shape, seed=3, device=device)
    for found, wanted in zip(*(torch.autograd.grad(o, (x, residual), g) for o in (output, expected))):
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=5e-5)


def test_rows_that_need_more_strides_than_a_kernel_has(kind, backend, device):
    """Four axes in an order of their own: those tensors alone are copied."""
    x = draw(2, 3, 2, 3, 8, seed=1, device=device).permute(2, 1, 3, 0, 4)
    assert torch.equal(norm(kind, x, backend=backend), norm(kind, x.contiguous(), backend=backend))


def test_a_wide_bias_of_a_narrow_branch_is_rounded_once(kind, backend, device):
    """A float32 bias, or row scale, of a bfloat16 branch was rounded before it was added."""
    x = draw(64, 128, seed=1, device=device, dtype=torch.bfloat16)
    bias, scale = draw(128, seed=2, device=device), draw(64, seed=3, device=device)
    for more, total in (
        ({"x_bias": bias}, x.float() + bias),
        ({"row_scale": scale}, x.float() * scale[:, None]),
    ):
        _, found = norm(kind, x, return_residual=True, backend=backend, **more)
        assert torch.equal(found, total.to(torch.bfloat16))


def test_a_weight_in_the_residuals_place_is_refused(kind, device):
    """``F.layer_norm`` has the weight there, and a vector would broadcast."""
    x, weight = draw(3, 8, seed=1, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"residual \(8,\): .*no vector"):
        norm(kind, x, weight)


def test_sixteen_bits_under_another_default_dtype(kind, backend, device):
    x = draw(3, 8, seed=1, device=device, dtype=torch.bfloat16)
    expected = norm(kind, x, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(norm(kind, x, backend=backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_kept_that_nobody_will_differentiate(kind, device):
    """Evaluation of a frozen model outside of no_grad: the sum is not stored."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastattn.ops.residual_norm.call import make_call
    from fastattn.ops.residual_norm.operator import operands

    x = draw(3, 8, seed=1, device=device)
    assert not operands(make_call(x, x, None, None, kind=kind, eps=1e-5), None)[1].keeps
    x.requires_grad_()
    assert operands(make_call(x, x, None, None, kind=kind, eps=1e-5), None)[1].keeps


@pytest.mark.parametrize("learned", [False, True])
def test_vmap_of_no_samples(learned, kind, backend, device):
    x, weight = torch.zeros(0, 3, 8, device=device), torch.ones(0, 8, device=device)
    if learned:
        output = torch.func.vmap(lambda x, w: norm(kind, x, None, w, backend=backend))(x, weight)
    else:
        output = torch.func.vmap(lambda x: norm(kind, x, x, backend=backend))(x)
    assert output.shape == (0, 3, 8)


@pytest.mark.parametrize("argument", [0, 1], ids=["x", "weight"])
def test_jacobian_of_a_gradient(argument, kind, device):
    """vmap around a finished double backward crashed where there was a weight: a transform inside another's rule."""
    pytest.importorskip("triton", reason="triton is not installed")
    x, residual = (draw(2, 5, seed=i, device=device) for i in (1, 2))
    weight = draw(5, seed=3, device=device)

    def jacobians(backend: str) -> tuple[torch.Tensor, ...]:
        def scalar(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return norm(kind, x, residual, weight, backend=backend).pow(3).sum()

        of_gradient = torch.func.jacrev(torch.func.grad(scalar, argument), argument)
        of_jacobian = torch.func.jacrev(torch.func.jacrev(scalar, argument), argument)
        third = torch.func.grad(lambda x: of_gradient(x, weight).square().sum())
        return of_gradient(x, weight), of_jacobian(x, weight), third(x)

    for found, wanted in zip(jacobians("triton"), jacobians("torch")):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 8, 24, 40, 300])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_near_the_end_of_their_range_are_finite_where_torchs_are(size, dtype, kind, backend, device):
    """Their squares overflow, the inverse deviation is 0, and so is the norm: 0 * inf and inf - inf made NaN of it, in
    training on the CPU in bfloat16, and in the kernels wherever a sum of the row or a distance overflows."""
    torchs = F.layer_norm if kind == "layer" else F.rms_norm
    drop_in = fastattn.layer_norm if kind == "layer" else fastattn.rms_norm
    largest = torch.finfo(dtype).max
    uniform = torch.rand(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    for share in (2 * uniform - 1, uniform, torch.ones_like(uniform)):
        for magnitude in (0.98, 0.3, 1e-13 if dtype != torch.float16 else 0.01):
            x = (share * magnitude * largest).to(device, dtype)
            results = []
            for norm_of in (torchs, lambda *args: drop_in(*args, backend=backend)):
                leaves = [x.clone().requires_grad_(), torch.ones(size, device=device, dtype=dtype, requires_grad=True)]
                output = norm_of(leaves[0], (size,), leaves[1])
                results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
            for have, want in zip(results[1], results[0]):
                assert have[want.isfinite()].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_one_element_has_no_gradients(dtype, backend, device):
    """The element minus itself is 0. torch's kernel leaves what rounding makes of it, times the gradient, up to 0.2."""
    x = draw(9, 1, seed=1, device=device, dtype=dtype) * 1000
    leaves = [x.requires_grad_(), torch.ones(1, device=device, dtype=dtype, requires_grad=True)]
    output = fastattn.layer_norm(leaves[0], (1,), leaves[1], backend=backend)
    assert not output.any()
    for gradient in torch.autograd.grad(output, leaves, torch.ones_like(output)):
        assert not gradient.any()


def test_rms_norms_weight_of_tiny_and_huge_rows(device):
    """The gradient times the row, before it is normalised, underflows here and overflows there."""
    for magnitude in (1e-41, 1e18):
        x, weight = (torch.ones(2, 8, device=device) * magnitude, torch.ones(8, device=device, requires_grad=True))
        output = fastattn.rms_norm(x, (8,), weight, eps=0.0 if magnitude > 1 else 1e-5, backend="torch")
        gradient = torch.autograd.grad(output, weight, torch.full_like(output, 1e21 if magnitude > 1 else 1.0))[0]
        torch.testing.assert_close(gradient, (output.detach() * (1e21 if magnitude > 1 else 1.0)).sum(0))


LAYOUTS_REFUSED = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)]), "is a nested tensor"),
    "sparse": (lambda: torch.ones(2, 8).to_sparse(), "has the layout torch.sparse_coo"),
    "rows": (lambda: torch.ones(2, 8).to_sparse_csr(), "has the layout torch.sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta.*")
@pytest.mark.parametrize("name", LAYOUTS_REFUSED)
def test_nested_and_sparse_inputs_get_a_sentence(name, kind):
    """torch's own words are of sizes that a NestedTensorImpl does not support, and of operators of SparseCPU."""
    make, words = LAYOUTS_REFUSED[name]
    with pytest.raises(TypeError, match=f"x {words}.*: expected a dense tensor"):
        norm(kind, make())
    with pytest.raises(TypeError, match=f"residual {words}.*: expected a dense tensor"):
        norm(kind, torch.ones(2, 8), make())
