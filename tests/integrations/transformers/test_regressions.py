"""Models and calls that were once silently wrong beside "eager"."""

import itertools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fastattn.integrations.transformers import masks, register  # noqa: E402, needs transformers
from fastattn.integrations.transformers.attention import attention_forward  # noqa: E402
from fastattn.testing import random_tensor  # noqa: E402
from tests.integrations.transformers.families import tokens  # noqa: E402
from tests.integrations.transformers.harness import said_by  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")
ENCODER = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def outputs(model: str, config: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The first output of a tiny model, with "eager" and with this package."""
    found = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(0)
        built = getattr(transformers, model)._from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            found.append(built(**inputs)[0])
    return found


@pytest.mark.parametrize("name", ["Align", "Clap", "Splinter"])
def test_layers_that_do_not_say_so_are_not_causal(name):
    """Encoders whose layers have no ``is_causal``, without padding."""
    model = "SplinterModel" if name == "Splinter" else f"{name}TextModel"
    config = getattr(transformers, model.replace("Model", "Config"))(**ENCODER)
    expected, actual = outputs(model, config, {"input_ids": tokens(seed=0)})
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [7, 8, 9])
def test_inclusive_window_that_hides_nothing_hides_nothing(window):
    """T5Gemma's encoder sees ``window`` tokens on each side, and tells its layers the same number; 9 are read."""
    words = ENCODER | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": window}
    parts = [
        transformers.T5GemmaModuleConfig(**words, layer_types=["sliding_attention", "full_attention"]) for _ in range(2)
    ]
    config = transformers.T5GemmaConfig(encoder=parts[0], decoder=parts[1], is_encoder_decoder=False)
    expected, actual = outputs("T5GemmaEncoderModel", config, {"input_ids": tokens(seed=0)})
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_layer_that_does_not_say_so_is_asked_for_it_in_a_graph():
    query = random_tensor(1, 2, 3, 4, seed=0)
    layer: Any = torch.nn.Module()
    with pytest.raises(ValueError, match="without the attribute is_causal"):
        torch.jit.trace(lambda q: attention_forward(layer, q, q, q, None)[0], query)
    layer.is_causal = False
    torch.jit.trace(lambda q: attention_forward(layer, q, q, q, None)[0], query)


def test_weights_are_as_wide_as_the_cache():
    """Of a static cache, whose empty places no query sees."""
    query, key = random_tensor(2, 1, 4, 8, seed=0), random_tensor(2, 1, 12, 8, seed=1)
    mask = masks.attention_mask(2, 4, 12)
    assert isinstance(mask, masks.LazyMask) and mask.keys == 4
    for average in (False, True):
        words = {"output_attentions": True, "average_attn_weights": average}
        _, weights = attention_forward(torch.nn.Module(), query, key, key, mask, **words)
        assert weights is not None and torch.equal(weights.view(2, 1, 4, 12) > 0, mask.exact())


def test_exact_mask_is_that_of_when_the_mask_was_made():
    """A static cache counts its tokens in place, between the mask and a layer that reads it, as those of Doge do."""
    offset = torch.tensor(3)
    mask = masks.attention_mask(2, 4, 12, q_offset=offset)
    assert isinstance(mask, masks.LazyMask)
    expected = mask.exact().clone()
    offset.add_(4)
    assert torch.equal(mask.exact(), expected)


def test_gradients_of_each_sample_with_padding():
    """Under ``torch.func.vmap``, where no numbers may be read."""
    ids, mask = tokens(seed=0), torch.ones(2, 9, dtype=torch.long)
    mask[0, -3:] = 0
    found = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**ENCODER)
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()

        def loss(parameters, row, seen, model=model):
            inputs = {"input_ids": row[None], "attention_mask": seen[None], "use_cache": False}
            return torch.func.functional_call(model, parameters, (), inputs).logits[0, :6].square().sum()

        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, ids, mask))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "reason"), [("DeepseekV4", "appends numbers to"), ("NllbMoe", "reads")])
def test_model_that_takes_masks_for_numbers_is_refused(name, reason):
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name}Model {reason} masks"):
        getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="fastattn")


@pytest.mark.parametrize("padded", [False, True])
def test_layer_that_adds_padding_to_scores_raises(padded):
    """The encoder of BigBird-Pegasus, beside a decoder that is ours."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    config = transformers.BigBirdPegasusConfig(
        **sizes, vocab_size=61, encoder_attention_heads=4, decoder_attention_heads=4, attention_type="original_full"
    )
    inputs = {"input_ids": tokens(seed=0), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    if padded:
        inputs["attention_mask"][0, -3:] = 0
    with pytest.raises(ValueError, match=r"a boolean mask .* is added to scores"):
        outputs("BigBirdPegasusModel", config, inputs)


WRITES = {
    "masked_fill_": lambda mask: mask.masked_fill_(torch.arange(5) == 0, False),
    "and": lambda mask: mask.__iand__(torch.arange(5) != 0),
    "item": lambda mask: mask[..., 0].fill_(False),
    "slice": lambda mask: mask.__setitem__((..., slice(1)), False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_a_mask_counts(write):
    visible = torch.ones(2, 5, dtype=torch.bool)
    visible[0, -1] = False
    mask = masks.attention_mask(2, 5, 5, attention_mask=visible)
    assert isinstance(mask, masks.LazyMask)
    expected = mask.exact().clone()
    expected[..., 0] = False
    write(mask)
    assert torch.equal(mask & True, expected)
    query = random_tensor(2, 1, 5, 4, seed=0)
    _, weights = attention_forward(torch.nn.Module(), query, query, query, mask, output_attentions=True)
    assert weights is not None and torch.equal(weights > 0, expected)


@pytest.mark.parametrize("name", ["fastattn_again", "sdpa"])
@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_registrations_are_undone_in_any_order(name, order):
    mappings = [each._global_mapping for each in (transformers.AttentionInterface, transformers.AttentionMaskInterface)]
    before = [functions.get(name) for functions in mappings]
    registrations = [register(name) for _ in order]
    ours = [functions[name] for functions in mappings]
    for index in order:
        assert [functions[name] for functions in mappings] == ours
        registrations[index].undo()
    assert [functions.get(name) for functions in mappings] == before


def test_transformers_is_as_it_was_when_nothing_is_registered():
    code = (
        "import transformers\n"
        "from fastattn.integrations.transformers import register\n"
        "before = transformers.PreTrainedModel.get_correct_attn_implementation\n"
        "one, other = register(), register('sdpa')\n"
        "assert transformers.PreTrainedModel.get_correct_attn_implementation is not before\n"
        "one.undo(), other.undo()\n"
        "assert transformers.PreTrainedModel.get_correct_attn_implementation is before\n"
    )
    said_by(code)
