"""The norm operators under opcheck, torch.compile, torch.export, autocast and checkpointing, and what graphs keep."""

import gc
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn.ops.residual_norm import launch
from fastattn.testing import random_tensor
from tests.ops.norm_cases import FUNCTIONS

ROWS, N = (3, 5), 12
BF16 = torch.bfloat16

# The kind, the tensors beside x (a dtype behind a colon), and the other arguments. `x:bf16` replaces x.
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "layer": ("layer", "weight bias", {}),
    "layer_bare": ("layer", "", {}),
    "rms": ("rms", "weight", {}),
    "add": ("layer", "residual weight bias", {}),
    "add_returned": ("rms", "residual weight", {"return_residual": True}),
    "scaled": ("layer", "weight bias row_scale", {"return_residual": True}),
    "wide_residual": ("rms", "x:bf16 residual weight", {"return_residual": True}),
    "wide_residual_layer": ("layer", "x:bf16 residual weight:bf16 bias", {"out_dtype": torch.float32}),
    "unrounded": ("layer", "x:bf16 residual:bf16 weight", {"round_residual": False, "return_residual": True}),
    "dropout": ("layer", "residual weight bias", {"dropout_p": 0.5, "return_residual": True}),
    "all": (
        "layer",
        "residual weight bias x_bias row_scale",
        {"unit_offset": True, "round_residual": False, "return_residual": True},
    ),
    "all_dropout": ("rms", "residual weight bias x_bias row_scale", {"dropout_p": 0.3, "return_residual": True}),
}


def make_arguments(name: str, device: torch.device, rows: tuple[int, ...] = ROWS) -> dict[str, torch.Tensor]:
    """The leaves of a call by name, ``x`` first."""
    dtypes = {"x": "fp32"}
    for part in CALLS[name][1].split():
        tensor, _, dtype = part.partition(":")
        dtypes[tensor] = dtype or "fp32"
    shapes: dict[str, tuple[int, ...]] = {"x": (*rows, N), "residual": (*rows, N), "row_scale": rows}
    return {
        tensor: random_tensor(
            *shapes.get(tensor, (N,)), seed=i, dtype=BF16 if dtype == "bf16" else torch.float32, device=device
        ).requires_grad_()
        for i, (tensor, dtype) in enumerate(dtypes.items())
    }


def norm(name: str, leaves: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
    """The results of a call."""
    kind, _, options = CALLS[name]
    found = FUNCTIONS[kind](**leaves, **options, backend=backend)
    return found if isinstance(found, tuple) else (found,)


def results_and_gradients(function: Any, leaves: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What ``function`` returns, and the gradients of the leaves through all of it, always from one seed."""
    torch.manual_seed(0)
    results = function(leaves)
    cotangents = [random_tensor(*r.shape, seed=i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), cotangents)]


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        tolerance = 1e-5 if e.dtype == torch.float32 else 2 * torch.finfo(e.dtype).eps
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ opcheck


class Recorded(TorchDispatchMode):
    """The calls of this package's operators, as autograd made them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            self.calls.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_norm_operators_pass_opcheck(name, device):
    """Schema, fake implementation and autograd registration of both operators, on the arguments of a real call."""
    pytest.importorskip("triton", reason="triton is not installed")
    leaves = make_arguments(name, device)
    with Recorded() as recorded:
        results_and_gradients(lambda t: norm(name, t, "triton"), leaves)
    operators = [operator for operator, _ in recorded.calls]
    assert operators == [torch.ops.fastattn.add_norm_forward.default, torch.ops.fastattn.add_norm_backward.default]
    for operator, arguments in recorded.calls:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias", "x_bias", "row_scale"])
def test_norm_backward_operator_passes_opcheck_for_a_single_gradient(wanted, device):
    """What is not wanted is empty, in the real implementation as in the fake one."""
    pytest.importorskip("triton", reason="triton is not installed")
    leaves = {name: t.requires_grad_(name == wanted) for name, t in make_arguments("all", device).items()}
    with Recorded() as recorded:
        norm("all", leaves, "triton")[0].sum().backward()
    torch.library.opcheck(*recorded.calls[1])


@pytest.mark.parametrize("name", ["layer", "add", "add_returned", "all_dropout"])
def test_norm_forward_operator_passes_opcheck_where_nothing_is_kept(name, device):
    pytest.importorskip("triton", reason="triton is not installed")
    leaves = make_arguments(name, device)
    with torch.no_grad(), Recorded() as recorded:
        results = norm(name, leaves, "triton")
    ((operator, arguments),) = recorded.calls
    torch.library.opcheck(operator, arguments)
    _, total, statistics = operator(*arguments)
    assert not statistics.numel()
    assert bool(total.numel()) == (len(results) == 2)


def test_norm_outputs_alias_no_input(backend, device):
    leaves = {name: t.detach() for name, t in make_arguments("all", device).items()}
    given = {t.untyped_storage().data_ptr() for t in leaves.values()}
    for result in norm("all", leaves, backend):
        assert result.untyped_storage().data_ptr() not in given


# ------------------------------------------------------------------------------------------------------ torch.compile

# aot_eager traces everything that inductor does; inductor itself takes seconds, so it has few cases.
COMPILED = [(name, "aot_eager", i % 2 == 1) for i, name in enumerate(CALLS)]
COMPILED += [("all", "aot_eager", True), ("rms", "aot_eager", True), ("add_returned", "eager", False)]
COMPILED += [("add", "inductor", False), ("all", "inductor", True)]


@pytest.mark.parametrize(("name", "compiler", "dynamic"), COMPILED)
def test_norm_compiles_without_graph_breaks(name, compiler, dynamic, backend, device):
    if compiler == "inductor" and shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("inductor needs a C++ compiler: neither gcc nor clang is on the path")
    torch._dynamo.reset()
    leaves = make_arguments(name, device)

    def function(tensors):
        return tuple(t * 2 for t in norm(name, {**tensors, "x": tensors["x"] * 1.5}, backend))

    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    assert_same(results_and_gradients(compiled, leaves), results_and_gradients(function, leaves))


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_norm_compiled_for_dynamic_rows_compiles_once(how, backend, device):
    torch._dynamo.reset()
    counter = CompileCounter()

    def function(tensors):
        return norm("all", tensors, backend)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)
    graphs = None
    for i in range(10):
        rows = (2 + i, 3 + 2 * i)
        tensors = {name: t.detach() for name, t in make_arguments("all", device, rows).items()}
        if how == "mark_dynamic":
            for name in ("x", "residual", "row_scale"):
                for axis in (0, 1):
                    torch._dynamo.mark_dynamic(tensors[name], axis)
        found = compiled(tensors)
        if i % 4 == 0:
            assert_same(found, function(tensors))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_drop_ins_compile_with_a_dynamic_size(kind, backend, device):
    """``x.shape[-1:]`` as normalized_shape, which is symbolic then, and so is a plain ``x.shape[-1]``."""
    torch._dynamo.reset()
    drop_in = getattr(fastattn, f"{kind}_norm")

    def function(x, weight):
        return drop_in(x, x.shape[-1:], weight, backend=backend), drop_in(x, x.shape[-1], backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (12, 20):
        tensors = random_tensor(4, size, seed=1, device=device), random_tensor(size, seed=2, device=device)
        assert_same(compiled(*tensors), function(*tensors))


def test_norm_compiled_inside_use_backend_follows_it(device):
    torch._dynamo.reset()
    x = random_tensor(4, N, seed=1, device=device)
    function = torch.compile(lambda t: fastattn.rms_norm(t, (N,)), backend="eager", fullgraph=True)
    for name in ("torch", "auto"):
        with fastattn.use_backend(name):
            assert_same([function(x)], [fastattn.rms_norm(x, (N,))])


def test_norm_compiled_with_dropout_draws_anew(backend, device):
    torch._dynamo.reset()
    leaves = {name: t.detach() for name, t in make_arguments("dropout", device).items()}
    function = torch.compile(lambda t: norm("dropout", t, backend)[0], backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    assert not torch.equal(function(leaves), function(leaves))


def test_norm_gradients_compiled_where_only_the_sum_is_used(backend, device):
    """The gradient of the norm is nobody's then."""
    torch._dynamo.reset()
    leaves = make_arguments("all", device)

    def function(tensors):
        return norm("all", tensors, backend)[1:]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    used = {name: t for name, t in leaves.items() if name not in ("weight", "bias")}
    of_unused = {name: t.detach() for name, t in leaves.items() if name not in used}
    actual = results_and_gradients(lambda t: compiled({**t, **of_unused}), used)
    assert_same(actual, results_and_gradients(lambda t: function({**t, **of_unused}), used))


# ------------------------------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("name", ["all", "rms"])
def test_norm_exports_with_dynamic_rows(name, strict, backend, device):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            return norm(name, tensors, backend)

    def inputs(*rows):
        return {tensor: t.detach() for tensor, t in make_arguments(name, device, rows).items()}

    b, m = (torch.export.Dim(axis, min=2, max=512) for axis in ("b", "m"))
    per_row = {"x", "residual", "row_scale"}
    shapes = {tensor: {0: b, 1: m} if tensor in per_row else None for tensor in inputs(3, 5)}
    exported = torch.export.export(Module(), (inputs(3, 5),), dynamic_shapes=(shapes,), strict=strict).module()
    for rows in ((3, 5), (2, 9)):
        assert_same(exported(inputs(*rows)), Module()(inputs(*rows)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_drop_ins_export_with_a_dynamic_size(kind, strict, backend, device):
    drop_in = getattr(fastattn, f"{kind}_norm")

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return drop_in(x, x.shape[-1:], weight, backend=backend), drop_in(x, x.shape[-1], backend=backend)

    def inputs(size):
        return random_tensor(4, size, seed=1, device=device), random_tensor(size, seed=2, device=device)

    n = torch.export.Dim("n", min=2, max=512)
    exported = torch.export.export(Module(), inputs(12), dynamic_shapes=({1: n}, {0: n}), strict=strict).module()
    for size in (12, 20):
        assert_same(exported(*inputs(size)), Module()(*inputs(size)))


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_autocasts_as_torch_does(kind, dtype, backend, device):
    """Norms are of those operations that autocast leaves in float32 on GPUs, and lets alone on CPUs."""
    x = random_tensor(4, N, seed=1, dtype=dtype, device=device).requires_grad_()
    weight = random_tensor(N, seed=2, device=device).requires_grad_()
    ours, theirs = (getattr(of, f"{kind}_norm") for of in (fastattn, F))
    with torch.autocast(device.type, dtype=BF16):
        expected = theirs(x, (N,), weight)
        actual = ours(x, (N,), weight, backend=backend)
        added = FUNCTIONS[kind](x, x, weight, backend=backend)
    assert actual.dtype == added.dtype == expected.dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for leaf, gradient in zip((x, weight), torch.autograd.grad(actual.float().sum(), (x, weight))):
        assert gradient.dtype == leaf.dtype


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_behind_a_linear_layer_under_autocast_takes_both_dtypes(kind, backend, device):
    """A pre-norm block: the branch is bfloat16, the stream and the parameters are float32."""
    stream = random_tensor(4, N, seed=1, device=device).requires_grad_()
    projection = random_tensor(N, N, seed=2, device=device).requires_grad_()
    weight = random_tensor(N, seed=3, device=device).requires_grad_()
    with torch.autocast(device.type, dtype=BF16):
        branch = F.linear(stream, projection)
        output, total = FUNCTIONS[kind](branch, stream, weight, return_residual=True, backend=backend)
    assert branch.dtype == BF16
    assert total.dtype == torch.float32
    assert torch.equal(total, stream + branch)
    assert output.dtype == (BF16 if device.type == "cpu" else torch.float32)
    for leaf, gradient in zip(
        (stream, projection, weight),
        torch.autograd.grad(output.float().sum() + total.sum(), (stream, projection, weight)),
    ):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert gradient.any()


# ------------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("name", ["all", "rms", "layer", "all_dropout"])
def test_norm_checkpoints(name, use_reentrant, backend, device):
    """The recomputed forward draws the same dropout, so the gradients are those without checkpointing: bitwise, but
    where the first forward runs without gradients, for which the torch backend has an RMS norm that rounds otherwise.
    """
    leaves = make_arguments(name, device)
    tolerance = None if use_reentrant and backend == "torch" else 0.0
    names = list(leaves)

    def function(*tensors):
        named = dict(zip(names, tensors))
        return norm(name, {**named, "x": named["x"] * 2}, backend)

    def plain(tensors):
        return function(*tensors.values())

    def checkpointed(tensors):
        return checkpoint(function, *tensors.values(), use_reentrant=use_reentrant)

    gradients = []
    for run in (plain, checkpointed):
        torch.manual_seed(0)
        torch.stack([t.square().sum() for t in run(leaves)]).sum().backward()
        gradients.append([t.grad for t in leaves.values()])
        for t in leaves.values():
            t.grad = None
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("saves", [True, False], ids=["must_save", "recompute"])
def test_selective_checkpointing_sees_the_norm_as_one_operator(saves, device, monkeypatch):
    """A policy that saves it is obeyed: the kernel runs once, and not again in the backward."""
    pytest.importorskip("triton", reason="triton is not installed")
    launches = []
    forward = launch.forward

    def counting(*args):
        launches.append(args)
        return forward(*args)

    monkeypatch.setattr(launch, "forward", counting)
    leaves = make_arguments("all_dropout", device)
    names = list(leaves)

    def function(*tensors):
        named = dict(zip(names, tensors))
        return norm("all_dropout", {**named, "x": named["x"].sin()}, "triton")

    def policy(context, operator, *args, **kwargs):
        seen = operator == torch.ops.fastattn.add_norm_forward.default
        return CheckpointPolicy.MUST_SAVE if saves and seen else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(tensors):
        def contexts():
            return create_selective_checkpoint_contexts(policy)

        return checkpoint(function, *tensors.values(), use_reentrant=False, context_fn=contexts)

    actual = results_and_gradients(checkpointed, leaves)
    assert len(launches) == (1 if saves else 2)
    for found, expected in zip(actual, results_and_gradients(lambda t: function(*t.values()), leaves)):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------------- memory


MORE = ("", "x_bias", "dropout", "frozen_row_scale")
IN_PAIRS = [(kind, more, (i + j) % 2 == 0) for i, kind in enumerate(("layer", "rms")) for j, more in enumerate(MORE)]


@pytest.mark.parametrize(("kind", "more", "returned"), IN_PAIRS)
def test_norm_graph_lets_the_summands_go(kind, more, returned, device):
    """The backward reads their sum: a network's branches and old streams are free as soon as they were added."""
    pytest.importorskip("triton", reason="triton is not installed")
    leaves = {name: random_tensor(*ROWS, N, seed=i, device=device) for i, name in enumerate(("x", "residual"))}
    summands = {name: t.requires_grad_() * 2 for name, t in leaves.items()}
    arguments: dict[str, Any] = {"weight": random_tensor(N, seed=3, device=device).requires_grad_()}
    if more == "x_bias":
        arguments["x_bias"] = random_tensor(N, seed=4, device=device).requires_grad_()
    elif more == "dropout":
        arguments["dropout_p"] = 0.5
    elif more == "frozen_row_scale":  # stochastic depth
        arguments["row_scale"] = random_tensor(*ROWS, seed=5, device=device)
    found = FUNCTIONS[kind](**summands, **arguments, return_residual=returned, backend="triton")
    storages = {name: StorageWeakRef(t.untyped_storage()) for name, t in summands.items()}
    gc.collect()  # Triton's interpreter leaves cycles behind
    assert not any(storage.expired() for storage in storages.values())
    summands.clear()
    gc.collect()
    assert {name for name, storage in storages.items() if not storage.expired()} == set()
    results = found if returned else (found,)
    for gradient in torch.autograd.grad([r.sum() for r in results], list(leaves.values())):
        assert gradient.isfinite().all()


def test_norm_alone_keeps_one_tensor_of_the_inputs_size(device):
    """``x`` itself, which is the sum; and a sum that is returned is not kept a second time."""
    pytest.importorskip("triton", reason="triton is not installed")
    leaves = make_arguments("add", device)
    x, residual, weight, bias = leaves.values()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastattn.layer_norm(x, (N,), weight, bias, backend="triton")
        alone = [t for t in kept if t.shape == x.shape]
        kept.clear()
        _, total = fastattn.add_layer_norm(x, residual, weight, bias, return_residual=True, backend="triton")
        added = [t for t in kept if t.shape == x.shape]
    assert [t.data_ptr() for t in alone] == [x.data_ptr()]
    assert [t.data_ptr() for t in added] == [total.data_ptr()]
