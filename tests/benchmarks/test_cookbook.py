"""The cookbook: each function against its other form in value and gradients, in FlexAttention, and on its page."""

import contextlib
import inspect
import io
import warnings
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastattn
from benchmarks.__main__ import main
from benchmarks.cookbook import masks, page, scores
from benchmarks.cookbook.examples import EXAMPLES, by_name, learned
from benchmarks.cookbook.words import bucket_bias
from benchmarks.families import functions
from benchmarks.families.functions import FAMILY, FunctionCase, inputs
from benchmarks.measure.accuracy import Gate

EVERY_EXAMPLE = pytest.mark.parametrize("name", [example.name for example in EXAMPLES])
TEXT = page.PAGE.read_text()


def case_of(name, device="cpu", **options):
    """Small, no multiple of a tile, and with several heads and sequences, which captured tensors tell apart."""
    return FunctionCase("functions", name, 2, 2, 43, 16, backward=True, device=str(device), **options)


# ------------------------------------------------------------------------------------------- beside another definition


@EVERY_EXAMPLE
def test_function_says_what_its_words_say(name):
    """In plain torch and float64: the function of all pairs at once, and the reference of what replaces it.

    The noise is the quotient of two integers, which torch makes in float32.
    """
    case = case_of(name, dtype=torch.float64)
    found = FAMILY.variant("eager").build(case, case.dtype)()
    truth = functions.definition(case, case.dtype)()
    for result, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 if name == "logit_noise" else 1e-11)


@EVERY_EXAMPLE
@pytest.mark.usefixtures("poisoned")
def test_value_and_all_gradients_match_the_reference(name, backend, device):
    case = case_of(name, device)
    ours = FAMILY.variant("fastattn")
    with fastattn.use_backend(backend):
        accuracy = Gate(FAMILY, case).check(ours.build(case, case.dtype), ours)
    assert accuracy.passed, accuracy


@pytest.mark.parametrize("name", [e.name for e in EXAMPLES if learned(inputs(case_of(e.name), torch.float32)[1])])
def test_captured_gradients_are_the_same_in_every_run(name, backend, device):
    case = case_of(name, device)
    with fastattn.use_backend(backend):
        step = FAMILY.variant("fastattn").build(case, case.dtype)
        first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------ beside FlexAttention


def asked_of_flex(name, device="cpu") -> tuple[Any, dict[str, Any]]:
    """Query, key and value in float64 on this device, and the keyword arguments of FlexAttention."""
    case = case_of(name, device)
    qkv, captured = inputs(case, torch.float64)
    arguments = by_name(name).arguments(captured)
    if "mask_mod" in arguments:
        sizes = case.batch, case.heads, case.queries, case.seqlen
        return qkv, {"block_mask": create_block_mask(arguments["mask_mod"], *sizes, device=case.device)}
    return qkv, arguments


@EVERY_EXAMPLE
def test_torch_flex_attention_takes_the_function_as_it_is(name):
    qkv, arguments = asked_of_flex(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # that it makes all scores where it is not compiled
        found = flex_attention(*qkv, **arguments)
    truth, *_ = functions.definition(case_of(name), torch.float64)()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5 if name == "logit_noise" else 1e-11)


@EVERY_EXAMPLE
def test_drop_in_takes_what_flex_attention_takes(name, device):
    qkv, arguments = asked_of_flex(name, device)
    _, captured = inputs(case_of(name, device), torch.float64)
    calls = {"flex_attention": arguments, "attention": by_name(name).arguments(captured)}
    with fastattn.use_backend("torch"):
        found, expected = (getattr(fastattn, call)(*qkv, **words) for call, words in calls.items())
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------------- by hand


def seen(mask_mod, queries, keys):
    """``[L, S]`` of the first sequence and head."""
    zero = torch.tensor(0)
    rows = [[bool(mask_mod(zero, zero, torch.tensor(i), torch.tensor(j))) for j in range(keys)] for i in range(queries)]
    return torch.tensor(rows).int().tolist()


def test_tree_by_hand():
    """0 has the children 1 and 3, and 1 has the child 2."""
    found = seen(masks.tree(torch.tensor([[4, 3, 3, 4]])), 4, 4)
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_speculative_decoding_by_hand():
    """Draft 0 has the children 1 and 2, and 2 has the child 3, behind a context of two keys; the last key is stale."""
    mask_mod = masks.speculative_decoding(torch.tensor([[0, 0, 0, 2]]), torch.tensor([2]), depth=2)
    assert seen(mask_mod, 4, 7) == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 1, 0],
    ]


def test_buckets_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    length, table = 300, torch.arange(32.0)[:, None]
    positions = torch.arange(length)
    expected = modeling.T5Attention._relative_position_bucket(positions - positions[:, None]).float()
    rows = torch.zeros(1, 1, length, 1)
    bias = scores.t5_bias(table)(torch.tensor(0.0), 0, 0, positions[:, None], positions)
    assert torch.equal(bias, expected)
    assert torch.equal(bucket_bias(rows, rows, table)["attn_mask"][0], expected)


def test_noise_is_of_unit_variance_and_its_neighbours_know_nothing_of_one_another():
    positions, heads = torch.arange(400), torch.arange(2)[:, None, None]
    noise = scores.logit_noise(torch.tensor(1.0), torch.tensor(3))(0.0, 0, heads, positions[:, None], positions)
    other = scores.logit_noise(torch.tensor(1.0), torch.tensor(4))(0.0, 0, heads, positions[:, None], positions)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.01
    pairs = [(noise[0], noise[1]), (noise[0], noise[0].T), (noise, other)]
    pairs += [(noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


# ------------------------------------------------------------------------------------------------------------- the page


def test_page_shows_the_functions_that_are_measured():
    assert page.written(TEXT) == TEXT, "`python -m benchmarks cookbook` writes it anew"
    assert len(page.blocks(TEXT)) == 1 + len(EXAMPLES)


def test_every_function_of_the_cookbook_is_an_example():
    of_modules = [f.__name__ for module in (masks, scores) for _, f in inspect.getmembers(module, inspect.isfunction)]
    assert sorted(of_modules) == sorted(example.name for example in EXAMPLES)


def test_page_is_written_by_a_command(tmp_path, monkeypatch):
    spoiled = tmp_path / "cookbook.md"
    spoiled.write_text(TEXT.replace("prefix_lengths[batch]", "0"))
    monkeypatch.setattr(page, "PAGE", spoiled)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["cookbook"]) == 0
    assert spoiled.read_text() == TEXT
    assert "written anew" in said.getvalue()
