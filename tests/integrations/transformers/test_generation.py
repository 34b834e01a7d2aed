"""Generation with ``attn_implementation="fastattn"``: the tokens of ``"eager"``, from logits within its budget."""

import contextlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastattn.testing import assert_within_budget
from tests.integrations.transformers.families import BY_NAME, FAMILIES
from tests.integrations.transformers.harness import InFloat64, inputs_of, model_with, watching

NAMES = [family.name for family in FAMILIES if family.generates]
NEW = 6
WAYS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "no_cache": {"use_cache": False},
}

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("registered", "family")]


def generate(name, implementation, dtype=torch.float32, **words):
    """Tokens ``[B, n]``, and the logits they were chosen by, of a prompt with padding at its left."""
    inputs = inputs_of(name, BY_NAME[name].pads[-1], dtype=dtype)
    for word in ("labels", "position_ids"):
        inputs.pop(word, None)
    torch.manual_seed(0)
    with torch.no_grad(), InFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        result = model_with(name, implementation, dtype=dtype).generate(
            **inputs,
            **{"do_sample": False, **words},
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_those_of_eager(name, way):
    if (name, way) == ("Falcon (ALiBi)", "static"):
        pytest.skip("transformers hands it a mask of four axes, of which it cannot make ALiBi")
    with watching() as watch:
        tokens, logits = generate(name, "fastattn", **WAYS[way])
    peers, peer = generate(name, BY_NAME[name].peer, **WAYS[way])
    truths, truth = generate(name, BY_NAME[name].peer, torch.float64, **WAYS[way])
    assert len(watch.calls) > NEW
    if way != "static":  # where one query's row of the mask is made, since nobody reads the cache's length
        assert watch.exact_masks == 0
    assert torch.equal(tokens, peers)
    assert torch.equal(tokens, truths)
    assert_within_budget(logits, truth=truth, peer=peer, name="logits", feature=name, backend="transformers")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "GPT-OSS", "Llama 4"])
def test_prompt_may_be_read_in_chunks(name):
    """Each chunk sees the cache before it: its queries stand behind the first key."""
    tokens, logits = generate(name, "fastattn", prefill_chunk_size=4)
    peers, peer = generate(name, "eager")
    truth = generate(name, "eager", torch.float64)[1]
    assert torch.equal(tokens, peers)
    assert_within_budget(logits, truth=truth, peer=peer, name="logits", feature=name, backend="transformers")
