"""Attention layers that ask for no attention by a name: whose forward runs, and what it gets, stores and returns."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from torch import nn
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

import fastattn
from fastattn.integrations.transformers import dispatch, register
from fastattn.testing import assert_within_budget
from tests.integrations.transformers.families import BATCH, BY_NAME, LENGTH, build
from tests.integrations.transformers.harness import (
    InFloat64,
    inputs_of,
    model_of,
    model_with,
    real_output,
    said_by,
    watching,
)

OWN = ["BLOOM", "MPT", "Falcon", "Falcon (grouped)", "Falcon (ALiBi)", "MPNet", "WavLM"]

pytestmark = pytest.mark.usefixtures("registered")


def output(model, name):
    inputs = inputs_of(name, "right")
    with torch.no_grad():
        return real_output(model(**inputs), inputs)


# ------------------------------------------------------------------------------------------------------------ dispatch


@pytest.mark.parametrize("name", OWN)
def test_other_names_run_their_forward(name):
    model = model_with(name, "fastattn")
    model.set_attn_implementation("eager")
    with watching() as watch:
        assert torch.equal(output(model, name), output(model_of(name), name))
    assert not watch.calls


@pytest.mark.parametrize("name", ["BLOOM", "MPT", "Falcon", "MPNet"])
def test_model_that_was_built_with_the_name_runs_on_ours(name):
    family = BY_NAME[name]
    config = model_of(name).config.__class__(**family.sizes)
    model = type(model_of(name))._from_config(config, attn_implementation="fastattn").eval()
    model.load_state_dict(model_of(name).state_dict())
    with watching() as watch:
        torch.testing.assert_close(output(model, name), output(model_of(name), name))
    assert len(watch.calls) == family.calls


def test_model_that_was_loaded_with_sdpa_before_runs_on_ours():
    """Falcon is the one of these families that transformers has with ``"sdpa"``."""
    model = build(BY_NAME["Falcon"])
    model.set_attn_implementation("sdpa")
    with register("sdpa"), watching() as watch:
        actual = output(model, "Falcon")
    assert len(watch.calls) == 2
    with watching() as watch:
        torch.testing.assert_close(actual, output(model, "Falcon"))
    assert not watch.calls


def test_layers_that_were_built_before_the_name_was_known_run_on_ours():
    code = (
        "import torch, transformers, fastattn.integrations.transformers as integration\n"
        "config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)\n"
        "model = transformers.BloomForCausalLM(config).eval(); ids = torch.arange(5, 12)[None]\n"
        "expected = model(ids).logits\n"
        "integration.register(); model.set_attn_implementation('fastattn')\n"
        "torch.testing.assert_close(model(ids).logits, expected)\n"
        "print(model.transformer.h[0].self_attention.config._attn_implementation)"
    )
    assert said_by(code) == "fastattn\n"


def test_registering_imports_no_models():
    code = (
        "import sys, fastattn.integrations.transformers as integration; integration.register()\n"
        "print([name for name in sys.modules if '.modeling_bloom' in name or '.modeling_wavlm' in name])"
    )
    assert said_by(code) == "[]\n"


def test_name_that_is_undone_can_be_left():
    with register("fastattn_twice"):
        model = model_with("BLOOM", "fastattn_twice")
    with pytest.raises(KeyError, match="fastattn_twice"):
        output(model, "BLOOM")
    model.set_attn_implementation("eager")
    assert torch.equal(output(model, "BLOOM"), output(model_of("BLOOM"), "BLOOM"))


@pytest.mark.parametrize("change", ["an argument more", "another order"])
def test_layers_of_another_form_are_refused(change, monkeypatch):
    """As of a transformers that has changed them."""

    class BloomAttention(nn.Module):
        def forward(self, hidden_states, residual, alibi, attention_mask, window=None, **kwargs): ...

    class Reordered(nn.Module):
        def forward(self, hidden_states, alibi, residual, attention_mask, **kwargs): ...

    found = {"an argument more": BloomAttention, "another order": Reordered}[change]
    found.__module__, found.__name__ = modeling_bloom.__name__, "BloomAttention"
    monkeypatch.setattr(modeling_bloom, "BloomAttention", found)
    with pytest.raises(ValueError, match="BloomForCausalLM computes attention in its own layers"):
        modeling_bloom.BloomForCausalLM._from_config(transformers.BloomConfig(), attn_implementation="fastattn")
    monkeypatch.setattr(modeling_bloom, "BloomAttention", None)
    assert not dispatch.reach(modeling_bloom.__name__, {"fastattn"})


# ------------------------------------------------------------------------------------------------------ what they get


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BLOOM", (BATCH, 4, 1, LENGTH)),
        ("MPT", (1, 4, 1, LENGTH)),
        ("Falcon (ALiBi)", (BATCH, 4, 1, LENGTH)),
        ("MPNet", (1, 4, LENGTH, LENGTH)),
    ],
)
def test_bias_is_not_expanded(name, shape):
    with watching() as watch:
        output(model_with(name, "fastattn"), name)
    assert {tuple(words["attn_mask"].shape) for words in watch.calls} == {shape}


@pytest.mark.parametrize("name", OWN)
def test_dropout_of_the_layer_arrives(name):
    """But not in Falcon's rotary layers, which drop no weights in transformers, either."""
    model = model_with(name, "fastattn")
    for part in model.modules():
        if isinstance(getattr(part, "config", None), type(model.config)) and "Attention" in type(part).__name__:
            for word in ("attention_dropout", "dropout"):
                if isinstance(getattr(part, word, None), nn.Dropout):
                    getattr(part, word).p = 0.4
            for word in ("attn_dropout_p", "dropout"):
                if isinstance(getattr(part, word, None), float | int):
                    setattr(part, word, 0.4)
    expected = 0.0 if name in ("Falcon", "Falcon (grouped)") else 0.4
    for training in (True, False):
        model.train(training)
        with watching() as watch, torch.no_grad():
            model(**inputs_of(name, "right"))
        assert {words["dropout_p"] for words in watch.calls} == {expected * training}


def test_keys_of_a_group_are_stored_once():
    cache = model_with("Falcon (grouped)", "fastattn")(**inputs_of("Falcon (grouped)", "none")).past_key_values
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(BATCH, 2, LENGTH, 8)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BLOOM", {"pretraining_tp": 2, "slow_but_exact": True}),
        ("MPT", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}}),
    ],
)
def test_settings_of_a_layer_are_kept(name, changes):
    model = build(BY_NAME[name], **changes)
    expected = output(model, name)
    assert (expected - output(model_of(name), name)).abs().max() > 1e-3, "the setting changes nothing"
    model.set_attn_implementation("fastattn")
    torch.testing.assert_close(output(model, name), expected)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", ["MPT", "Falcon"])
def test_mask_of_the_caller_is_read(name, kind):
    """Four axes; boolean True = may attend, as with all families, where MPT's own layers hide what is True."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = inputs_of(name, "none")["input_ids"]
    with torch.no_grad():
        expected = model_of(name)(input_ids=ids, attention_mask=numbers).logits
        given = mask if kind == "boolean" else numbers
        actual = model_with(name, "fastattn")(input_ids=ids, attention_mask=given).logits
    torch.testing.assert_close(actual, expected)


# --------------------------------------------------------------------------------------------------- what they return


def test_weights_of_wavlm_are_the_mean_of_all_heads():
    weights = []
    for implementation in ("fastattn", "eager"):
        with torch.no_grad():
            model = model_with("WavLM", implementation)
            weights.append(model(**inputs_of("WavLM", "right"), output_attentions=True).attentions)
    assert len(weights[0]) == 2
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", OWN)
def test_weights_are_not_computed_unless_asked_for(name):
    with watching() as watch:
        output(model_with(name, "fastattn"), name)
    assert not any(words.get("need_weights") for words in watch.calls)


def test_falcons_alibi_is_added_once(monkeypatch):
    """transformers' ``"eager"`` adds it to the scores and, with the mask, again: with half of it, it is right."""
    name, make = "Falcon (ALiBi)", modeling_falcon.build_alibi_tensor
    found = {}
    for implementation, dtype in (("fastattn", None), ("eager", torch.float64), ("eager", torch.float32)):
        if implementation == "eager":
            monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", lambda *a, **k: make(*a, **k) / 2)
        model = model_with(name, implementation, dtype=dtype or torch.float32)
        inputs = inputs_of(name, "none")
        with torch.no_grad(), InFloat64() if dtype == torch.float64 else torch.no_grad():
            result = model(**inputs, output_attentions=True)
        found[implementation, dtype] = torch.stack([*result.attentions]), result.logits
    truth, peer = found["eager", torch.float64], found["eager", torch.float32]
    for index, what in enumerate(("weights", "logits")):
        assert_within_budget(found["fastattn", None][index], truth=truth[index], peer=peer[index], name=what)
    monkeypatch.undo()
    with fastattn.use_backend("torch"), torch.no_grad():
        twice = model_with(name, "eager")(**inputs_of(name, "none")).logits
    assert (twice - found["fastattn", None][1]).abs().max() > 0.01
