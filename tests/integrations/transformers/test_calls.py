"""What else is done with models: checkpointing, dropout, packed rows, masks of the caller's, weights."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastattn.testing import assert_within_budget
from tests.integrations.transformers.families import BATCH, BY_NAME, FAMILIES, LENGTH, tokens
from tests.integrations.transformers.harness import (
    InFloat64,
    assert_results_within_budget,
    drawn,
    eager,
    inputs_of,
    model_with,
    watching,
)

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("registered")]


def budgets(name, padding):
    return {"truth": eager(name, padding, torch.float64), "peer": eager(name, padding), "feature": name}


# ------------------------------------------------------------------------------------------------------ checkpointing

CHECKPOINTED = ["Llama", "Gemma 2", "GPT-OSS", "BERT", "T5", "ViT", "Whisper", "Mllama", "BLOOM", "MPT", "Falcon",
                "Falcon (ALiBi)", "WavLM"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # in newer ones
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_model_matches_eager(name, reentrant):
    if name == "WavLM" and reentrant:
        pytest.skip("its backward does not end with eager attention, either")

    def checkpoint(model):
        model.train()  # without dropout, of which the tiny models have none
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            for word in ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "dropout_prob"):
                if isinstance(getattr(part, word, None), float):
                    setattr(part, word, 0.0)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    padding = BY_NAME[name].pads[-1]
    with watching() as watch:
        actual = drawn(name, padding, "fastattn", prepare=checkpoint)
    assert len(watch.calls) > len(actual.output) * BY_NAME[name].calls, "nothing was computed again"
    assert_results_within_budget(actual, **budgets(name, padding))
    assert watch.exact_masks == 0


def test_dropout_of_the_model_arrives():
    inputs = inputs_of("Llama", "right")
    model = model_with("Llama", "fastattn")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    for training in (True, False):
        model.train(training)
        with watching() as watch, torch.no_grad():
            model(**inputs)
        assert {words["dropout_p"] for words in watch.calls} == {0.4 * training}


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 3", "Qwen3"])
def test_packed_rows_are_as_apart(name):
    """Several sequences in one row, told apart by positions that start anew: no mask ``[B, 1, L, S]``, and no leak."""
    lengths = (2, 6, 1, 5)
    row = tokens(seed=5, length=sum(lengths))[:1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model = model_with(name, "fastattn")
    with watching() as watch, torch.no_grad():
        packed = model(row, position_ids=positions, use_cache=False).logits
    assert watch.exact_masks == 0 and "documents" in watch.carried
    outputs = {}
    for implementation, dtype in (("eager", torch.float32), ("eager", torch.float64)):
        model = model_with(name, implementation, dtype=dtype)
        with torch.no_grad(), InFloat64() if dtype == torch.float64 else torch.no_grad():
            outputs[dtype] = torch.cat([model(part).logits for part in row.split(lengths, dim=1)], dim=1)
    assert_within_budget(packed, truth=outputs[torch.float64], peer=outputs[torch.float32], name="packed", feature=name)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", ["Llama", "BERT", "GPT-2"])
def test_mask_of_the_caller_matches_eager(name, kind):
    """Four axes: transformers hands it to attention as it is."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    outputs = []
    for implementation, dtype in (
        ("fastattn", torch.float32),
        ("eager", torch.float64),
        ("eager", torch.float32),
    ):
        added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        given = mask if kind == "boolean" and implementation == "fastattn" else added
        inputs = {"input_ids": tokens(seed=0), "attention_mask": given}
        with torch.no_grad(), InFloat64() if dtype == torch.float64 else torch.no_grad():
            outputs.append(model_with(name, implementation, dtype=dtype)(**inputs).logits)
    assert_within_budget(outputs[0], truth=outputs[1], peer=outputs[2], name="logits", feature=name)


@pytest.mark.parametrize(
    "name", [family.name for family in FAMILIES if family.kind in ("decoder", "encoder") and family.peer == "eager"]
)
def test_weights_of_each_layer_match_eager(name):
    """Where a call asks for them, which transformers allows with any implementation."""
    inputs = inputs_of(name, "right")
    seen = inputs["attention_mask"].bool()
    weights = []
    for implementation, dtype in (("fastattn", torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        model = model_with(name, implementation, dtype=dtype)
        given = inputs_of(name, "right", dtype=dtype)
        with torch.no_grad(), InFloat64() if dtype == torch.float64 else torch.no_grad():
            weights.append(model(**given, output_attentions=True).attentions)
    for layers in zip(*weights):
        rows = [layer.transpose(1, 2)[:, :LENGTH][seen] for layer in layers]
        assert_within_budget(rows[0], truth=rows[1], peer=rows[2], name="weights", feature=name)


def test_averaged_weights_are_the_mean_over_heads():
    inputs = inputs_of("Llama", "right")
    del inputs["labels"]
    model = model_with("Llama", "fastattn")
    with torch.no_grad():
        each = model(**inputs, output_attentions=True).attentions
        mean = model(**inputs, output_attentions=True, average_attn_weights=True).attentions
    for one, other in zip(each, mean):
        torch.testing.assert_close(other, one.mean(dim=1))
