"""Graphs that leave the process: torch.export, torch.jit.trace and AOTInductor packages of models made ours.

Whoever runs such a graph may not have this package, so it holds torch's own operators alone, unless the kernels were
asked for by name. It has to be right at other sizes than those it was made with, and where ``nn.MultiheadAttention``
can be exported, so can ours: with weights, which is torch's default, and with masks whose length comes from data.
"""

import copy
import io
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.testing import random_tensor
from tests.ops.test_attention_compile import CALLS, call_with, make_arguments

E, HEADS = 16, 2
BATCH, LENGTH = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)


def operators_of_ours(graph_module: Any) -> list[str]:
    """The operators of this package in a graph, those of the graphs inside it included."""
    graphs = [m.graph for m in graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if "fastattn" in str(node.target)]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- nn.MultiheadAttention's


class Attending(nn.Module):
    """An attention with its masks, each given as a boolean and made what ``masks`` says."""

    def __init__(self, masks: str, need_weights: bool, average: bool, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **arguments)
        self.masks, self.flags = masks, {"need_weights": need_weights, "average_attn_weights": average}

    def forward(self, x, padding, future):
        def added(mask):
            return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -torch.inf)

        given = {
            "none": {},
            "padding": {"key_padding_mask": padding},
            "causal": {"attn_mask": future, "is_causal": True},
            "bool": {"key_padding_mask": padding, "attn_mask": future},
            "float": {"key_padding_mask": added(padding), "attn_mask": added(future)},
        }[self.masks]
        output, weights = self.attention(x, x, x, **given, **self.flags)
        return (output,) if weights is None else (output, weights)


def inputs(batch, length, batch_first=True):
    x = random_tensor(batch, length, E, seed=batch)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    return x if batch_first else x.transpose(0, 1), padding, torch.ones(length, length, dtype=torch.bool).triu(1)


# masks, need_weights, average, training, arguments of the module
MODELS: dict[str, tuple[str, bool, bool, bool, dict[str, Any]]] = {
    "default": ("none", True, True, False, {}),
    "training": ("none", True, True, True, {}),
    "weights_of_heads": ("bool", True, False, False, {}),
    "float_masks": ("float", True, True, True, {}),
    "appended_keys": ("padding", True, True, False, {"add_bias_kv": True, "add_zero_attn": True}),
    "causal": ("causal", False, True, False, {}),
    "causal_weights": ("causal", True, True, False, {}),
    "padding": ("padding", False, True, True, {}),
    "no_bias": ("float", False, True, False, {"bias": False, "add_zero_attn": True}),
}
HOW = ["strict", "non_strict", "jit", "make_fx"]


def graph_of(model, arguments, how, batch_first):
    """What a graph of ``model``, made from ``arguments``, computes; and this package's operators in it."""
    if how == "jit":
        buffer = io.BytesIO()
        # torch traces once more, without gradients, and compares; dropout would differ
        checks = not any(m.training and getattr(m, "dropout", 0) for m in model.modules())
        traced: Any = torch.jit.trace(model, arguments, check_trace=checks)
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        graph = str(traced.inlined_graph)
        return torch.jit.load(buffer), [name for name in ("fastattn::", "PythonOp") if name in graph]
    if how == "make_fx":
        graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
        return graph, operators_of_ours(graph)
    x = {0: BATCH, 1: LENGTH} if batch_first else {0: LENGTH, 1: BATCH}
    shapes = (x, {0: BATCH, 1: LENGTH}, {0: LENGTH, 1: LENGTH})
    exported = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=how == "strict")
    return exported.module(), operators_of_ours(exported.graph_module)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:Support for mismatched")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_exported_attention_is_torchs_operators_and_right_at_other_sizes(name, how):
    masks, need_weights, average, training, arguments = MODELS[name]
    for batch_first in (True, False) if name == "default" else (True,):
        torch.manual_seed(0)
        model = Attending(masks, need_weights, average, batch_first=batch_first, **arguments).train(training)
        expected = copy.deepcopy(model)
        fastattn.fuse(model)
        with torch.set_grad_enabled(how != "make_fx"):
            graph, ours = graph_of(model, inputs(3, 6, batch_first), how, batch_first)
            assert not ours
            for sizes in ((3, 6), (4, 9)):
                given = inputs(*sizes, batch_first)
                assert_close(graph(*given), expected(*given))


@pytest.mark.parametrize("how", ["strict", "non_strict"])
def test_exported_rows_that_see_nothing_are_zero(how):
    """torch's export gives NaN for them, with weights."""
    model = fastattn.MultiheadAttention(E, HEADS, batch_first=True)
    x, padding = random_tensor(2, 5, E, seed=0), torch.zeros(2, 5, dtype=torch.bool)
    padding[0] = True
    exported = torch.export.export(model, (x, x, x, padding), strict=how == "strict")
    output, weights = exported.module()(x, x, x, padding)
    assert_close(output[0], model.out_proj.bias.expand(5, E))
    assert torch.equal(weights[0], torch.zeros(5, 5))
    assert_close((output, weights), model(x, x, x, padding))


@pytest.mark.parametrize("training", [False, True])
def test_exported_dropout_is_drawn_when_the_graph_runs(training):
    model = fastattn.MultiheadAttention(E, HEADS, dropout=0.5, batch_first=True, backend="torch").train(training)
    x = random_tensor(2, 5, E, seed=0)
    exported = torch.export.export(model, (x, x, x))
    assert not operators_of_ours(exported.graph_module)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(exported.module()(x, x, x))
        torch.manual_seed(seed)
        assert_close(results[-1], model(x, x, x))
    assert torch.equal(results[0][0], results[1][0]) != training


def test_kernels_asked_for_by_name_stay_in_an_exported_graph():
    pytest.importorskip("triton", reason="triton is not installed")
    model = fastattn.MultiheadAttention(E, HEADS, batch_first=True, backend="triton").eval()
    x = random_tensor(2, 5, E, seed=0)
    exported = torch.export.export(model, (x, x, x))
    assert operators_of_ours(exported.graph_module) == ["fastattn.attention_forward.default"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_export_inside_autocast_keeps_its_dtype(masked, strict):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = fastattn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x, padding):
            with torch.autocast("cpu", torch.bfloat16):
                return self.attention(x, x, x, key_padding_mask=padding if masked else None)

    model, arguments = Model().eval(), inputs(3, 6)[:2]
    found = torch.export.export(model, arguments, strict=strict).module()(*arguments)
    for ours, wanted in zip(found, model(*arguments)):
        assert ours.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------- sizes that come from data


class PaddingByLengths(nn.Module):
    """A padding mask as long as the longest sequence: which length that is only the data tell."""

    def __init__(self, attention, trims=False, **flags):
        super().__init__()
        self.attention, self.trims, self.flags = attention, trims, flags

    def forward(self, x, lengths):
        longest = lengths.max().item()
        if self.trims:
            x = x[:, :longest]
        padding = torch.arange(longest)[None] >= lengths[:, None]
        return self.attention(x, x, x, key_padding_mask=padding, **self.flags)[0]


@pytest.mark.parametrize("how", ["strict", "non_strict", "compile"])
@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_of_data_dependent_length(need_weights, trims, how):
    if trims and not need_weights:
        pytest.skip("F.scaled_dot_product_attention itself asks whether such a length is 1 (as of torch 2.13)")
    torch._dynamo.reset()
    attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
    model = PaddingByLengths(attention, trims, need_weights=need_weights)
    arguments = random_tensor(3, 12, E, seed=0), torch.tensor([12, 7, 9])
    expected = model(*arguments)
    fastattn.fuse(model, backend="torch")
    if how == "compile":
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            graph = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert_close(graph(*arguments), expected)
    else:
        exported = torch.export.export(model, arguments, strict=how == "strict")
        assert not operators_of_ours(exported.graph_module)
        assert_close(exported.module()(*arguments), expected)


def test_padding_of_a_length_that_does_not_fit_is_refused_by_the_graph():
    model = PaddingByLengths(fastattn.MultiheadAttention(E, HEADS, batch_first=True))
    x = random_tensor(3, 12, E, seed=0)
    exported = torch.export.export(model, (x, torch.tensor([12, 7, 9]))).module()
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        exported(x, torch.tensor([11, 7, 9]))


@pytest.mark.parametrize("how", ["strict", "non_strict"])
@pytest.mark.parametrize("mask", ["attn_mask", "key_padding_mask"])
def test_function_with_a_mask_of_data_dependent_length(mask, how):
    class Model(nn.Module):
        def forward(self, x, lengths):
            inside = torch.arange(lengths.max().item())[None] < lengths[:, None]
            given = {"attn_mask": inside[:, None, None]} if mask == "attn_mask" else {"key_padding_mask": ~inside}
            return fastattn.attention(x, x, x, is_causal=True, backend="torch", **given)

    arguments = random_tensor(3, 2, 12, 8, seed=0), torch.tensor([12, 7, 9])
    exported = torch.export.export(Model(), arguments, strict=how == "strict")
    assert_close(exported.module()(*arguments), Model()(*arguments))


# ------------------------------------------------------------------------------------------- functions, other modules


@pytest.mark.parametrize("how", ["strict", "non_strict"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "dropout"])
def test_exported_function_is_torchs_operators(name, how):
    """Windows, documents, ALiBi, softcap, sinks and the LSE too, for which torch's attention has no words."""
    leaves, arguments = make_arguments(name, "cpu")
    leaves = tuple(t.detach() for t in leaves)

    class Model(nn.Module):
        def forward(self, *tensors):
            return call_with(tensors, arguments, "torch")

    exported = torch.export.export(Model(), leaves, strict=how == "strict")
    assert not operators_of_ours(exported.graph_module)
    assert_close(exported.module()(*leaves), Model()(*leaves))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_causal_attention_of_two_open_lengths(strict):
    """No branch of the graph may ask which of the two is longer; keys past the diagonal, NaN here, stay unseen."""

    class Model(nn.Module):
        def forward(self, query, key):
            return fastattn.attention(query, key, key, is_causal=True, backend="torch")

    length, keys = torch.export.Dim("length", min=2, max=512), torch.export.Dim("keys", min=2, max=512)
    arguments = random_tensor(2, 2, 5, 8, seed=0), random_tensor(2, 2, 7, 8, seed=1)
    exported = torch.export.export(Model(), arguments, dynamic_shapes=({2: length}, {2: keys}), strict=strict)
    for length, keys in ((5, 7), (7, 5), (4, 4)):
        query, key = random_tensor(2, 2, length, 8, seed=0), random_tensor(2, 2, keys, 8, seed=1)
        expected = Model()(query, key)
        key[:, :, length:] = torch.nan
        assert_close(exported.module()(query, key), expected)


OTHERS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "encoder_layer": (lambda: fastattn.TransformerEncoderLayer(E, HEADS, 32), ((5, 2, E),)),
    "pre_norm_encoder_layer": (lambda: fastattn.TransformerEncoderLayer(E, HEADS, 32, norm_first=True), ((5, 2, E),)),
    "decoder_layer": (lambda: fastattn.TransformerDecoderLayer(E, HEADS, 32), ((5, 2, E), (7, 2, E))),
    "additive_attention": (lambda: fastattn.AdditiveAttention(E, E, 8), ((2, 5, E), (2, 7, E))),
    "self_attention_2d": (lambda: fastattn.SelfAttention2d(E, HEADS, qk_channels=4), ((2, E, 3, 5),)),
    "rms_norm": (lambda: fastattn.AddRMSNorm(E), ((2, 5, E),)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:Support for mismatched")
@pytest.mark.parametrize("how", ["strict", "non_strict", "jit"])
@pytest.mark.parametrize("name", OTHERS)
def test_exported_modules_are_torchs_operators(name, how):
    make, shapes = OTHERS[name]
    model: Any = make().eval()
    arguments = tuple(random_tensor(*shape, seed=i) for i, shape in enumerate(shapes))
    if name == "additive_attention":
        model = _First(model)
    if how == "jit":
        graph, ours = graph_of(model, arguments, how, True)
    else:
        exported = torch.export.export(model, arguments, strict=how == "strict")
        graph, ours = exported.module(), operators_of_ours(exported.graph_module)
    assert not ours
    assert_close(graph(*arguments), model(*arguments))


class _First(nn.Module):
    """The first of what a module gives: None cannot leave a traced module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)[0]


# -------------------------------------------------------------------------------------------------------- AOTInductor

WITHOUT_THIS_PACKAGE = """
import sys, torch
sys.modules["fastattn"] = None  # an import of it would raise
package, tensors, results = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*given) for given in torch.load(tensors)], results)
"""


def test_package_loads_where_this_package_is_not(tmp_path):
    """AOTInductor: a fused model with torch's default of returning weights, and a function's rules that only formulas
    know; masks, batch and length left open."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler: neither g++ nor clang++ is on the path")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(E, HEADS, batch_first=True), nn.LayerNorm(E)

        def forward(self, x, padding, sinks):
            output, weights = self.attention(x, x, x, key_padding_mask=padding)
            y = self.norm(x + output).unflatten(2, (HEADS, -1)).transpose(1, 2)
            rules = {"is_causal": True, "window": (3, None), "prefix": 1, "alibi_slopes": sinks, "sinks": sinks}
            return weights, *fastattn.attention(y, y, y, **rules, return_lse=True, backend="torch")

    net, sinks = Net().eval(), random_tensor(HEADS, seed=4)
    given = [(*inputs(*sizes)[:2], sinks) for sizes in ((3, 6), (4, 9))]
    with torch.no_grad():
        expected = [net(*arguments) for arguments in given]
    fastattn.fuse(net)
    package, tensors, results = (str(tmp_path / name) for name in ("net.pt2", "given.pt", "results.pt"))
    torch.save(given, tensors)
    with torch.no_grad():
        shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH}, None)
        exported = torch.export.export(net, given[0], dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, package, tensors, results]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for found, wanted in zip(torch.load(results), expected):
        assert_close(tuple(found), wanted)
