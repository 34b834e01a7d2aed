"""The short way of a norm on the CPU says what the long way says, and takes no call that it could get wrong."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.ops.residual_norm import direct, torch_layer_norm, torch_rms_norm
from fastattn.reference import add_norm as reference
from fastattn.testing import assert_within_budget, random_tensor
from tests.ops.norm_cases import FUNCTIONS

ALONE: dict[str, Any] = {"layer": fastattn.layer_norm, "rms": fastattn.rms_norm}
MODULES: dict[str, Any] = {"layer": fastattn.AddLayerNorm, "rms": fastattn.AddRMSNorm}
EPS = 1e-5


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype)


@pytest.fixture(params=["layer", "rms"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def _torch_backend():
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture
def taken(monkeypatch):
    """Whether the short way took each call."""
    seen: list[bool] = []

    def watched(function):
        def call(*args):
            found = function(*args)
            seen.append(found is not None)
            return found

        return call

    for name in ("layer_norm", "rms_norm"):
        monkeypatch.setattr(direct, name, watched(getattr(direct, name)))
    return seen


# Few rows go to torch's kernel, the others in blocks, of which the last is smaller, and of columns too.
SHAPES = {"few": (2, 3, 48), "blocks": (43, 768), "of_columns": (4, 9000), "of_no_pieces": (43, 769)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("residual", ["none", "added", "returned"])
def test_values_and_gradients(residual, name, dtype, kind, taken, monkeypatch):
    for module in (torch_layer_norm, torch_rms_norm):
        monkeypatch.setattr(module, "_BLOCK", 1 << 12)
    shape, vectors = SHAPES[name], 2 if kind == "layer" else 1
    leaves = [draw(*shape, dtype=dtype)]
    if residual != "none":
        leaves.append(draw(*shape, seed=2, dtype=dtype))
    leaves += [draw(shape[-1], seed=3 + i, dtype=dtype) for i in range(vectors)]
    results = 2 if residual == "returned" else 1
    gradients = [draw(*shape, seed=6 + i, dtype=dtype) for i in range(results)]

    def found(function, dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        x, *others = tensors
        outputs = function(x, None if residual == "none" else others.pop(0), *others)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        d_outputs = [g.to(dtype) for g in gradients]
        return *outputs, *torch.autograd.grad(outputs, tensors, d_outputs)

    def ours(*args):
        return FUNCTIONS[kind](*args, eps=EPS, return_residual=residual == "returned")

    def by_definition(*args):
        return tuple(reference(*args, kind=kind, eps=EPS))[:results]

    actual, peer, truth = found(ours, dtype), found(by_definition, dtype), found(by_definition, torch.float64)
    for index, (a, p, t) in enumerate(zip(actual, peer, truth)):
        assert a.dtype == dtype
        # torch's layer norm adds up the gradients of its vectors one row after the other: a rounding for each
        rounded = torch.finfo(torch.float32).eps * truth[0][..., 0].numel() if a.dim() == 1 and kind == "layer" else 0.0
        assert_within_budget(a, truth=t, peer=p, name=f"{kind} {index}", allowance=rounded)
    with torch.no_grad():
        evaluated = ours(leaves[0], *([None] if residual == "none" else []), *leaves[1:])
    first = evaluated[0] if isinstance(evaluated, tuple) else evaluated
    assert_within_budget(first, truth=truth[0], peer=peer[0], name="evaluated")
    assert taken == [True, True]


def test_functions_and_modules_take_it(kind, taken):
    x, weight = draw(3, 8), draw(8, seed=2)
    module = MODULES[kind](8, eps=EPS, dropout=0.5)
    expected = reference(x, None, kind=kind, eps=EPS).output
    for size in (8, (8,), torch.Size([8])):
        torch.testing.assert_close(ALONE[kind](x, size, eps=EPS), expected)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(
        module.eval()(x, weight.expand(3, 8)), reference(x, weight.expand(3, 8), kind=kind).output
    )
    assert taken[:5] == [True] * 4 + [kind == "layer"]  # of another layout an RMS norm may be in a channels-last format
    taken.clear()
    module.train()(x, x)  # which drops
    assert taken == []
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Tanh())
    torch.testing.assert_close(module(x), reference(x, None, module.weight, kind=kind, eps=EPS).output)


X = draw(3, 8)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str | None]] = {
    "an axis of one element": ((draw(3, 1),), {}, None),
    "two axes": ((X,), {"normalized_shape": (3, 8)}, None),
    "a list": ((X,), {"normalized_shape": [8]}, None),
    "a float that equals the size": ((X,), {"normalized_shape": (8.0,)}, "normalized_shape"),
    "another size": ((X,), {"normalized_shape": (4,)}, "normalized_shape"),
    "a residual that broadcasts": ((X, X[:1]), {}, None),
    "a wide residual": ((X, X.double()), {}, None),
    "a residual elsewhere": ((X, X.to("meta")), {}, "residual is on meta"),
    "a weight of another size": ((X, None, X[0, :4]), {}, "weight has shape"),
    "a weight that would broadcast": ((X, None, X[0, :1]), {}, "weight has shape"),
    "a weight elsewhere": ((X, None, X[0].to("meta")), {}, "weight is on meta"),
    "a weight of ints": ((X, None, X[0].int()), {}, "weight is torch.int32"),
    "a sparse weight": ((X, None, X[0].to_sparse()), {}, "weight"),
    "a narrow weight": ((X, None, X[0].bfloat16()), {}, None),
    "ints": ((X.int(),), {}, "x is torch.int32"),
    "no axes": ((X[0, 0],), {}, "x has no dimensions"),
    "eps=1": ((X,), {"eps": 1}, None),
    "a word for eps": ((X,), {"eps": "1"}, "eps"),
    "return_residual=1": ((X, X), {"return_residual": 1}, "return_residual"),
}


@pytest.mark.parametrize("large", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_takes_the_long_way(name, large, kind, taken):
    """Which has the words for what is wrong, whatever torch would have made of it."""
    args, words, message = REFUSED[name]
    if large and isinstance(args[0], torch.Tensor) and args[0].dim():  # rows in blocks
        args = tuple(t.repeat(1 << 13, 1) if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in args)
        if name in ("two axes", "a residual that broadcasts"):
            return
    if message is None:
        FUNCTIONS[kind](*args, **words)
    else:
        with pytest.raises((TypeError, ValueError), match=message):
            FUNCTIONS[kind](*args, **words)
    assert not any(taken)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_watches_a_call_sees_the_long_way(kind, taken):
    def call():
        return FUNCTIONS[kind](X, X)

    torch.func.vmap(lambda x: FUNCTIONS[kind](x, x))(X[None])
    with torch.autograd.forward_ad.dual_level():
        call()
    with Watching():
        call()
    with FlopCounterMode(display=False):
        call()
    FUNCTIONS[kind](X.as_subclass(type("Own", (torch.Tensor,), {})))
    assert not any(taken)
    call()
    assert taken[-1:] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_guard_of_a_kept_graph(dtype):
    """A layer norm's gradients are replaced in those passes only in which they may be differentiated again."""
    x, weight = draw(3, 8, dtype=dtype).requires_grad_(), draw(8, seed=2, dtype=dtype).requires_grad_()
    output = fastattn.layer_norm(x, (8,), weight)
    g = draw(3, 8, seed=3, dtype=dtype)
    runs = []
    for again in (False, True, False, True, True):
        found = torch.autograd.grad(output, (x, weight), g, retain_graph=True, create_graph=again)
        assert all(t.requires_grad == again for t in found)
        runs.append([t.detach() for t in found])
    for run in runs[1:]:
        for have, want in zip(run, runs[0]):
            torch.testing.assert_close(have, want)
    if dtype == torch.float32:
        assert torch.autograd.gradgradcheck(
            lambda x, w: fastattn.layer_norm(x, (8,), w),
            (x.detach().double().requires_grad_(), weight.detach().double()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_gradients_in_blocks(kind, dtype, monkeypatch):
    """Blocks write into memory of their own, which batched gradients do not fit: they raised a RuntimeError."""
    monkeypatch.setattr(torch_rms_norm, "_FEWEST", 0)
    monkeypatch.setattr(torch_layer_norm, "_BLOCK", 16)
    leaves = [draw(7, 24, dtype=dtype).requires_grad_(), draw(24, seed=2, dtype=dtype).requires_grad_()]
    output = ALONE[kind](leaves[0], (24,), leaves[1])
    cotangents = draw(3, 7, 24, seed=3, dtype=dtype)

    def pulled_back(cotangent, **words):
        return torch.autograd.grad(output, leaves, cotangent, retain_graph=True, **words)

    expected = [torch.stack(each) for each in zip(*map(pulled_back, cotangents))]
    for found in (pulled_back(cotangents, is_grads_batched=True), torch.vmap(pulled_back)(cotangents)):
        torch.testing.assert_close(list(found), expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_layer_norms_of_one_eps_share_their_hooks():
    hooked = {torch_layer_norm._hooked(eps) for eps in (1e-5, 1e-5, 1e-6)}
    assert len(hooked) == 2


def test_blocks_make_nothing_as_large_as_the_rows(monkeypatch):
    """Nor does any of them hold more rows than there are."""
    monkeypatch.setattr(torch_rms_norm, "_BLOCK", 64)
    monkeypatch.setattr(torch_rms_norm, "_FEWEST", 0)
    x, weight = draw(7, 24, dtype=torch.bfloat16).requires_grad_(), draw(24, seed=2, dtype=torch.bfloat16)
    sizes = []
    real = torch_rms_norm._buffers
    monkeypatch.setattr(torch_rms_norm, "_buffers", lambda *args: (made := real(*args), sizes.append(made))[0])
    fastattn.rms_norm(x, (24,), weight).backward(draw(7, 24, seed=3, dtype=torch.bfloat16))
    assert [len(made) for made in sizes] == [1, 4]
    assert all(buffer.shape == (2, 24) for made in sizes for buffer in made)
