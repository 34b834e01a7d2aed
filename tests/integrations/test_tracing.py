"""``torch.fx.symbolic_trace`` of models made ours gives the graph that it gave before, node for node.

torch.fx takes a module of ``torch.nn`` for one node and traces through all others. The feature extractors of
torchvision and timm find their nodes by name, so a model has to keep them when its attention becomes ours.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.testing import random_tensor

E, HEADS = 16, 2


class Block(nn.Module):
    """Cross attention under masks, with its weights."""

    def __init__(self, need_weights=True, **arguments):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, dropout=0.5, **arguments)
        self.need_weights = need_weights
        self.register_buffer("future", torch.ones(4, 4, dtype=torch.bool).triu(1))

    def forward(self, x, memory, padding):
        masks = {"key_padding_mask": padding, "attn_mask": self.future}
        output, weights = self.attention(x, memory, memory, need_weights=self.need_weights, **masks)
        return (x + output, weights) if self.need_weights else x + output


def inputs():
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 2] = True
    return random_tensor(4, 4, E, seed=0), random_tensor(4, 4, E, seed=1), padding


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"batch_first": True}, {"add_bias_kv": True, "bias": False}], ids=str)
def test_graph_of_a_fused_model_is_that_of_the_model(need_weights, arguments):
    model, given = Block(need_weights, **arguments).eval(), inputs()
    before, expected = torch.fx.symbolic_trace(model), model(*given)
    fastattn.fuse(model)
    graph = torch.fx.symbolic_trace(model)
    assert [(n.name, n.op) for n in graph.graph.nodes] == [(n.name, n.op) for n in before.graph.nodes]
    assert isinstance(graph.get_submodule("attention"), fastattn.MultiheadAttention)
    graph.graph.lint()
    for again in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), torch.fx.symbolic_trace(graph)):
        torch.testing.assert_close(again(*given), expected)


def test_graph_drops_in_training_only():
    model, given = Block(), inputs()
    fastattn.fuse(model, backend="torch")
    graph = torch.fx.symbolic_trace(model)
    torch.manual_seed(0)
    dropped = graph(*given)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, model(*given))
    assert not torch.equal(dropped[1], graph.eval()(*given)[1])


def test_hooks_of_a_traced_module_take_effect_once():
    """They have run by the time that the module is asked for its node; there torch's function is the graph's."""
    model, given = Block().eval(), inputs()
    fastattn.fuse(model)
    model.attention.register_forward_hook(lambda module, arguments, result: (2 * result[0], result[1]))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*given), model(*given))


class OneInput(fastattn.MultiheadAttention):
    """A subclass with a ``forward`` of its own, which a node of ours would call."""

    def forward(self, x):  # type: ignore[override]
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, E), (5, E)], ids=["batched", "unbatched"])
def test_subclasses_and_roots_become_torchs_function(shape, batch_first):
    module, x = OneInput(E, HEADS, batch_first=batch_first).eval(), random_tensor(*shape, seed=0)
    for traced in (module, nn.Sequential(module)):
        torch.testing.assert_close(torch.fx.symbolic_trace(traced)(x), traced(x))


def test_mask_alone_may_be_symbolic():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.x = fastattn.MultiheadAttention(E, HEADS), random_tensor(4, 4, E, seed=0)

        def forward(self, padding):
            return self.attention(self.x, self.x, self.x, key_padding_mask=padding)[0]

    model, padding = Model().eval(), inputs()[2]
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(padding), model(padding))


class LayerModel(nn.Module):
    """A stack that torch itself traces as two nodes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(E, HEADS, 32)
        self.decoder = nn.TransformerDecoderLayer(E, HEADS, 32)

    def forward(self, x, memory, padding):
        return self.decoder(x, self.encoder(memory, src_key_padding_mask=padding), memory_key_padding_mask=padding)


def test_layers_are_one_node_each():
    model, given = LayerModel().eval(), inputs()
    before, expected = torch.fx.symbolic_trace(model), model(*given)
    fastattn.fuse(model)
    graph = torch.fx.symbolic_trace(model)
    assert [n.name for n in graph.graph.nodes] == [n.name for n in before.graph.nodes]
    torch.testing.assert_close(graph(*given), expected)


class Others(nn.Module):
    """Modules that torch does not have."""

    def __init__(self):
        super().__init__()
        self.image = fastattn.SelfAttention2d(E, HEADS)
        self.additive = fastattn.AdditiveAttention(E, E, 8)
        self.positions = fastattn.LearnedPositionalEncoding(64, E)

    def forward(self, x):
        y, weights = self.image(x, need_weights=True)
        y = self.positions(y.flatten(2).transpose(1, 2))
        return *self.additive(y, y, need_weights=True), weights


def test_modules_of_our_own_can_be_traced():
    model, x = Others(), random_tensor(2, E, 3, 5, seed=0)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_functions_are_one_node_each():
    def model(query, key, documents):
        output, lse = fastattn.attention(query, key, key, document_ids=(documents, documents), return_lse=True)
        plain = fastattn.scaled_dot_product_attention(query, key, key, is_causal=True)
        return output, lse, plain, fastattn.additive_attention(query, key, key, torch.ones(8))

    given = random_tensor(2, 2, 5, 8, seed=0), random_tensor(2, 2, 5, 8, seed=1), torch.arange(10).view(2, 5) // 3
    graph: Any = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(*given), model(*given))
