"""Models whose layers compute attention themselves: an error, or what they compute without us; never something else."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

import fastattn
from fastattn.integrations.transformers import masks, register
from tests.integrations.transformers.families import BY_NAME, NOT_REACHED
from tests.integrations.transformers.harness import inputs_of, model_of, model_with, real_output, watching

RAISING = [family.name for family in NOT_REACHED if family.remark.startswith("raises")]
SERVED = [family.name for family in NOT_REACHED if family.name not in RAISING]

pytestmark = pytest.mark.usefixtures("registered")


def loaded(name, implementation):
    """As when it is loaded: the implementation is said with the configuration."""
    family = BY_NAME[name]
    config = getattr(transformers, family.config)(**family.sizes)
    model = getattr(transformers, family.model)._from_config(config, attn_implementation=implementation).eval()
    model.load_state_dict(model_of(name).state_dict())
    return model


def output(model, name, padding):
    inputs = inputs_of(name, padding)
    with torch.no_grad():
        return real_output(model(**inputs), inputs)


@pytest.mark.parametrize("name", RAISING)
def test_model_that_would_misread_masks_is_refused(name):
    with pytest.raises(ValueError, match=rf"'fastattn': {BY_NAME[name].model} computes attention in its own layers"):
        loaded(name, "fastattn")


@pytest.mark.parametrize("name", RAISING)
def test_model_that_is_refused_stays_as_it_was(name):
    """Set later the name is not taken, of which transformers warns."""
    model = model_with(name, "fastattn")
    assert model.config._attn_implementation == "eager"
    with watching() as watch:
        assert torch.equal(output(model, name, "right"), output(model_of(name), name, "right"))
    assert not watch.calls


@pytest.mark.parametrize("name", SERVED)
def test_model_that_takes_the_name_computes_the_same(name):
    family = BY_NAME[name]
    with watching(elsewhere=True) as watch:
        actual = output(loaded(name, "fastattn"), name, "right")
    assert (len(watch.calls), watch.elsewhere.total()) == (family.calls, family.softmaxes)
    torch.testing.assert_close(actual, output(model_of(name), name, "right"))


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_layers_that_call_sdpa_are_reached_by_patch_sdpa(padding):
    model = loaded("Falcon", "sdpa")
    with fastattn.patch_sdpa() as patch:
        actual = output(model, "Falcon", padding)
    assert (patch.routed, patch.refused) == (2, {})
    torch.testing.assert_close(actual, output(model_of("Falcon"), "Falcon", padding))


def test_mask_that_is_added_to_scores_raises():
    """As layers do that were written for masks of numbers, where no class says so."""
    mask = masks.attention_mask(2, 5, 5)
    assert isinstance(mask, masks.LazyMask)
    with pytest.raises(ValueError, match=r"a boolean mask .* is added to scores"):
        torch.zeros(2, 4, 5, 5) + mask


def test_names_that_are_undone_are_not_asked_about():
    with register("fastattn_twice"), pytest.raises(ValueError, match="'fastattn_twice': XGLMForCausalLM computes"):
        loaded("XGLM", "fastattn_twice")
    with pytest.raises(ValueError, match='Specified `attn_implementation="fastattn_twice"` is not supported'):
        loaded("XGLM", "fastattn_twice")
