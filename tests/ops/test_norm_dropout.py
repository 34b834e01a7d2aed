"""Dropout in front of a norm: how many elements it keeps, which ones, and that every derivative drops the same."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from fastattn.ops.residual_norm import on_torch
from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.ops.norm_cases import FUNCTIONS, dropout_factor

KINDS = ["layer", "rms"]


def dropped(x: torch.Tensor, p: float, seed: int, backend: str, kind: str = "layer", **arguments: Any) -> torch.Tensor:
    """What is left of ``x``, the sum of a call with nothing else in it, right behind ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    return FUNCTIONS[kind](x, dropout_p=p, return_residual=True, backend=backend, **arguments)[1]


def kept(shape: tuple[int, ...], p: float, seed: int, backend: str, device: torch.device) -> torch.Tensor:
    """Boolean, of this shape: the elements of ones that are kept."""
    return dropped(torch.ones(shape, device=device), p, seed, backend) != 0


def assert_share(keep: torch.Tensor, expected: float) -> None:
    """Within six standard deviations of a binomial: of a million checks two fail by chance (7e-9 each, two-sided)."""
    deviation = math.sqrt(expected * (1 - expected) / keep.numel())
    assert abs(keep.double().mean().item() - expected) < 6 * deviation


# ------------------------------------------------------------------------------------------------------ how many, which


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_norm_dropout_keeps_the_share_it_should(p, backend, device):
    """Of all elements, and of each of the four columns that share a call of Philox."""
    keep = kept((65, 130), p, 0, backend, device)
    for part in (keep, keep[::2], keep[:, :16], keep[:, 128:], *(keep[:, i::4] for i in range(4))):
        assert_share(part, 1 - p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_norm_dropout_scales_what_it_keeps(p, backend, device):
    left = dropped(torch.ones(16, 64, device=device), p, 0, backend)
    torch.testing.assert_close(left[left != 0].unique(), torch.tensor([1 / (1 - p)], device=device))


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 16, 64])
def test_norm_dropout_of_columns_is_independent(distance, backend, device):
    """Two columns are both kept as often as chance has it, also those that come from one call of Philox."""
    keep = kept((64, 256), 0.5, 1, backend, device)
    assert_share(keep[:, distance:] & keep[:, :-distance], 0.25)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(range(4), 2))
def test_norm_dropout_of_one_philox_call_is_independent(first, second, backend, device):
    """All four outcomes of two of the four columns of a call, and not only of neighbours."""
    keep = kept((64, 256), 0.3, 2, backend, device)
    a, b = keep[:, first::4], keep[:, second::4]
    for x, y, expected in ((a, b, 0.49), (a, ~b, 0.21), (~a, b, 0.21), (~a, ~b, 0.09)):
        assert_share(x & y, expected)


def test_norm_dropout_of_rows_is_independent(backend, device):
    """Neighbouring rows are rows of one tile, and those further apart of different programs."""
    keep = kept((130, 64), 0.5, 3, backend, device)
    for distance in (1, 2, 64):
        assert_share(keep[distance:] & keep[:-distance], 0.25)
    assert len(keep.unique(dim=0)) == len(keep)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_follows_torch_manual_seed(kind, backend, device):
    x = random_tensor(8, 96, seed=1, device=device)
    first, again, other = (dropped(x, 0.5, seed, backend, kind) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    calls = [FUNCTIONS[kind](x, dropout_p=0.5, backend=backend) for _ in range(2)]
    assert not torch.equal(*calls)


# ------------------------------------------------------------------------------------- a function of position and seed

# Views of the same 4 x 6 x 96 numbers.
LAYOUTS: dict[str, Any] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "every_other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "columns_outside": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_dropout_does_not_depend_on_strides(layout, device):
    """The kernels' is a function of row and column. torch's draws as memory lies, and so does the torch backend."""
    pytest.importorskip("triton", reason="triton is not installed")
    x = random_tensor(4, 6, 96, seed=1, device=device)
    strided = LAYOUTS[layout](x)
    assert strided.stride() != x.stride()
    assert torch.equal(strided, x)
    assert torch.equal(dropped(strided, 0.4, 5, "triton"), dropped(x, 0.4, 5, "triton"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_dropout_does_not_depend_on_dtypes(dtype, backend, device):
    narrow = dropped(torch.ones(6, 96, dtype=dtype, device=device), 0.4, 5, backend)
    assert torch.equal(narrow != 0, kept((6, 96), 0.4, 5, backend, device))


def test_norm_dropout_does_not_depend_on_tiles(device):
    """A row is dropped the same whether it is a tile, or blocks of columns one behind the other."""
    pytest.importorskip("triton", reason="triton is not installed")
    wide, narrow = (kept((3, size), 0.4, 5, "triton", device) for size in (2500, 700))
    assert torch.equal(wide[:, :700], narrow)
    assert torch.equal(kept((130, 96), 0.4, 5, "triton", device)[:3], kept((3, 96), 0.4, 5, "triton", device))


def test_norm_dropout_does_not_depend_on_leading_axes(backend, device):
    flat = kept((24, 96), 0.4, 5, backend, device)
    assert torch.equal(kept((2, 3, 4, 96), 0.4, 5, backend, device).flatten(0, 2), flat)


def test_norm_dropout_is_the_same_in_both_norms_and_with_everything_else(backend, device):
    ones, residual = torch.ones(6, 96, device=device), random_tensor(6, 96, seed=1, device=device)
    expected = kept((6, 96), 0.4, 5, backend, device)
    assert torch.equal(dropped(ones, 0.4, 5, backend, "rms") != 0, expected)
    row_scale = torch.full((6,), 2.0, device=device)
    for kind in KINDS:
        left = dropped(ones, 0.4, 5, backend, kind, residual=residual, row_scale=row_scale, x_bias=ones[0])
        assert torch.equal((left - residual).abs() > 1e-3, expected)


def test_norm_dropout_of_kernels_is_that_of_their_formula(device):
    """What derivatives beyond the first multiply by, drawn by a call of its own."""
    pytest.importorskip("triton", reason="triton is not installed")
    x = random_tensor(6, 130, seed=1, device=device)
    factor = dropout_factor("triton", x, 0.3, 5)
    assert torch.equal(x * factor, dropped(x, 0.3, 5, "triton"))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_on_the_torch_backend_is_torchs(kind, device):
    """One seed gives what the unfused layer gave, bit for bit."""
    x, residual = (random_tensor(6, 96, seed=i, device=device) for i in (1, 2))
    weight = random_tensor(96, seed=3, device=device)
    torch.manual_seed(5)
    expected = residual + F.dropout(x, 0.3)
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    torch.manual_seed(5)
    output, total = FUNCTIONS[kind](x, residual, weight, dropout_p=0.3, return_residual=True, backend="torch", eps=1e-5)
    assert torch.equal(total, expected)
    torch.testing.assert_close(output, norm(expected, (96,), weight, eps=1e-5))


# -------------------------------------------------------------------------------------------------------- no and all


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_of_nothing_draws_no_random_numbers(kind, backend, device):
    x = random_tensor(4, 96, seed=1, device=device)
    before = torch.get_rng_state()
    output = FUNCTIONS[kind](x, x, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output, FUNCTIONS[kind](x, x, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_of_everything_leaves_the_residual(kind, backend, device):
    leaves = [random_tensor(4, 96, seed=i, device=device).requires_grad_() for i in (1, 2)]
    x_bias = random_tensor(96, seed=3, device=device).requires_grad_()
    output, total = FUNCTIONS[kind](*leaves, x_bias=x_bias, dropout_p=1.0, return_residual=True, backend=backend)
    assert torch.equal(total, leaves[1])
    assert torch.equal(output, FUNCTIONS[kind](leaves[1], backend=backend))
    d_x, d_residual, d_x_bias = torch.autograd.grad((output.cos() + total).sum(), (*leaves, x_bias))
    assert not d_x.any()
    assert not d_x_bias.any()
    assert d_residual.all()


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_of_everything_is_zero_without_a_residual(kind, backend, device):
    """A row of zeros is its own norm, and nothing is 0 * inf."""
    x, bias = random_tensor(4, 96, seed=1, device=device).requires_grad_(), random_tensor(96, seed=2, device=device)
    output = FUNCTIONS[kind](x, bias=bias, dropout_p=1.0, backend=backend)
    assert torch.equal(output, bias.expand(4, 96))
    assert not torch.autograd.grad(output.cos().sum(), x)[0].any()


@pytest.mark.parametrize("p", [1e-8, 1 - 1e-8])
def test_norm_dropout_of_almost_nothing_and_almost_all(p, backend, device):
    left = dropped(torch.ones(8, 96, device=device), p, 0, backend)
    assert left.isfinite().all()
    assert (left != 0).all() if p < 0.5 else not left.any()


# -------------------------------------------------------------------------------------------------------- derivatives

CALLS: dict[str, list[str]] = {
    "bare": [],
    "affine": ["weight", "bias"],
    "residual": ["residual", "weight"],
    "all": ["residual", "weight", "bias", "x_bias", "row_scale"],
}


def make_leaves(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"x": (4, 20), "residual": (4, 20), "row_scale": (4,)}
    leaves = {
        n: random_tensor(*shapes.get(n, (20,)), seed=i, dtype=dtype, device=device)
        for i, n in enumerate(["x", *CALLS[name]])
    }
    if "row_scale" in leaves:  # near 0 it has huge derivatives
        leaves["row_scale"] = 1 + leaves["row_scale"] / 4
    return {n: t.requires_grad_() for n, t in leaves.items()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_gradient_is_zero_exactly_where_dropped(kind, name, backend, device):
    leaves = make_leaves(name, device)
    keep = dropout_factor(backend, leaves["x"].detach(), 0.4, 5) != 0
    torch.manual_seed(5)
    output, total = FUNCTIONS[kind](**leaves, dropout_p=0.4, return_residual=True, backend=backend)
    (gradient,) = torch.autograd.grad((output.cos() + total.sin()).sum(), leaves["x"])
    assert torch.equal(gradient != 0, keep)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_derivatives_drop_the_same(kind, name, order, backend, device):
    """Against the reference with the elements that this seed keeps; one element more or less would change tenths."""
    keep = dropout_factor(backend, make_leaves(name, device)["x"].detach(), 0.4, 5) != 0

    def ours(leaves):
        torch.manual_seed(5)
        return FUNCTIONS[kind](**leaves, eps=1e-2, dropout_p=0.4, return_residual=True, backend=backend)

    def theirs(leaves):
        call: dict[str, Any] = {"kind": kind, "eps": 1e-2}
        return reference(**leaves, **call, dropout_keep=keep, dropout_p=0.4)

    def derivatives(function, dtype):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in make_leaves(name, device).items()}
        output, total = function(leaves)
        scalar = (output.cos() + total.sin()).sum()
        found = ()
        for _ in range(order):
            found = torch.autograd.grad(scalar, list(leaves.values()), create_graph=True, materialize_grads=True)
            scalar = torch.stack([t.sin().sum() for t in found]).sum()
        return found

    truth = derivatives(theirs, torch.float64)
    largest = max(t.abs().max().item() for t in truth)
    for found, expected in zip(derivatives(ours, torch.float32), truth):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_in_nested_transforms_drops_the_same(kind, backend, device):
    """``torch.func``, which wraps the seed as well as the tensors."""
    x, tangent = (random_tensor(4, 20, seed=i, device=device) for i in (1, 2))
    keep = dropout_factor(backend, x, 0.4, 5) != 0

    def loss(t):
        torch.manual_seed(5)
        return FUNCTIONS[kind](t, eps=1e-2, dropout_p=0.4, backend=backend).cos().sum()

    def truth(t):
        call: dict[str, Any] = {"kind": kind, "eps": 1e-2}
        return reference(t, **call, dropout_keep=keep, dropout_p=0.4).output.cos().sum()

    def reverse_over_reverse(function, t):
        return grad(lambda u: grad(function)(u).sin().sum())(t)

    def forward_over_reverse(function, t):
        return jvp(grad(function), (t,), (tangent.to(t.dtype),))[1]

    for derivative in (reverse_over_reverse, forward_over_reverse):
        expected = derivative(truth, x.double())
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(derivative(loss, x).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_in_jacobians_drops_the_same(kind, transform, backend, device):
    """vmap over either mode; the call itself is outside of it, or has one seed for all directions."""
    x = random_tensor(2, 5, seed=1, device=device)
    keep = dropout_factor(backend, x, 0.4, 5) != 0

    def norm(t):
        torch.manual_seed(5)
        return FUNCTIONS[kind](t, eps=1e-2, dropout_p=0.4, backend=backend)

    def truth(t):
        call: dict[str, Any] = {"kind": kind, "eps": 1e-2}
        return reference(t, **call, dropout_keep=keep, dropout_p=0.4).output

    options = {"randomness": "same"} if transform is jacfwd else {}
    found, expected = transform(norm, **options)(x), transform(truth)(x.double())
    assert expected.any()
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_in_forward_mode_drops_the_same(kind, backend, device):
    x, tangent = (random_tensor(4, 20, seed=i, device=device) for i in (1, 2))
    keep = dropout_factor(backend, x, 0.4, 5) != 0

    def norm(t):
        torch.manual_seed(5)
        return FUNCTIONS[kind](t, dropout_p=0.4, return_residual=True, backend=backend)

    (output, total), (d_output, d_total), *_ = jvp(norm, (x,), (tangent,))
    assert torch.equal(total != 0, keep)
    assert torch.equal(d_total != 0, keep)
    function: Any = FUNCTIONS[kind]
    expected = jvp(lambda t: function(t, backend=backend), (total,), (d_total,))
    torch.testing.assert_close((output, d_output), expected)


# --------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_under_vmap_asks_for_a_randomness(kind, backend, device):
    """As torch's random operations do: an error, unless one says what is meant."""
    x = random_tensor(3, 4, 20, seed=1, device=device)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda t: FUNCTIONS[kind](t, dropout_p=0.5, backend=backend))(x)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_under_vmap_has_the_randomness_asked_for(kind, randomness, backend, device):
    ones = torch.ones(3, 4, 20, device=device)

    def norm(t):
        return FUNCTIONS[kind](t, dropout_p=0.5, return_residual=True, backend=backend)

    torch.manual_seed(5)
    output, total = vmap(norm, randomness=randomness)(ones)
    keep = total != 0
    assert_share(keep, 0.5)
    assert torch.equal(keep[0], keep[1]) == (randomness == "same")
    assert torch.equal(keep[0], keep[2]) == (randomness == "same")
    function: Any = FUNCTIONS[kind]
    torch.testing.assert_close(output, function(total, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_per_sample_gradients(kind, backend, device):
    """Under vmap of grad the backward drops what the forward of the same sample dropped."""
    x = random_tensor(3, 4, 20, seed=1, device=device)
    weight = random_tensor(20, seed=2, device=device)

    def loss(t, weight):
        output, total = FUNCTIONS[kind](t, weight=weight, dropout_p=0.5, return_residual=True, backend=backend)
        return (output.cos() + total.sin()).sum(), total

    torch.manual_seed(5)
    (d_x, d_weight), total = vmap(grad(loss, argnums=(0, 1), has_aux=True), in_dims=(0, None), randomness="different")(
        x, weight
    )
    assert torch.equal(d_x != 0, total != 0)
    assert not torch.equal(total[0] != 0, total[1] != 0)
    function: Any = FUNCTIONS[kind]
    for of_sample, found in zip(total, d_weight):
        expected = grad(lambda w, t=of_sample: function(t, weight=w, backend=backend).cos().sum())(weight)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_dropout_in_blocks_of_rows(kind, dtype, monkeypatch):
    """In evaluation torch's operations go through a sum of several steps a block of rows at a time, the last a smaller
    one: what they drop, add, scale and round is what the whole would."""
    blocks = []
    total = on_torch._total
    monkeypatch.setattr(on_torch, "_BLOCK", 1 << 9)
    monkeypatch.setattr(on_torch, "_total", lambda call, keep: blocks.append(len(call.x)) or total(call, keep))
    x, residual = random_tensor(3, 11, 48, seed=1, dtype=dtype), random_tensor(3, 11, 48, seed=2)
    vectors = {"weight": random_tensor(48, seed=3, dtype=dtype), "x_bias": random_tensor(48, seed=4, dtype=dtype)}
    call: dict[str, Any] = {**vectors, "row_scale": random_tensor(1, 11, seed=5), "dropout_p": 0.3, "eps": 1e-5}
    result = FUNCTIONS[kind](x, residual, **call, return_residual=True, backend="torch")
    keep = result[1] != residual
    assert_share(keep, 0.7)
    assert blocks == [10, 10, 10, 3]
    truth, peer = (
        reference(
            x.to(wide), residual.to(wide), kind=kind, dropout_keep=keep, **{k: _to(v, wide) for k, v in call.items()}
        )
        for wide in (torch.float64, torch.float32)
    )
    for name, actual, of_peer, of_truth in zip(("output", "total"), result, peer, truth):
        assert_within_budget(actual, truth=of_truth, peer=of_peer.to(actual.dtype), name=name)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("terms", ["", "x_bias", "row_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_dropout_draws_the_same_without_gradients(dtype, terms, p, monkeypatch):
    """Blocks of rows drew numbers of their own, which on Intel's processors are others than those of the whole: a
    reentrant checkpoint, whose first run has no gradients, differentiated a sum that had kept other elements."""
    monkeypatch.setattr(on_torch, "_BLOCK", 1 << 9)
    drawn, draw = [], torch.Tensor.bernoulli_
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, *args: drawn.append(t.numel()) or draw(t, *args))
    x, residual = random_tensor(3, 11, 48, seed=1, dtype=dtype), random_tensor(3, 11, 48, seed=2, dtype=dtype)
    others = {"x_bias": random_tensor(48, seed=3, dtype=dtype), "row_scale": random_tensor(3, 11, seed=4, dtype=dtype)}
    words: dict[str, Any] = {name: tensor for name, tensor in others.items() if name == terms}
    evaluated = dropped(x, p, 5, "torch", residual=residual, **words)
    assert drawn == ([] if p == 1.0 else [x.numel()])
    trained = dropped(x.requires_grad_(), p, 5, "torch", residual=residual, **words)
    torch.testing.assert_close(evaluated, trained.detach())


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value
