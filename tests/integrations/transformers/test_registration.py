"""``register``: under which names transformers finds this package, until when, and what is refused."""

from typing import Any

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fastattn.integrations.transformers import attention, register  # noqa: E402, needs transformers
from tests.integrations.transformers.harness import said_by  # noqa: E402

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def mistral(implementation: str):
    config = transformers.MistralConfig(**SIZES, sliding_window=6)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def _torch_backend():
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that attention of this package is called with by models."""
    seen, attend = [], attention.attention
    monkeypatch.setattr(
        attention, "attention", lambda query, *a, **k: (seen.append(query.shape), attend(query, *a, **k))[1]
    )
    return seen


def test_name_is_known_until_undone(calls):
    """A name of its own: who else runs in this process may have registered the other for good."""
    ids = torch.arange(5, 15)[None]
    expected = mistral("eager")(ids).logits
    with register("ours"):
        model = mistral("ours")
        torch.testing.assert_close(model(ids).logits, expected)
        model.set_attn_implementation("sdpa")
        model(ids)
        assert len(calls) == 2
        model.set_attn_implementation("ours")
    with pytest.raises(KeyError, match="ours"):
        model(ids)
    with pytest.raises(ValueError, match="ours"):
        mistral("ours")


def test_name_goes_back_to_what_had_it(calls):
    ids, model = torch.arange(5, 15)[None], mistral("sdpa")
    expected = model(ids).logits
    with register("sdpa") as outer:
        with register("sdpa"):
            torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(model(ids).logits, expected)
    assert len(calls) == 4
    outer.undo()  # a second time
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("name", "error"),
    [("flash", ValueError), ("paged|x", ValueError), ("eager", ValueError), ("", ValueError), (3, TypeError)],
)
def test_names_that_transformers_reads_otherwise_are_refused(name, error):
    with pytest.raises(error, match=r"name"):
        register(name)


def test_register_says_what_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastattn.integrations.transformers as integration\n"
        "try: integration.register()\n"
        "except ImportError as error: print(error)"
    )
    assert said_by(code) == "transformers is not installed: pip install 'fastattn[hf]'\n"


def test_importing_the_integration_imports_no_transformers():
    code = "import sys, fastattn.integrations.transformers; print('transformers' in sys.modules)"
    assert said_by(code) == "False\n"


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="before 5.24 continuous batching finds no memory on a CPU without psutil",
)
def test_continuous_batching_runs_on_ours_under_the_name_that_it_takes(calls):
    """Its paged cache puts the tokens of all requests in one row; windows and sequences are in the masks it makes."""
    model = mistral("sdpa")
    config = transformers.ContinuousBatchingConfig(
        num_blocks=16, page_size=32, max_batch_tokens=64, allow_block_sharing=False, cpu_offload_space=0.0
    )
    words = {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": config,
        "progress_bar": False,
    }
    prompts = [[5, 6, 7, 8], list(range(9, 19)), [20, 21]]
    expected = [
        list(model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, eos_token_id=-1)[0, len(p) :])
        for p in prompts
    ]
    with register("sdpa"):
        found = model.generate_batch(prompts, **words)
        assert [r.generated_tokens for r in found.values()] == expected
        assert (1, 4, 16, 8) in calls, "the prompts of all requests, together"
    with register(), pytest.raises(ValueError, match="fastattn is not supported for continuous batching"):
        mistral("fastattn").generate_batch(prompts, **words)


@pytest.mark.parametrize("name", ["indices", "block_indices", "block_table"])
def test_arguments_that_select_keys_are_refused(name):
    query = torch.zeros(1, 2, 3, 4)
    words: dict[str, Any] = {name: torch.zeros(1, dtype=torch.long)}
    with pytest.raises(NotImplementedError, match=f"{name}: Linear selects keys by it"):
        attention.attention_forward(torch.nn.Linear(1, 1), query, query, query, None, **words)


@pytest.mark.parametrize("average", [False, True])
def test_sinks_of_each_row_take_their_share(average):
    """As in Inkling 2, whose layers compute a sink for each query from the hidden state."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    sinks = torch.randn(2, 4, 5, 1, generator=generator, dtype=torch.float64)
    scores = torch.cat([query @ key.mT / 8**0.5, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., :-1]
    words: dict[str, Any] = {"is_causal": False, "output_attentions": True, "average_attn_weights": average}
    found, found_weights = attention.attention_forward(torch.nn.Module(), query, key, value, None, sinks=sinks, **words)
    torch.testing.assert_close(found, (weights @ value).transpose(1, 2))
    torch.testing.assert_close(found_weights, weights.mean(dim=1) if average else weights)
    without, nothing = attention.attention_forward(
        torch.nn.Module(), query, key, value, None, sinks=sinks, is_causal=False
    )
    torch.testing.assert_close(without, found)
    assert nothing is None
