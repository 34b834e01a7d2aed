"""The operators of additive attention under opcheck, torch.compile, transforms, autocast, and what they keep."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastattn
from fastattn.ops.additive_attention import api, direct
from fastattn.ops.additive_attention import blocks as additive_blocks
from fastattn.ops.additive_attention.contract import Inputs, Needs, Options, OutputGradients
from fastattn.ops.additive_attention.operator import implementation
from fastattn.testing import random_tensor
from tests.ops.additive_cuts import cut_small

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.ops.additive_attention

B, H, L, S, A, DV = 2, 2, 5, 7, 3, 4
BIAS = torch.randn(H, L, 1, generator=torch.Generator().manual_seed(0))
CALLS = {
    "plain": {},
    "causal_weights": {"is_causal": True, "need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False},
    "mask": {"attn_mask": torch.arange(S) != 2},
    "bias": {"attn_mask": BIAS},
    "padding": {"key_padding_mask": torch.arange(S).expand(B, S) > 4, "need_weights": True},
}


def leaves(device, dtype=torch.float32):
    shapes = ((B, H, L, A), (B, H, S, A), (B, H, S, DV), (H, A))
    return [random_tensor(*s, seed=i, dtype=dtype, device=device).requires_grad_() for i, s in enumerate(shapes)]


def arguments(name, device):
    return tree_map_only(torch.Tensor, lambda t: t.to(device), CALLS[name])


def results_and_gradients(function, tensors):
    found = function(*tensors)
    outputs = found if isinstance(found, tuple) else (found,)
    given = [random_tensor(*o.shape, seed=i, dtype=o.dtype, device=o.device) for i, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, tensors, given)]


class Watched(TorchDispatchMode):
    """The calls of this package's operators, and the most bytes that any tensor had."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        result = func(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture
def _no_formula(monkeypatch):
    """The torch backend's small calls go through the operators too."""
    cut_small(monkeypatch, 40)


@pytest.mark.usefixtures("_no_formula")
@pytest.mark.parametrize("name", CALLS)
def test_additive_operators_pass_opcheck(name, backend, device):
    with Watched() as watched:
        results_and_gradients(lambda *t: attend(*t, **arguments(name, device), backend=backend), leaves(device))
    operators = [operator for operator, _ in watched.calls]
    assert operators == [torch.ops.fastattn.additive_forward.default, torch.ops.fastattn.additive_backward.default]
    for operator, given in watched.calls:
        torch.library.opcheck(operator, given)


@pytest.mark.usefixtures("_no_formula")
def test_additive_backward_of_a_mask_passes_opcheck(backend, device):
    tensors, bias = leaves(device), BIAS.to(device).requires_grad_()
    with Watched() as watched:
        found = results_and_gradients(lambda *t: attend(*t[:4], attn_mask=t[4], backend=backend),
                                      [*tensors, bias])  # fmt: skip
    assert found[-1].shape == bias.shape
    torch.library.opcheck(*watched.calls[1])


# inductor takes seconds, and sees no more of the operators than aot_eager
@pytest.mark.parametrize(
    ("name", "compiler", "backend"),
    [
        ("causal_weights", "inductor", "torch"),
        *((name, "aot_eager", backend) for name in ("causal_weights", "bias") for backend in ("torch", "triton")),
    ],
)
def test_additive_compiles_in_one_graph(name, compiler, backend, device):
    call = arguments(name, device)
    function = lambda *t: attend(*t, **call, backend=backend)  # noqa: E731
    expected = results_and_gradients(function, leaves(device))
    found = results_and_gradients(torch.compile(function, backend=compiler, fullgraph=True), leaves(device))
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("size", [A, 1 << 14], ids=["few", "many"])
def test_additive_of_few_tangents_is_its_formula_in_the_graph(size):
    """Compiled for a CPU: its compiler sees into a small call, and a large one is the operators'."""
    called = []

    def note(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    shapes = ((B, L, size), (B, S, size), (B, S, DV), (size,))
    tensors = [random_tensor(*s, seed=i) for i, s in enumerate(shapes)]
    padding = torch.arange(S).expand(B, S) > 4
    for call in ({}, {"key_padding_mask": padding, "need_weights": True}):
        function = lambda *t: attend(*t, **call, backend="torch")  # noqa: B023, E731
        backend = aot_autograd(fw_compiler=note)
        with torch.no_grad():
            torch._dynamo.reset()
            found = tree_leaves(torch.compile(function, backend=backend, fullgraph=True)(*tensors))
            for actual, wanted in zip(found, tree_leaves(function(*tensors)), strict=True):
                torch.testing.assert_close(actual, wanted)
    assert called
    assert any("additive_forward" in name for name in called) == (size > A)


def test_additive_compiles_once_for_all_lengths(device):
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *t: attend(*t, is_causal=True, backend="torch"),
        backend=counter,
        dynamic=True,
        fullgraph=True,
    )
    for length in (5, 9, 17):
        tensors = [
            random_tensor(*s, seed=0, device=device) for s in ((2, length, 3), (2, length, 3), (2, length, 4), (3,))
        ]
        torch.testing.assert_close(compiled(*tensors), attend(*tensors, is_causal=True, backend="torch"))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("plain", False), ("plain", True), ("causal_weights", False), ("causal_weights", True), ("padding", False)],
)
def test_additive_derivatives_of_every_order(name, blocks, monkeypatch):
    """Gradients, their gradients and forward mode, in float64; the formula in one piece and in blocks of rows."""
    if blocks:
        cut_small(monkeypatch, 40)
    tensors = [t.detach()[..., :3, :2].requires_grad_() for t in leaves("cpu", torch.float64)]
    tensors[3] = tensors[3].detach()[:, :2].requires_grad_()
    call = dict(arguments(name, "cpu"))
    if "key_padding_mask" in call:
        call["key_padding_mask"] = call["key_padding_mask"][:, 2:5]
    function = lambda *t: attend(*t, **call, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.usefixtures("_no_formula")
def test_additive_second_derivatives_are_the_same_on_both_backends(device):
    def of(backend):
        tensors = leaves(device)
        output = attend(*tensors, attn_mask=BIAS.to(device), backend=backend)
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), tensors)

    pytest.importorskip("triton", reason="triton is not installed")
    for actual, expected in zip(of("triton"), of("torch")):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_additive_vmap_is_a_loop(backend, device):
    query, key, value, weight = (t.detach() for t in leaves(device))
    weights = torch.stack([weight, 2 * weight])

    def gradient(query, weight):
        output = lambda q: attend(q, key, value, weight, backend=backend).square().sum()  # noqa: E731
        return torch.func.grad(output)(query)

    found = torch.func.vmap(gradient, in_dims=(None, 0))(query, weights)
    for actual, each in zip(found, weights):
        torch.testing.assert_close(actual, gradient(query, each), rtol=1e-4, atol=1e-5)


def test_additive_autocast(backend, device):
    tensors = [t.detach() for t in leaves(device)]
    with torch.autocast(device.type, torch.bfloat16):
        output = attend(*tensors, backend=backend)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, attend(*(t.bfloat16() for t in tensors), backend=backend))


def test_attention_under_autocast_takes_what_projections_made_and_what_they_did_not(backend, device):
    """A projected key in bfloat16 and a value as it came, in float32: both are cast before they are compared."""
    narrow, wide = (
        random_tensor(B, L, A, seed=0, device=device).bfloat16(),
        random_tensor(B, L, A, seed=1, device=device),
    )
    weight = random_tensor(A, seed=2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        additive = attend(narrow, narrow, wide, weight, backend=backend)
        plain: Any = fastattn.attention(*(t[:, None] for t in (narrow, narrow, wide)), backend=backend)
        with pytest.raises(TypeError, match=r"value is torch\.float64 but query is torch\.bfloat16"):
            attend(narrow, narrow, wide.double(), weight, backend=backend)
    assert additive.dtype == plain.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"value is torch\.float32 but query is torch\.bfloat16"):
        attend(narrow, narrow, wide, weight.bfloat16(), backend=backend)


@pytest.mark.usefixtures("_no_formula")
@pytest.mark.parametrize("order", [1, 2])
def test_additive_backward_under_autocast_is_as_exact_as_without(order, backend, device):
    tensors = leaves(device)
    found = attend(*tensors, backend=backend)
    if order == 2:
        found = torch.cat([g.flatten() for g in torch.autograd.grad(found.square().sum(), tensors, create_graph=True)])
    gradient = random_tensor(*found.shape, seed=5, device=device)
    expected = torch.autograd.grad(found, tensors, gradient, retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        for actual, wanted in zip(torch.autograd.grad(found, tensors, gradient), expected):
            assert torch.equal(actual, wanted)


def test_additive_second_derivatives_lose_nothing_in_small_blocks(monkeypatch, device):
    """In bfloat16, over 64 blocks: what they add up is not rounded at every step. Each share is, once, and so is the
    sum: two roundings of 2^-9 of the largest, and as many in the first derivatives that they start from."""
    length, keys, size = 128, 16, 8
    shapes = ((1, length, size), (1, keys, size), (1, keys, size), (size,))
    narrow = [random_tensor(*s, seed=i, device=device).bfloat16() for i, s in enumerate(shapes)]
    given = random_tensor(1, length, size, seed=9, device=device).bfloat16()
    cut_small(monkeypatch, 2 * keys * size)

    def second(dtype):
        tensors = [t.to(dtype).requires_grad_() for t in narrow]
        output = attend(*tensors, backend="torch")
        first = torch.autograd.grad(output, tensors, given.to(dtype), create_graph=True)
        cotangents = [random_tensor(*g.shape, seed=i, device=device).bfloat16().to(dtype) for i, g in enumerate(first)]
        return torch.autograd.grad(first, tensors, cotangents)

    for actual, truth in zip(second(torch.bfloat16), second(torch.float64)):
        assert (actual - truth).abs().max() <= 4 * 2**-9 * truth.abs().max()


def largest_made(backend, device, length, size):
    """The most bytes that any tensor had which the two operators made on their way.

    Their implementations are called by themselves: a dispatch mode does not see into an operator.
    """
    shapes = ((1, 1, length, size), (1, 1, length, size), (1, 1, length, 8), (1, size))
    tensors = [random_tensor(*s, seed=i, device=device) for i, s in enumerate(shapes)]
    query, key, value, weight = tensors
    inputs, options = Inputs(query, key, value, weight, None, None, None), Options(None, False, backend)
    operators = implementation(backend)
    with Watched() as watched:
        results = operators.forward(inputs, options)
        gradients = OutputGradients(torch.ones_like(results.output), None)
        operators.backward(gradients, results, Needs(False), inputs, options)
    return watched.largest


def test_additive_makes_no_tensor_of_pairs_times_columns(backend, device):
    """Forward and backward: the largest tensor is a block, or one of pairs in the kernels' padding."""
    pytest.importorskip("triton", reason="triton is not installed")
    length, size = (256, 32) if backend == "torch" else (64, 32)
    pairs = 4 * length * length  # bytes of one float32 each
    most = 4 * additive_blocks.block_elements(device) if backend == "torch" else pairs
    assert most <= pairs * size / 8
    assert pairs <= largest_made(backend, device, length, size) <= most


def test_a_piece_that_is_everything_is_noticed(monkeypatch, device):
    """What the test above would measure, were a block's tangents all one piece."""
    for name in ("PIECE_ELEMENTS", "BLOCK_ELEMENTS_ON_GPU"):
        monkeypatch.setattr(additive_blocks, name, 64 * 64 * 32)
    assert largest_made("torch", device, 64, 32) == 4 * 64 * 64 * 32


def test_additive_keeps_inputs_and_output_alone(backend, device):
    """For the backward: nothing that grows with ``L S``."""
    tensors = [random_tensor(*s, seed=i, device=device).requires_grad_()
               for i, s in enumerate(((1, 700, 8), (1, 800, 8), (1, 800, 8), (8,)))][:4]  # fmt: skip
    if backend == "triton":
        tensors = [t.detach()[:, :60].requires_grad_() if t.dim() == 3 else t for t in tensors]
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = attend(*tensors, backend=backend)
    gc.collect()
    elements = [tensor.numel() for ref in saved if (tensor := ref()) is not None]
    assert elements
    assert max(elements) <= max(t.numel() for t in (*tensors, output))


def test_additive_takes_the_short_way_and_says_the_same(monkeypatch):
    """A decoder's step, with padding and without: results and gradients of the long way, which is not entered."""
    query, key, value = (random_tensor(B, length, A, seed=length).requires_grad_() for length in (1, S, S + 1))
    value, weight = value[:, :S], random_tensor(A, seed=9).requires_grad_()
    padding = torch.arange(S).expand(B, S) > torch.tensor([[4], [9]])
    for call in ({}, {"key_padding_mask": padding}, {"key_padding_mask": padding, "need_weights": True}):
        function = lambda *t: attend(*t, **call, backend="torch")  # noqa: B023, E731
        with monkeypatch.context() as patch:
            patch.setattr(direct, "attend", lambda *_: None)
            expected = results_and_gradients(function, [query, key, value, weight])
        with monkeypatch.context() as patch:
            patch.setattr(api, "make_call", None)
            found = results_and_gradients(function, [query, key, value, weight])
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"query": t["query"].half()},
        lambda t: {"query": t["query"][0]},
        lambda t: {"key": t["key"][:1]},
        lambda t: {"value": t["value"][:, 1:]},
        lambda t: {"weight": t["weight"][1:]},
        lambda t: {"weight": t["weight"][None]},
        lambda t: {"weight": t["weight"].double()},
        lambda t: {"key": t["key"].to("meta")},
        lambda t: {"key": None},
        lambda t: {"key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)},
        lambda t: {"key_padding_mask": torch.zeros(B, S)},
        lambda t: {"need_weights": 1},
        lambda t: {"average_attn_weights": None},
        lambda t: {"backend": "cuda"},
    ],
)
def test_additive_short_way_leaves_what_is_wrong_to_the_long_one(change):
    tensors: dict[str, Any] = dict(zip(("query", "key", "value", "weight"), (t.detach()[:, 0] for t in leaves("cpu"))))
    tensors["weight"] = tensors["weight"].new_ones(A)
    tensors["backend"] = "torch"
    attend(**tensors)
    with pytest.raises((TypeError, ValueError)):
        attend(**{**tensors, **change(tensors)})
