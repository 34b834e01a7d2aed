"""What all models do with their arguments: bad ones are refused by name; generation evaluates, under autocast too."""

import copy
import dataclasses
import math
from typing import Any, cast

import pytest
import torch

from fastattn.models import (
    AttentionDecoder,
    ConvNet,
    ImageCaptioner,
    Memory,
    PointwiseResidual,
    Seq2Seq,
    TransformerClassifier,
    TransformerConfig,
    TransformerEncoderDecoder,
    TransformerLanguageModel,
    TransformerTrunk,
)

VOCABULARY, SIZE = 5, (8, 12)
CONFIG = TransformerConfig(width=8, heads=2, layers=1, max_length=16, dropout=0.3)
KINDS = ["language_model", "encoder_decoder", "seq2seq", "seq2seq_without_attention", "captioner"]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Any:
    """A model, freshly made: in training mode."""
    torch.manual_seed(0)
    attention_dim = None if kind == "seq2seq_without_attention" else 6
    if kind == "language_model":
        return TransformerLanguageModel(VOCABULARY, CONFIG)
    if kind == "encoder_decoder":
        return TransformerEncoderDecoder(VOCABULARY, VOCABULARY, CONFIG)
    if kind == "captioner":
        return ImageCaptioner(1, VOCABULARY, SIZE, channels=4, hidden=8, embedding=6)
    return Seq2Seq(VOCABULARY, VOCABULARY, hidden=8, embedding=6, attention_dim=attention_dim)


def read(kind: str) -> torch.Tensor:
    """What a model goes on from."""
    if kind == "captioner":
        return torch.randn(3, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    return ids(3, 4)


def say(model: Any, kind: str, **options: Any) -> Any:
    if kind != "language_model":
        options.setdefault("start", 1)
    found = model.generate(read(kind), options.pop("length", 6), **options)
    return found if isinstance(found, torch.Tensor) else found.tokens


def loss(model: Any, kind: str, target: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    if kind == "language_model":
        return model.loss(target, padding)
    if kind == "captioner":
        return model.loss(read(kind), target, padding)
    return model.loss(read(kind), target, None, padding)


every_kind = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------------------- generation evaluates


@every_kind
def test_generation_evaluates_and_restores_the_modes(kind):
    """Without dropout, batch norms untouched: in training it says what it says in evaluation. A part that was frozen
    stays so."""
    model = make(kind)
    frozen = list(model.modules())[-1].eval()
    before = copy.deepcopy(model.state_dict())
    said = [say(model, kind, length=12) for _ in range(3)]
    assert [module for module in model.modules() if not module.training] == [frozen]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = say(model.eval(), kind, length=12)
    assert all(torch.equal(one, expected) for one in said)
    assert not any(module.training for module in model.modules())


def test_modes_are_restored_after_an_error():
    model = make("language_model")
    with pytest.raises(ValueError, match="max_length=16"):
        model.generate(ids(1, 4), 20)
    assert all(module.training for module in model.modules())


@every_kind
def test_training_step_and_generation_under_autocast(kind):
    """Near what they are in float32: bfloat16 has 8 bits, and these are short sums of numbers below 2."""
    model, target = make(kind).eval(), ids(3, 5)
    expected = loss(model, kind, target).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(model, kind, target)
        tokens = say(model, kind)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=2**-5)
    assert tokens.shape == say(model, kind).shape
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_cache_keeps_no_graph_of_the_memory():
    model = make("encoder_decoder")
    memory = model.encoder(ids(2, 4))
    assert memory.requires_grad
    (kept,) = model.decoder.new_cache(2, memory).memory
    assert not any(tensor.requires_grad for tensor in kept)


def test_weights_of_nothing_said_are_empty():
    found = make("seq2seq").generate(ids(3, 4), 0, start=1, need_weights=True)
    assert found.weights.shape == (3, 0, 4)


# ------------------------------------------------------------------------------------------------------- bad arguments


TAKES = {
    "language_model": {"length", "end", "temperature", "beam", "page_size"},
    "encoder_decoder": {"length", "end", "temperature", "start", "beam", "page_size"},
    "seq2seq": {"length", "end", "start", "beam"},
    "captioner": {"length", "end", "start", "beam"},
}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": -1}, ValueError, "length=-1: expected a number of at least 0"),
        ({"length": 2.5}, TypeError, "length=2.5: expected an int, got float"),
        ({"end": -1}, ValueError, "end=-1: expected a token from 0 to 4"),
        ({"end": 99}, ValueError, "end=99: expected a token from 0 to 4"),
        ({"start": 5}, ValueError, "start=5: expected a token from 0 to 4"),
        ({"start": 0.0}, TypeError, "start=0.0: expected an int, got float"),
        ({"beam": 0}, ValueError, "beam=0: expected a number of at least 1"),
        ({"beam": 2, "temperature": 0.5}, ValueError, "beam=2, temperature=0.5: a beam search draws nothing"),
        ({"page_size": 0}, ValueError, "page_size=0: expected a number of at least 1"),
        ({"temperature": "1"}, TypeError, "temperature='1': expected a number, got str"),
        ({"temperature": math.nan}, ValueError, "temperature=nan: expected 0 or a finite number"),
        ({"temperature": math.inf}, ValueError, "temperature=inf"),
        ({"temperature": -1.0}, ValueError, "temperature=-1"),
        ({"temperature": 1e-39}, ValueError, "temperature=1e-39"),
    ],
    ids=str,
)
def test_generation_refuses(options, error, message):
    kinds = [kind for kind, known in TAKES.items() if options.keys() <= known]
    assert kinds
    for kind in kinds:
        with pytest.raises(error, match=message):
            say(make(kind), kind, **options)


def test_any_other_temperature_is_drawn_with():
    """The lowest accepted one takes the likeliest, although the logits divided by it are beyond float32."""
    model = make("language_model")
    with torch.no_grad():
        model.head.bias.copy_(30.0 * torch.arange(VOCABULARY))
    expected = model.generate(ids(2, 3), 4)
    assert torch.equal(model.generate(ids(2, 3), 4, temperature=1.2e-38, seed=0), expected)
    assert model.generate(ids(2, 3), 4, temperature=1e30, seed=0).shape == (2, 7)


@every_kind
@pytest.mark.parametrize(
    ("target", "padding", "error", "message"),
    [
        (ids(3, 1), None, ValueError, r"has shape \(3, 1\): expected \[batch, at least 2\]"),
        (ids(3, 0), None, ValueError, r"has shape \(3, 0\)"),
        (ids(3), None, ValueError, r"has shape \(3,\)"),
        (ids(3, 4).double(), None, TypeError, "is torch.float64: expected int64 or int32"),
        (ids(3, 4), torch.ones(3, 4, dtype=torch.bool), ValueError, "one token behind the first that is no padding"),
        (ids(3, 4), torch.zeros(3, 4, dtype=torch.int64), TypeError, "is torch.int64: expected bool"),
        (ids(3, 4), torch.zeros(3, 3, dtype=torch.bool), ValueError, r"has shape \(3, 3\): expected \(3, 4\)"),
    ],
    ids=["one", "none", "flat", "floating", "all-padding", "integer-padding", "short-padding"],
)
def test_loss_refuses(kind, target, padding, error, message):
    with pytest.raises(error, match=message):
        loss(make(kind), kind, target, padding)


@every_kind
def test_loss_takes_int32(kind):
    model = make(kind).eval()
    assert torch.equal(loss(model, kind, ids(3, 5).int()), loss(model, kind, ids(3, 5)))


@pytest.mark.parametrize("kind", ["encoder_decoder", "seq2seq", "seq2seq_without_attention"])
def test_source_is_checked(kind):
    model, target = make(kind), ids(3, 4)
    for padding, error, message in (
        (torch.zeros(3, 3, dtype=torch.bool), ValueError, "padding has shape"),
        (torch.zeros(1, 4, dtype=torch.bool), ValueError, "padding has shape"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "padding is torch.int64: expected bool"),
    ):
        with pytest.raises(error, match=message):
            model(ids(3, 4), target, padding)
    for source, error, message in (
        (ids(3, 0), ValueError, r"source has shape \(3, 0\): expected \[batch, at least 1\]"),
        (ids(3), ValueError, r"source has shape \(3,\)"),
        (ids(3, 4).float(), TypeError, "source is torch.float32"),
        (ids(2, 4), ValueError, r"expected \[3, length, 8\]|expected \[2, at least 1\]"),
    ):
        with pytest.raises(error, match=message):
            model(source, target)
    with pytest.raises(ValueError, match=r"source has shape \(3, 0\)"):
        model.generate(ids(3, 0), 2, start=1)


def test_classifier_refuses_rows_without_tokens():
    model = TransformerClassifier(TransformerTrunk(VOCABULARY, CONFIG), 3)
    padding = torch.tensor([[False, True], [True, True]])
    with pytest.raises(ValueError, match=r"padding: rows \[1\] are all padding"):
        model(ids(2, 2), padding)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 0\)"):
        model(ids(2, 0))
    with pytest.raises(TypeError, match=r"padding is torch\.float32"):
        model(ids(2, 2), padding.float())


def test_memory_is_given_to_trunks_that_read_one():
    reader, plain = (TransformerTrunk(VOCABULARY, CONFIG, causal=True, reads_memory=r) for r in (True, False))
    memory = torch.zeros(2, 3, 8)
    for call in (lambda: reader(ids(2, 3)), lambda: reader.new_cache(2)):
        with pytest.raises(ValueError, match="memory=None: a trunk with reads_memory=True"):
            call()
    for call in (lambda: plain(ids(2, 3), memory=memory), lambda: plain.new_cache(2, memory)):
        with pytest.raises(ValueError, match="a trunk with reads_memory=False reads none"):
            call()
    with pytest.raises(ValueError, match=r"memory has shape \(2, 3, 8\): expected \[1, length, 8\]"):
        reader(ids(1, 3), memory=memory)
    with pytest.raises(ValueError, match=r"memory_padding has shape \(2, 2\): expected \(2, 3\)"):
        reader(ids(2, 3), memory=memory, memory_padding=torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 3}, ValueError, "width=8: heads=3 does not divide it"),
        ({"layers": 0}, ValueError, "layers=0: expected a number of at least 1"),
        ({"feed_forward": 0}, ValueError, "feed_forward=0"),
        ({"width": 8.0}, TypeError, "width=8.0: expected an int, got float"),
        ({"dropout": 1.5}, ValueError, "dropout=1.5: expected a probability"),
        ({"activation": "swish"}, ValueError, "activation='swish': expected 'relu' or 'gelu'"),
    ],
    ids=str,
)
def test_config_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: TransformerTrunk(0, CONFIG), "vocabulary=0"),
        (lambda: TransformerClassifier(TransformerTrunk(5, CONFIG), 0), "classes=0"),
        (lambda: Seq2Seq(0, 5), "source_vocabulary=0"),
        (lambda: AttentionDecoder(5, 4, hidden=0), "hidden=0"),
        (lambda: ImageCaptioner(1, 5, (-4, 8)), r"size=\(-4, 8\): expected positive multiples of 4"),
        (lambda: ImageCaptioner(1, 5, (8, 8), channels=5), "channels=5: expected a positive even number"),
        (lambda: ConvNet(1, 5, size=(0, 4)), r"size=\(0, 4\): expected positive multiples of 4"),
        (lambda: ConvNet(1, 5, size=(-4, -4)), r"size=\(-4, -4\)"),
        (lambda: ConvNet(1, 5, width=1), "width=1: expected a positive even number"),
        (lambda: PointwiseResidual(0), "channels=0"),
    ],
)
def test_models_refuse_sizes(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


@pytest.mark.parametrize("shape", [(2, 1, 12, 8), (2, 1, 8, 8), (2, 2, 8, 12), (1, 8, 12)], ids=str)
def test_images_of_another_shape_are_refused(shape):
    """Of as many pixels too: the positions would be those of other places."""
    for model in (make("captioner"), ConvNet(1, 5, size=SIZE)):
        with pytest.raises(ValueError, match=r"expected \[batch, 1, 8, 12\]"):
            model.features(torch.zeros(shape))
    with pytest.raises(ValueError, match="at least 4, at least 4"):
        ConvNet(1, 5)(torch.zeros(2, 1, 3, 8))


def test_decoder_refuses_tokens_of_another_batch():
    decoder = AttentionDecoder(5, 4, hidden=8)
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 3\): expected \[2, at least 1\]"):
        decoder(ids(1, 3), Memory(torch.zeros(2, 3, 4), torch.zeros(2, 4)))


def test_prompt_that_is_no_tensor_is_refused():
    model = TransformerLanguageModel(5, TransformerConfig(8, 2, 1))
    with pytest.raises(TypeError, match=r"prompt: expected a torch\.Tensor, got list"):
        model.generate(cast(Any, [[1, 2]]), 3)
