"""``torch.fx.symbolic_trace``, ``torch.jit.trace`` and ``torch.export`` of norms and layers, ours and fused ones."""

import io
from typing import Any

import pytest
import torch
from torch import nn

import fastattn

E = 16


@pytest.fixture(autouse=True)
def on_torch():
    """Where a graph is for others it holds torch's operators, and those are what this backend is made of."""
    with fastattn.use_backend("torch"):
        yield


class Block(nn.Module):
    """A user's model of torch's modules."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms, self.linear = nn.LayerNorm(E), nn.RMSNorm(E), nn.Linear(E, E)

    def forward(self, x):
        return x + self.linear(self.rms(self.norm(x)))


class PostNorm(nn.Module):
    """The residual, its dropout and the sum that comes back."""

    def __init__(self, kind):
        super().__init__()
        self.norm = kind(E, dropout=0.5)

    def forward(self, x, residual):
        output, total = self.norm(x, residual, return_residual=True)
        return output + total


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = fastattn.TransformerEncoderLayer(E, 2, 32, batch_first=True)
        self.decoder = fastattn.TransformerDecoderLayer(E, 2, 32, batch_first=True)

    def forward(self, x, padding):
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(x, memory, memory_key_padding_mask=padding)


def nodes(graph: torch.fx.GraphModule) -> list[tuple[str, str, str, Any, Any]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.graph.nodes]


def random_input() -> torch.Tensor:
    return torch.randn(2, 5, E, generator=torch.Generator().manual_seed(0))


def test_a_fused_model_traces_to_the_graph_it_had():
    """By the names of its nodes a feature extractor finds what it is to return; torch's norms are one node each."""
    model, x = Block(), random_input()
    before = torch.fx.symbolic_trace(model)
    expected = before(x)
    fastattn.fuse(model)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced) == nodes(before)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(traced)(x), expected)


@pytest.mark.parametrize("kind", [fastattn.AddLayerNorm, fastattn.AddRMSNorm])
def test_a_norm_with_a_residual_drops_in_training_only(kind):
    """One trace serves both modes: whether to drop is decided when the graph runs, as for torch's modules."""
    model, x = PostNorm(kind), random_input()
    traced = torch.fx.symbolic_trace(model)
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        torch.manual_seed(1)
        expected = model(x, x)
        torch.manual_seed(1)
        torch.testing.assert_close(traced(x, x), expected)
    assert not torch.equal(model.train()(x, x), model.eval()(x, x))


def test_layers_are_one_node_each():
    """What torch.fx makes of torch's; inside them is control flow that no Proxy passes."""
    model, x, padding = Layers().eval(), random_input(), torch.tensor([[False] * 4 + [True], [False] * 5])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["encoder", "decoder"]
    torch.testing.assert_close(traced(x, padding), model(x, padding))


@pytest.mark.parametrize("kind", [fastattn.AddLayerNorm, fastattn.AddRMSNorm])
def test_a_norm_that_is_the_whole_model_traces_to_torchs_operator(kind):
    """Then nobody calls it by a name. What it takes beyond the input nobody has given when it is traced."""
    norm, x = kind(E), random_input()
    traced = torch.fx.symbolic_trace(norm)
    torch.testing.assert_close(traced(x), norm(x))
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert torch.nn.functional.layer_norm in called or torch.nn.functional.rms_norm in called
    with pytest.raises(AssertionError, match="residual was given to a graph of"):
        traced(x, x)


def test_hooks_are_in_the_graph_once():
    """They are called on what is traced, so that a node which called the module would call them again."""
    model, x = PostNorm(fastattn.AddLayerNorm).eval(), random_input()
    model.norm.register_forward_hook(lambda module, inputs, output: (2 * output[0], 3 * output[1]))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, x), model(x, x))
    alone = nn.Sequential(fastattn.AddRMSNorm(E))
    alone[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    torch.testing.assert_close(torch.fx.symbolic_trace(alone)(x), alone(x))


def test_functions_are_one_node_each():
    """As torch's functions are."""

    class Functions(nn.Module):
        def forward(self, x, weight):
            normed = fastattn.layer_norm(x, (E,), weight) + fastattn.rms_norm(x, E, eps=0.1)
            total = fastattn.add_rms_norm(x, normed, return_residual=True)[1]
            output: Any = fastattn.add_layer_norm(normed, x, weight)
            return output + total

    model, x, weight = Functions(), random_input(), torch.rand(E)
    traced = torch.fx.symbolic_trace(model)
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert {fastattn.layer_norm, fastattn.rms_norm, fastattn.add_layer_norm, fastattn.add_rms_norm} <= set(called)
    torch.testing.assert_close(traced(x, weight), model(x, weight))


def fused_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, x = Block().eval(), random_input()
    expected = model(x)
    fastattn.fuse(model)
    return model, x, expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_of_fused_norms_is_saved_with_torchs_operators():
    model, x, expected = fused_model()
    buffer = io.BytesIO()
    traced: Any = torch.jit.trace(model, x)
    assert "fastattn::" not in str(traced.inlined_graph)
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_export_of_fused_norms_holds_torchs_operators(strict, train):
    model, x, expected = fused_model()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model.train(train), (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not any("fastattn" in target for target in targets)
    torch.testing.assert_close(program.module()(x), expected)
    assert program.module()(torch.cat([x, x]))[:2].shape == x.shape
