"""The three ways of processing sequences: causal, of the reach and the cost that theory gives them."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from benchmarks.cases import AttentionCase
from benchmarks.families import sequence
from benchmarks.families.sequence_models import full_reach
from benchmarks.measure.accuracy import Gate

CASE = AttentionCase("sequence", 3, 2, 37, 8, mask="causal")
WAYS = pytest.mark.parametrize("way", sequence.WAYS, ids=lambda way: way.name)
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])


@pytest.fixture(scope="module", autouse=True)
def _compiled_code_on_one_thread():
    """What is tested is the suite: Triton's interpreter would take minutes over it, and loops wait for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastattn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


def _way(name):
    return next(way for way in sequence.WAYS if way.name == name)


def _results(way, case, x):
    """Without gradients in evaluation, where torch's module takes its fast path, as in what is timed."""
    module = way.module(case, torch.float64)
    with torch.set_grad_enabled(case.backward):
        results = module(x)
    return [t.detach() for t in (results if isinstance(results, tuple) else (results,))]


def _input(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.batch, case.seqlen, case.embed_dim, dtype=torch.float64, generator=generator)


def _changes(way, case, position):
    """How much each position of each result changes with the input at one: ``[L]`` a result."""
    x = _input(case)
    other = x.clone()
    other[:, position] += 10.0 * _input(case, 1)[:, position]
    pairs = zip(_results(way, case, x), _results(way, case, other))
    return [(a - b).abs().amax(dim=(0, 2)) for a, b in pairs]


@WAYS
@DIRECTIONS
@pytest.mark.parametrize("position", [1, 20, 36])
def test_sequence_later_input_changes_no_earlier_output(way, backward, position):
    changes = _changes(way, dataclasses.replace(CASE, backward=backward), position)
    for change in changes:
        assert change[:position].max() < 1e-12
    assert changes[0][position] > 1e-3


@WAYS
def test_sequence_reach_is_what_theory_says(way):
    """The first token changes as many outputs as the way reaches, and not one more."""
    case = dataclasses.replace(CASE, seqlen=17)  # a plain RNN forgets by half a step
    change, *_ = _changes(way, case, 0)
    reach = way.reach(17)
    assert change[:reach].min() > 1e-9
    assert (change[reach:] < 1e-12).all()
    assert (way.longest_path(17) is None) == (reach < 17)


def test_sequence_tcn_has_the_fewest_layers_of_full_reach():
    assert full_reach(2) == 1
    for seqlen in range(2, 20000):
        layers = full_reach(seqlen)
        assert layers == math.ceil(math.log2((seqlen - 1) / 2 + 1))
        assert 2**layers - 1 < seqlen <= 2 ** (layers + 1) - 1


@DIRECTIONS
def test_sequence_attention_of_every_make_agrees(backward):
    """One function of the same parameters: outputs, gradients and averaged weights in float64."""
    case = dataclasses.replace(CASE, backward=backward)
    results = {w.name: w.build(case, torch.float64)() for w in sequence.WAYS if w.law is sequence.ATTENTION}
    averaged = {name: r[1] for name, r in results.items() if name.endswith("-weights")}
    assert len(results) == 6
    assert len(averaged) == 2
    expected = results["naive-attention"]
    assert len(expected) == (6 if backward else 1)  # the output and five gradients: x, two weights, two biases
    for name, (output, *rest) in results.items():
        gradients = rest[1:] if name in averaged else rest
        torch.testing.assert_close((output, *gradients), expected, rtol=1e-10, atol=1e-12, msg=name)
    ours, theirs = averaged["fastattn-weights"], averaged["nn.MultiheadAttention-weights"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))


@pytest.mark.parametrize(("naive", "fused"), [("naive-rnn", "nn.RNN"), ("naive-gru", "nn.GRU")])
def test_sequence_loop_agrees_with_torchs_recurrence(naive, fused):
    """A cell in a loop and torch's layer are one function: with the same parameters, the same states."""
    loop, layer = (_way(name).module(CASE, torch.float64) for name in (naive, fused))
    for of_loop, of_layer in zip(loop.parameters(), layer.parameters()):
        of_loop.data.copy_(of_layer)
    torch.testing.assert_close(loop(_input(CASE)), layer(_input(CASE)), rtol=1e-10, atol=1e-12)


# Not counted by torch: its inference path for attention, ours, and SDPA by its visible half
COUNTED = [way for way in sequence.WAYS if way.law is not sequence.ATTENTION]
COUNTED += [_way("naive-attention"), _way("nn.MultiheadAttention-weights")]


@pytest.mark.parametrize("way", COUNTED, ids=lambda way: way.name)
def test_sequence_flops_are_those_torch_counts(way):
    module = way.module(dataclasses.replace(CASE, backward=True), torch.float64)
    with FlopCounterMode(display=False) as counter:
        module(_input(CASE))
    assert counter.get_total_flops() == way.flops_per_token(CASE) * CASE.batch * CASE.seqlen


@WAYS
def test_sequence_work_is_that_of_the_variant(way):
    """All tokens of the forward, and three times that in training, where torch's module hides before it multiplies."""
    forward = sequence.work(CASE, way.name)
    assert forward.flops == way.flops_per_token(CASE) * 3 * 37
    assert forward.moved_bytes is None
    training = dataclasses.replace(CASE, backward=True)
    assert sequence.work(training, way.name).flops == 3 * way.flops_per_token(training) * 3 * 37


def test_sequence_work_in_symbols():
    def formula(name, backward=False):
        return sequence.FAMILY.work(dataclasses.replace(CASE, backward=backward), name).formula

    assert formula("nn.LSTM") == "flops B L (16 d^2)"
    assert formula("dilated-tcn", True) == f"flops B L ({3 * 6 * full_reach(37)} d^2)"
    assert formula("fastattn") == "flops B L (8 d^2 + 2 d (L + 1))"
    assert formula("fastattn", True) == "flops B L (24 d^2 + 6 d (L + 1))"
    assert formula("naive-attention") == "flops B L (8 d^2 + 4 d L)"


def test_sequence_theory_by_hand():
    """Width 256, 1024 tokens."""
    lines = {line["variant"]: line for line in sequence.theory(AttentionCase("sequence", 4, 8, 1024, 32))}
    assert json.loads(json.dumps(lines)) == lines
    assert list(lines) == [variant.name for variant in sequence.FAMILY.variants]
    square = 256**2

    def of(name):
        keys = ("parameters", "flops_per_token", "sequential_steps", "longest_path", "reach")
        return tuple(lines[name][key] for key in keys)

    assert of("naive-rnn") == of("nn.RNN") == (2 * square + 512, 4 * square, 1024, 1024, 1024)
    assert of("naive-gru") == of("nn.GRU") == (6 * square + 1536, 12 * square, 1024, 1024, 1024)
    assert of("nn.LSTM") == (8 * square + 2048, 16 * square, 1024, 1024, 1024)
    assert of("causal-conv") == (3 * square + 256, 6 * square, 1, None, 3)
    assert of("causal-conv-x4") == (12 * square + 1024, 24 * square, 4, None, 9)
    assert of("dilated-tcn") == (30 * square + 2560, 60 * square, 10, 10, 1024)
    whole, half = 4 * 1024 * 256, 2 * 1025 * 256
    assert of("naive-attention") == (4 * square + 1024, 8 * square + whole, 1, 1, 1024)
    assert of("fastattn") == of("qkv+sdpa") == (4 * square + 1024, 8 * square + half, 1, 1, 1024)
    laws = {name: (line["complexity_per_layer"], line["path_in_symbols"]) for name, line in lines.items()}
    assert laws["nn.LSTM"] == ("n d^2", "n")
    assert laws["causal-conv"] == ("k n d^2", "n/k")
    assert laws["dilated-tcn"] == ("k n d^2", "log_k n")
    assert laws["fastattn"] == ("n^2 d", "1")


def test_sequence_theory_needs_no_memory():
    """Parameters of the longest case are counted without its mask of 2^40 numbers."""
    assert sequence.theory(dataclasses.replace(CASE, seqlen=2**20))[0]["reach"] == 2**20


@WAYS
@DIRECTIONS
def test_sequence_variant_passes_the_gate(way, backward):
    case = dataclasses.replace(CASE, backward=backward)
    accuracy = Gate(sequence.FAMILY, case).check(way.build(case, case.dtype), sequence.FAMILY.variant(way.name))
    assert accuracy.passed, accuracy


def test_sequence_variants_say_why_they_refuse():
    def refusals(seqlen, **options):
        case = AttentionCase("sequence", max(1, 4096 // seqlen), 8, seqlen, 32, mask="causal")
        case = dataclasses.replace(case, **options)
        return {way.name: reason for way in sequence.WAYS if (reason := way.applies(case)) is not None}

    assert refusals(256) == refusals(256, backward=True) == {}
    assert set(refusals(1024)) == {"naive-rnn", "naive-gru"}
    loop = "a Python loop of 4096 steps: at most 256 are taken"
    assert refusals(4096) == {"naive-rnn": loop, "naive-gru": loop}
    long = refusals(8192)
    assert set(long) == {
        *("naive-rnn", "naive-gru", "naive-attention"),
        *("nn.MultiheadAttention", "nn.MultiheadAttention-weights"),
    }
    assert long["naive-attention"] == "L x L numbers take 4.0 GiB where float64 checks it: at most 2 GiB are taken"
    longest = refusals(16384, backward=True)
    assert "fastattn-weights" in longest
    assert not {"fastattn", "qkv+sdpa", "nn.MultiheadAttention", "nn.LSTM", "dilated-tcn"} & set(longest)
    assert len(refusals(128, mask="none")) == len(refusals(128, weights=True)) == len(sequence.WAYS)


def test_sequence_cases_keep_their_tokens():
    quick, more = sequence.quick_cases(), sequence.more_cases()
    assert {(case.seqlen, case.backward) for case in quick} == {(n, b) for n in (128, 256, 512) for b in (False, True)}
    assert {case.batch * case.seqlen for case in quick} == {1024}
    refused = {(way.name, case.seqlen) for case in quick for way in sequence.WAYS if way.applies(case)}
    assert refused == {("naive-rnn", 512), ("naive-gru", 512)}  # loops, of which shorter sequences say as much
    assert {case.seqlen for case in more} == {2**power for power in range(7, 15)}
    assert {case.batch * case.seqlen for case in more if case.seqlen <= 4096} == {4096}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", sequence.WAYS, ids=lambda way: way.name)
def test_sequence_gate_stops_results_of_nothing(way, dtype):
    """A long recurrence is allowed more, but never as much as zeros are off."""
    case = AttentionCase("sequence", 1, 1, 512, 8, mask="causal", dtype=dtype)
    variant = sequence.FAMILY.variant(way.name)
    zeros = tuple(torch.zeros_like(t) for t in variant.build(case, dtype)())
    assert not Gate(sequence.FAMILY, case).check(lambda: zeros, variant).passed


@pytest.mark.parametrize("name", ["fastattn", "nn.MultiheadAttention", "qkv+sdpa"])
def test_sequence_gate_stops_attention_that_sees_the_future(name):
    """All attention has one definition: a variant that is wrong in float64 as well does not pass against itself."""
    case = AttentionCase("sequence", 1, 2, 16, 8, mask="causal")
    variant = sequence.FAMILY.variant(name)
    way = next(way for way in sequence.WAYS if way.name == name)
    module = way.module(case, case.dtype)
    attention: Any = module.attention
    x = case.draw(1, 16, 16, dtype=case.dtype, generator=case.generator())
    with torch.no_grad():
        unmasked = attention(x, x, x, need_weights=False)[0]
        gate = Gate(sequence.FAMILY, case)
        assert gate.check(lambda: (module(x),) if isinstance(module(x), torch.Tensor) else module(x), variant).passed
        assert not gate.check(lambda: (unmasked,), variant).passed
