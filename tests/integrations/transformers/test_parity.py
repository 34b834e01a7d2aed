"""Models of transformers with ``attn_implementation="fastattn"`` beside ``"eager"``: it is ours that attends."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import fastattn
from fastattn.testing import assert_within_budget
from tests.integrations.transformers.families import BY_NAME, FAMILIES
from tests.integrations.transformers.harness import (
    DRAWS,
    assert_results_within_budget,
    attention,
    drawn,
    eager,
    fuse,
    inputs_of,
    is_norm,
    model_with,
    watching,
)

NAMES = [family.name for family in FAMILIES]
PADDED = [(family.name, padding) for family in FAMILIES for padding in family.pads]
CARRIED = [(family.name, what) for family in FAMILIES for what in (*family.carries, "padding")]
# Some have no padding, and CLIP's text, read causally, ends before it begins.
CARRIED = [(name, what) for name, what in CARRIED if what != "padding" or (BY_NAME[name].pads[1:] and name != "CLIP")]
WORDS = {"documents": "document_ids", "bias": "attn_mask", "padding": "key_padding_mask"}  # others by the same word
# What the kernels have to get beside query, key and value, each once.
ON_KERNELS = [("Mistral", "left"), ("Gemma 2", "right"), ("GPT-OSS", "left"), ("DeepSeek-V3", "none"),
              ("LayoutLMv3", "right"), ("ModernBERT", "right"), ("T5", "right"), ("Mllama", "left"), ("BLOOM", "left"),
              ("MPT", "right"), ("Falcon (grouped)", "left"), ("Falcon (ALiBi)", "right"), ("MPNet", "right"),
              ("WavLM", "right")]  # fmt: skip

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("registered", "family")]


def truth_and_peer(name, padding, dtype=torch.float32, draws=DRAWS):
    return {"truth": eager(name, padding, torch.float64, draws), "peer": eager(name, padding, dtype, draws)}


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_model_matches_eager(name, padding):
    """Logits, loss and every gradient; each attention is ours; and no mask ``[B, 1, L, S]`` is made for it."""
    family = BY_NAME[name]
    with watching() as watch:
        actual = drawn(name, padding, "fastattn")
    assert_results_within_budget(actual, **truth_and_peer(name, padding), feature=name)
    assert len(watch.calls) == family.calls * DRAWS
    assert watch.exact_masks == 0
    assert watch.carried == {*family.carries, *(["padding"] if padding != "none" else [])}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_attends(name):
    """Of all operators of a forward none is a softmax or a scaled dot product, but for those that are no attention."""
    family = BY_NAME[name]
    inputs = inputs_of(name, family.pads[-1])
    with watching(elsewhere=True) as watch, torch.no_grad():
        model_with(name, "fastattn")(**inputs)
    assert len(watch.calls) == family.calls
    assert watch.elsewhere.total() == family.softmaxes
    with watching(elsewhere=True) as watch, torch.no_grad():
        model_with(name, family.peer)(**inputs)
    assert watch.elsewhere.total() == family.softmaxes + family.calls, "what looks for attention does not see eager's"


@pytest.mark.parametrize("name", NAMES)
def test_model_in_bf16_is_as_right_as_eager(name):
    padding = BY_NAME[name].pads[-1]
    actual = drawn(name, padding, "fastattn", torch.bfloat16)
    assert_results_within_budget(actual, **truth_and_peer(name, padding, torch.bfloat16), feature=name)


@pytest.mark.parametrize("name", NAMES)
def test_truth_is_computed_in_float64(name):
    """The error of eager in float32 is one of rounding: no part of the truth took another way through the model."""
    truth, peer = truth_and_peer(name, BY_NAME[name].pads[-1]).values()
    error = (peer.output - truth.output).abs().max() / truth.output.abs().max()
    assert 0 < error < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("name", "what"), CARRIED)
def test_what_is_lost_is_noticed(name, what, monkeypatch):
    """Attention without one of the things it gets is outside of the budget: the tests above can fail."""
    run = attention.attention

    def forgetful(query, key, value, *, attn_mask=None, **words):
        if what == "padding" and attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = None
        words["attn_mask"] = attn_mask
        words.pop(WORDS.get(what, what), None)
        return run(query, key, value, **words)

    monkeypatch.setattr(attention, "attention", forgetful)
    padding = BY_NAME[name].pads[-1]
    actual = drawn(name, padding, "fastattn")
    truth, peer = truth_and_peer(name, padding).values()
    with pytest.raises(AssertionError, match="outside its error budget"):
        assert_within_budget(actual.output, truth=truth.output, peer=peer.output, name="output")


@pytest.mark.parametrize(("name", "padding"), ON_KERNELS)
def test_kernels_get_what_the_model_says(name, padding, request):
    draws = 2  # the interpreter takes its time; of one draw, small gradients are right by luck on some processors
    budget = truth_and_peer(name, padding, draws=draws)
    request.getfixturevalue("poisoned")
    with watching() as watch, fastattn.use_backend("triton"):
        actual = drawn(name, padding, "fastattn", draws=draws)
    assert len(watch.calls) == draws * BY_NAME[name].calls
    assert_results_within_budget(actual, **budget, feature=name)


@pytest.mark.parametrize("name", NAMES)
def test_fused_model_matches_eager(name):
    """With :func:`fastattn.fuse`, too, which is told of the norms; those that are left compute something else."""
    family = BY_NAME[name]
    fusions = []
    padding = family.pads[-1]
    actual = drawn(name, padding, "fastattn", prepare=lambda model: fusions.append(fuse(model, family)))
    assert_results_within_budget(actual, **truth_and_peer(name, padding), feature=name)
    replaced = [kind for kind in fusions[0].replaced.values() if kind is not fastattn.MultiheadAttention]
    norms = [module for module in model_with(name, "fastattn").modules() if is_norm(module)]
    assert (len(replaced), len(norms)) == (len(norms) - family.norms_left, len(norms))
