"""Models of transformers with ``attn_implementation="fastattn"`` under ``torch.compile``."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.integrations.transformers.families import BY_NAME
from tests.integrations.transformers.harness import inputs_of, model_with, step

pytestmark = pytest.mark.usefixtures("registered")


class Graphs:
    """A backend of torch.compile that notes which modules called this package's attention in its graphs."""

    def __init__(self):
        self.callers = set()

    def __call__(self, graph, inputs):
        for node in graph.graph.nodes:
            if "fastattn/integrations/transformers/attention.py" in node.meta.get("stack_trace", ""):
                self.callers.add(list(node.meta["nn_module_stack"].values())[-1][0])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


NAMES = ("Llama", "Gemma 2", "BERT", "T5", "BLOOM", "MPT", "Falcon (ALiBi)", "MPNet")


@pytest.mark.parametrize(("name", "padding"), [*((name, "right") for name in NAMES), ("Gemma 2", "none")])
def test_compiled_model_matches_eager(name, padding, graphs):
    """In one graph, of which each attention is a part; and again with other sizes, which it leaves open then."""
    model, expected = model_with(name, "fastattn"), step(model_with(name, "fastattn"), inputs_of(name, padding))
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    result = compiled(**inputs_of(name, padding), use_cache=False)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(
        {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, expected.gradients
    )
    attends = [
        path for path in graphs.callers if path.lower().endswith(("attn", "attention", "self", "encdecattention"))
    ]
    assert len(attends) >= BY_NAME[name].calls
    if name in ("Llama", "Gemma 2"):
        shorter = {key: value[:, :-2] for key, value in inputs_of(name, padding).items()}
        with torch.no_grad():
            actual = compiled(**shorter, use_cache=False).logits
            torch.testing.assert_close(actual, model_with(name, "fastattn")(**shorter).logits)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_compiled_layers_match_eager(name, graphs):
    """Layer by layer, while masks are made outside: what stands for a mask enters a graph."""
    model = model_with(name, "fastattn")
    for layer in model.model.layers:
        layer.compile(backend=graphs)
    actual = step(model, inputs_of(name, "right"))
    expected = step(model_with(name, "fastattn"), inputs_of(name, "right"))
    torch.testing.assert_close(actual, expected)
    assert graphs.callers


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_compiled_steps_on_a_static_cache_give_eagers_tokens(name, graphs):
    inputs = {key: value for key, value in inputs_of(name, "left").items() if key in ("input_ids", "attention_mask")}
    words = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    model = model_with(name, "fastattn")
    model.forward = torch.compile(model.forward, backend=graphs, fullgraph=True)
    tokens = model.generate(**inputs, **words, cache_implementation="static")
    assert len(graphs.callers) == BY_NAME[name].calls
    assert torch.equal(tokens, model_with(name, "eager").generate(**inputs, **words))
