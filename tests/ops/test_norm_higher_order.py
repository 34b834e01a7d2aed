"""Second and third derivatives, forward mode and vmap of the norms: exact where they work, never silently wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.ops.norm_cases import FUNCTIONS

EPS = 1e-3
KINDS = ["layer", "rms"]
# What has a gradient beside x, and the other arguments.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bare": ("", {}),
    "weight": ("weight", {}),
    "affine": ("weight bias", {}),
    "bias": ("bias", {}),
    "unit_offset": ("weight", {"unit_offset": True}),
    "residual": ("residual weight bias", {}),
    "residual_returned": ("residual weight bias", {"return_residual": True}),
    "x_bias": ("x_bias weight", {"return_residual": True}),
    "row_scale": ("row_scale weight", {"return_residual": True}),
    "all": ("residual weight bias x_bias row_scale", {"unit_offset": True, "return_residual": True}),
    "all_unrounded": ("residual weight bias x_bias row_scale", {"round_residual": False}),
}
# Those that between them take every branch of the operators' formulas, for what is slow or comes in many variants.
FEW = ["bare", "affine", "row_scale", "all"]


def make_leaves(name: str, rows: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """``x`` and what else has a gradient, in the order of :data:`CALLS`."""
    shapes: dict[str, tuple[int, ...]] = {"x": (*rows, size), "residual": (*rows, size), "row_scale": rows}
    names = ["x", *CALLS[name][0].split()]
    leaves = [
        random_tensor(*shapes.get(n, (size,)), seed=11 + i, dtype=dtype, device=device) for i, n in enumerate(names)
    ]
    # a row scale near 0 has huge derivatives, a norm behind nothing but a row scale hardly any by it: they cancel
    return [1 + t / 4 if n == "row_scale" else t for n, t in zip(names, leaves)]


def ours(kind: str, name: str, backend: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The results as a function of the leaves."""
    names = CALLS[name][0].split()

    def function(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = FUNCTIONS[kind](x, **dict(zip(names, others)), eps=EPS, **CALLS[name][1], backend=backend)
        return found if isinstance(found, tuple) else (found,)

    return function


def formula(kind: str, name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same by the reference."""
    names = CALLS[name][0].split()
    options = {n: value for n, value in CALLS[name][1].items() if n != "return_residual"}

    def function(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call: dict[str, Any] = {"kind": kind, "eps": EPS, **options, **dict(zip(names, others))}
        found = reference(x, **call)
        return tuple(found) if CALLS[name][1].get("return_residual") else found[:1]

    return function


def assert_derivatives(
    derivatives: Callable[[Any, torch.dtype], Any],
    kind: str,
    name: str,
    backend: str,
) -> None:
    """What ``derivatives`` makes of our function within the error budget of the same made of the reference.

    It returns tensors, given a function and a dtype to draw in. The allowance: derivatives cancel, so that an error may
    be as large as a rounding of their largest term; that is no larger than all of a result's largest elements are, and
    there are as many roundings as there are operations in a row's chain, about 16, which add up like a random walk.
    """
    actual = derivatives(ours(kind, name, backend), torch.float32)
    peer, truth = (derivatives(formula(kind, name), dtype) for dtype in (torch.float32, torch.float64))
    assert len(actual) == len(truth)
    largest = max(t.abs().max().item() for t in truth)
    assert largest > 1e-3
    for index, (a, p, t) in enumerate(zip(actual, peer, truth)):
        assert a.dtype == torch.float32
        allowance = math.sqrt(16) * torch.finfo(torch.float32).eps * largest
        assert_within_budget(a, truth=t, peer=p, name=f"{kind} {name} {index}", allowance=allowance)


def loss_of(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
    """A scalar in which every element has another weight, and curvature."""

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        terms = []
        for i, result in enumerate(function(*leaves)):
            weights = torch.arange(1, result.numel() + 1, device=result.device).view(result.shape).mul(i + 1).cos()
            terms.append((result * weights.to(result.dtype) + 0.25 * result.square()).sum())
        return torch.stack(terms).sum()

    return loss


# --------------------------------------------------------------------------------------------- float64, by differences


def float64_leaves(name: str, device: torch.device, rows: tuple[int, ...] = (2, 2)) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in make_leaves(name, rows, 3, device, torch.float64)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_gradcheck(kind, name, device):
    function, leaves = ours(kind, name, "torch"), float64_leaves(name, device)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_gradgradcheck(kind, name, device):
    function, leaves = ours(kind, name, "torch"), float64_leaves(name, device)
    assert torch.autograd.gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize("rows", [(), (1,), (0,)], ids=["one_row", "batch_of_one", "no_rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_gradgradcheck_of_few_rows(kind, rows, device):
    function, leaves = ours(kind, "affine", "torch"), float64_leaves("affine", device, rows)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_third_derivatives_gradcheck(kind, name, device):
    function, leaves = ours(kind, name, "torch"), float64_leaves(name, device)

    def second(*tensors):
        first = torch.autograd.grad(loss_of(function)(*tensors), tensors, create_graph=True)
        return torch.autograd.grad([t.square().sum() for t in first], tensors, create_graph=True)

    assert torch.autograd.gradcheck(second, leaves, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_second_derivatives_through_checkpointing(kind, name, device):
    """The saved tensors are then what the recomputation saves."""
    function, leaves = ours(kind, name, "torch"), float64_leaves(name, device)

    def checkpointed(*tensors):
        return checkpoint(lambda x, *others: function(x.sin(), *others), *tensors, use_reentrant=False)

    assert torch.autograd.gradgradcheck(checkpointed, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_gradgradcheck_of_one_of_both(kind, frozen, device):
    """A frozen input, and a frozen weight as in LoRA."""
    x, weight = (t.requires_grad_(frozen != n) for t, n in zip(float64_leaves("weight", device), ("x", "weight")))
    function = ours(kind, "weight", "torch")
    assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)


# What x, residual and weight are made of, of one tensor [N].
ENTANGLED: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "input_made_of_weight": lambda t: {"x": torch.stack([t.sin(), t.square()]), "weight": t},
    "weight_made_of_input": lambda t: {"x": torch.stack([t, 2 * t]), "weight": t.sin() + 1},
    "one_tensor": lambda t: {"x": t, "weight": t, "bias": t},
    "its_own_residual": lambda t: {"x": t, "residual": t, "weight": t.exp()},
    "residual_made_of_input": lambda t: {"x": t.sin(), "residual": t.sin().square(), "weight": t.exp()},
}


@pytest.mark.parametrize("name", ENTANGLED)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_counts_no_gradient_twice(kind, name, backend, device):
    """Arguments that are made of one another: a backward that differentiates its inputs along must not run on into
    what they were made of, neither for the first derivative (under create_graph) nor for the second."""

    def norm(tensor):
        return FUNCTIONS[kind](**ENTANGLED[name](tensor), eps=EPS, backend=backend)

    def truth(tensor):
        arguments: dict[str, Any] = {"kind": kind, "eps": EPS, **ENTANGLED[name](tensor)}
        return reference(**arguments).output

    dtype = torch.float64 if backend == "torch" else torch.float32
    found = []
    for function in (norm, truth):
        leaf = torch.linspace(0.5, 1.5, 6, dtype=dtype, device=device).requires_grad_()
        weights = torch.arange(6, dtype=dtype, device=device)
        (first,) = torch.autograd.grad((function(leaf) * weights).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append((first, second))
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)


def test_rms_norm_of_a_wide_row_has_a_double_backward(device):
    """Above 4096 elements the torch backend sums squares by other operations."""
    size = 5000
    tensors = [random_tensor(*shape, seed=1, dtype=torch.float64, device=device) for shape in ((2, size), (size,))]
    found = []
    for norm in (F.rms_norm, lambda *t: fastattn.rms_norm(*t, backend="torch")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(norm(leaves[0], (size,), leaves[1]).sin().sum(), leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad([t.square().sum() for t in first], leaves)))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_double_backward_in_sixteen_bits(kind, dtype, backend, device):
    """Against the reference in the same dtype, from the same rounded numbers."""

    def derivatives(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in rounded]
        first = torch.autograd.grad(loss_of(function)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad([t.float().square().sum() for t in first], leaves)

    rounded = make_leaves("all", (2, 3), 16, device, dtype)
    actual = derivatives(ours(kind, "all", backend), dtype)
    peer, truth = (derivatives(formula(kind, "all"), of) for of in (dtype, torch.float64))
    largest = max(t.abs().max().item() for t in truth)
    for index, (a, p, t) in enumerate(zip(actual, peer, truth)):
        # first gradients are rounded to 16 bits where they leave, and their squares' gradients carry that on
        allowance = torch.finfo(dtype).eps * largest
        assert_within_budget(a, truth=t, peer=p, name=f"{kind} {index}", allowance=allowance)


# ------------------------------------------------------------------------------------ float32, against the reference

ROWS, SIZE = (2, 2), 5


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_double_backward_matches_reference(kind, name, backend, device):
    def derivatives(function, dtype):
        leaves = [t.requires_grad_() for t in make_leaves(name, ROWS, SIZE, device, dtype)]
        first = torch.autograd.grad(loss_of(function)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad([t.square().sum() for t in first], leaves, allow_unused=True)
        return [*first, *(torch.zeros_like(leaf) if t is None else t for t, leaf in zip(second, leaves))]

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_third_derivatives_match_reference(kind, name, backend, device):
    def derivatives(function, dtype):
        leaves = [t.requires_grad_() for t in make_leaves(name, ROWS, SIZE, device, dtype)]
        scalar = loss_of(function)(*leaves)
        for _ in range(2):
            found = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True)
            scalar = torch.stack([t.square().sum() for t in found if t is not None]).sum()
        return torch.autograd.grad(scalar, leaves, materialize_grads=True)

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("only", [0, 1], ids=["norm", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_double_backward_of_one_result(kind, only, backend, device):
    """The other one, returned as well, has no gradient."""

    def derivatives(function, dtype):
        leaves = [t.requires_grad_() for t in make_leaves("all", ROWS, SIZE, device, dtype)]
        scalar = loss_of(lambda *t: function(*t)[only : only + 1])(*leaves)
        first = torch.autograd.grad(scalar, leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(torch.stack([t.square().sum() for t in first]).sum(), leaves, allow_unused=True)
        return [*first, *(torch.zeros_like(leaf) if t is None else t for t, leaf in zip(second, leaves))]

    assert_derivatives(derivatives, kind, "all", backend)


def tangents_of(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(random_tensor(*t.shape, seed=30 + i, device=t.device).to(t.dtype) for i, t in enumerate(leaves))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_jvp_matches_reference(kind, name, backend, device):
    def derivatives(function, dtype):
        leaves = make_leaves(name, ROWS, SIZE, device, dtype)
        values, tangents, *_ = jvp(function, tuple(leaves), tangents_of(leaves))
        return [*values, *tangents]

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("name", ["residual_returned", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_jvp_in_the_direction_of_one_leaf(kind, name, backend, device):
    """``torch.autograd.forward_ad``, where the other leaves have no tangent at all."""

    def derivatives(function, dtype):
        leaves = make_leaves(name, ROWS, SIZE, device, dtype)
        found = []
        for index, tangent in enumerate(tangents_of(leaves)):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(leaves[index], tangent)
                results = function(*(dual if i == index else t for i, t in enumerate(leaves)))
                unpacked = [torch.autograd.forward_ad.unpack_dual(r) for r in results]
                found += [torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked]
        return found

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("order", ["forward_over_reverse", "reverse_over_forward", "reverse_over_reverse"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_hessian_vector_product_matches_reference(kind, name, order, backend, device):
    def derivatives(function, dtype):
        leaves = tuple(make_leaves(name, ROWS, SIZE, device, dtype))
        tangents, numbers, loss = tangents_of(list(leaves)), tuple(range(len(leaves))), loss_of(function)
        gradient = grad(loss, argnums=numbers)
        if order == "forward_over_reverse":
            return jvp(gradient, leaves, tangents)[1]
        if order == "reverse_over_forward":
            return grad(lambda *t: jvp(loss, t, tangents)[1], argnums=numbers)(*leaves)
        return vjp(gradient, *leaves)[1](tangents)

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=["jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_jacobians_match_reference(kind, name, transform, backend, device):
    """By each leaf; the hessian is jacfwd of jacrev, vmap over vmap."""

    def derivatives(function, dtype):
        leaves = make_leaves(name, (2,), 3, device, dtype)
        transformed = loss_of(function) if transform is hessian else lambda *t: function(*t)[0]
        found = transform(transformed, argnums=tuple(range(len(leaves))))(*leaves)
        return [block for row in found for block in (row if transform is hessian else [row])]

    assert_derivatives(derivatives, kind, name, backend)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_vectorised_jacobian_matches_reference(kind, name, backend, device):
    """``is_grads_batched``: vmap over a backward whose forward nobody transformed."""

    def derivatives(function, dtype):
        leaves = tuple(make_leaves(name, (2,), 3, device, dtype))
        found = torch.autograd.functional.jacobian(lambda *t: function(*t)[0], leaves, vectorize=True)
        return list(found)

    assert_derivatives(derivatives, kind, name, backend)


# ---------------------------------------------------------------------------------------------------------------- vmap


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """One float32 computation against the same in another order: 4 units of the largest element."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * scale)


# Where the samples lie, for x, residual, weight, bias, x_bias, row_scale; None: one for all.
IN_DIMS = {
    "rows": (0, 0, None, None, None, 0),
    "inner": (1, 2, None, None, None, 1),
    "last": (3, None, None, None, None, None),
    "residual": (None, 0, None, None, None, None),
    "row_scale": (None, None, None, None, None, 0),
    "weight": (None, None, 0, None, None, None),
    "bias": (None, None, None, 1, None, None),
    "x_bias": (None, None, None, None, 0, None),
    "all": (0, 1, 1, 0, 1, 2),
}
SAMPLES = 3


def of_samples(dims: tuple[int | None, ...], device: torch.device) -> list[torch.Tensor]:
    leaves = make_leaves("all", ROWS, SIZE, device, torch.float32)
    return [t if d is None else torch.stack([t * (i + 1) - i for i in range(SAMPLES)], d) for t, d in zip(leaves, dims)]


def loop(function: Callable[..., Any], dims: tuple[int | None, ...], tensors: list[torch.Tensor]) -> Any:
    """``function`` of each sample, its results stacked."""
    singles = [function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims))) for i in range(SAMPLES)]
    return [torch.stack(column) for column in zip(*singles)]


@pytest.mark.parametrize("where", IN_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_vmap_is_a_loop(kind, where, backend, device):
    dims, function = IN_DIMS[where], ours(kind, "all", backend)
    tensors = of_samples(dims, device)
    for batched, single in zip(vmap(function, in_dims=dims)(*tensors), loop(function, dims, tensors)):
        assert_close(batched, single)


@pytest.mark.parametrize("where", IN_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_per_sample_gradients(kind, where, backend, device):
    """vmap of grad, as differential privacy needs it: parameters have a gradient for every sample."""
    dims = IN_DIMS[where]
    gradient = grad(loss_of(ours(kind, "all", backend)), argnums=tuple(range(6)))
    tensors = of_samples(dims, device)
    for batched, single in zip(vmap(gradient, in_dims=dims)(*tensors), loop(gradient, dims, tensors)):
        assert_close(batched, single)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_per_sample_gradients_of_the_input_alone(kind, backend, device):
    """Nothing is summed over rows, so the samples become rows of one launch."""
    gradient = grad(loss_of(ours(kind, "affine", backend)))
    _, weight, bias = make_leaves("affine", ROWS, SIZE, device, torch.float32)
    samples = random_tensor(SAMPLES, *ROWS, SIZE, seed=1, device=device)
    found = vmap(gradient, in_dims=(0, None, None))(samples, weight, bias)
    assert_close(found, torch.stack([gradient(x, weight, bias) for x in samples]))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_vmap_of_vmap_is_two_loops(kind, backend, device):
    function = ours(kind, "affine", backend)
    _, weight, bias = make_leaves("affine", ROWS, SIZE, device, torch.float32)
    samples = random_tensor(2, SAMPLES, *ROWS, SIZE, seed=1, device=device)
    weights = torch.stack([weight, 2 * weight])
    found = vmap(vmap(function, in_dims=(0, None, None)), in_dims=(0, 0, None))(samples, weights, bias)[0]
    expected = torch.stack([torch.stack([function(x, w, bias)[0] for x in row]) for row, w in zip(samples, weights)])
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_vmap_of_second_derivatives(kind, backend, device):
    """A Hessian-vector product for every sample."""
    loss = loss_of(ours(kind, "affine", backend))

    def product(x, weight, bias):
        return grad(lambda t: grad(loss)(t, weight, bias).square().sum())(x)

    _, weight, bias = make_leaves("affine", ROWS, SIZE, device, torch.float32)
    samples = random_tensor(SAMPLES, *ROWS, SIZE, seed=1, device=device)
    found = vmap(product, in_dims=(0, None, None))(samples, weight, bias)
    assert_close(found, torch.stack([product(x, weight, bias) for x in samples]))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_vmap_without_gradients(kind, backend, device):
    """Nothing is kept for a backward then, so there are fewer results to batch."""
    function = ours(kind, "residual", backend)
    _, residual, weight, bias = make_leaves("residual", ROWS, SIZE, device, torch.float32)
    samples = random_tensor(SAMPLES, *ROWS, SIZE, seed=1, device=device)
    with torch.no_grad():
        found = vmap(lambda x: function(x, residual, weight, bias)[0])(samples)
    assert_close(found, torch.stack([function(x, residual, weight, bias)[0] for x in samples]))
