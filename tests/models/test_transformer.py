"""The transformer: who sees whom, padding, learning, fine-tuning, both backends."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.models.transformer import (
    TransformerClassifier,
    TransformerTrunk,
)
from fastattn.testing import assert_within_budget
from tests.models.transformer_cases import (
    CONFIG,
    LENGTH,
    SOURCE,
    VOCABULARY,
    encoder_decoder,
    language_model,
    source_and_padding,
    tokens,
)

NORMS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


# --------------------------------------------------------------------------------------------------- shapes, gradients


@NORMS
def test_language_model_gradients_reach_every_parameter(norm_first):
    model = language_model(norm_first)
    assert model(tokens(2, 7)).shape == (2, 7, VOCABULARY)
    model.loss(tokens(4, LENGTH + 1)[:, :LENGTH]).backward()
    _assert_every_parameter_learns(model)


@NORMS
def test_encoder_decoder_gradients_reach_every_parameter(norm_first):
    model, (source, padding) = encoder_decoder(norm_first), source_and_padding()
    assert model(source, tokens(3, 5), padding).shape == (3, 5, VOCABULARY)
    model.loss(source, tokens(3, LENGTH), padding).backward()
    _assert_every_parameter_learns(model)


@NORMS
@pytest.mark.parametrize("causal", [False, True])
def test_classifier_gradients_reach_every_parameter(norm_first, causal):
    torch.manual_seed(2)
    config = dataclasses.replace(CONFIG, norm_first=norm_first)
    model = TransformerClassifier(TransformerTrunk(VOCABULARY, config, causal=causal), 3).double()
    logits = model(tokens(8, LENGTH))
    assert logits.shape == (8, 3)
    F.cross_entropy(logits, torch.arange(8) % 3).backward()
    _assert_every_parameter_learns(model)


def _assert_every_parameter_learns(model):
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if name.endswith("in_proj_bias"):  # the keys' part adds the same to all scores of a row: softmax sees nothing
            gradient = gradient.view(3, -1)[[0, 2]]
        assert gradient.abs().max() > 1e-12, name


@NORMS
def test_block_is_the_lectures(norm_first):
    """Self-attention, residual, norm, an MLP on each vector, residual, norm; pre-norm moves the norms to the front."""
    model = language_model(norm_first)
    layer, x = model.trunk.layers[0], torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def attend(x):
        return layer.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0]

    def mlp(x):
        return layer.linear2(layer.linear1(x).relu())

    if norm_first:
        expected = x + attend(layer.norm1(x))
        expected = expected + mlp(layer.norm2(expected))
    else:
        expected = layer.norm1(x + attend(x))
        expected = layer.norm2(expected + mlp(expected))
    torch.testing.assert_close(layer(x, mask, is_causal=True), expected, rtol=0, atol=1e-13)


def test_last_norm_is_that_of_a_pre_norm_stack():
    assert isinstance(language_model(True).trunk.norm, fastattn.AddLayerNorm)
    assert isinstance(language_model(False).trunk.norm, nn.Identity)


# ------------------------------------------------------------------------------------------------------- who sees whom


@NORMS
def test_language_model_sees_no_later_token(norm_first):
    model, x = language_model(norm_first), tokens(2, LENGTH)
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    assert torch.equal(model(changed)[:, :7], model(x)[:, :7])
    assert not torch.isclose(model(changed)[:, 7:], model(x)[:, 7:]).all(-1).any()


def test_encoder_sees_everything():
    torch.manual_seed(3)
    trunk, x = TransformerTrunk(VOCABULARY, CONFIG).double(), tokens(1, LENGTH)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.isclose(trunk(changed % VOCABULARY), trunk(x)).all(-1).any()


@NORMS
def test_causal_mask_is_the_same_with_padding_and_without(norm_first):
    """Without padding the layers are promised a causal mask and given one element; with it, they read all of it."""
    model, x = language_model(norm_first), tokens(2, LENGTH)
    torch.testing.assert_close(model(x, torch.zeros_like(x, dtype=torch.bool)), model(x), rtol=0, atol=1e-13)


@NORMS
def test_padding_changes_nothing(norm_first):
    """Whatever stands in it, and however long it is; in all models."""
    x, padding = tokens(3, LENGTH), torch.arange(LENGTH) >= torch.tensor([[5], [5], [5]])
    other = torch.where(padding, (x + 3) % VOCABULARY, x)
    language = language_model(norm_first)
    torch.testing.assert_close(language(other, padding)[:, :5], language(x[:, :5]), rtol=0, atol=1e-13)
    torch.testing.assert_close(language.loss(other, padding), language.loss(x[:, :5]), rtol=0, atol=1e-13)

    for causal in (False, True):
        torch.manual_seed(4)
        config = dataclasses.replace(CONFIG, norm_first=norm_first)
        classifier = TransformerClassifier(TransformerTrunk(VOCABULARY, config, causal=causal), 3).double()
        torch.testing.assert_close(classifier(other, padding), classifier(x[:, :5]), rtol=0, atol=1e-13)

    model, (source, hidden) = encoder_decoder(norm_first), source_and_padding()
    whole = model(source, x, hidden)
    for row, length in enumerate((7, 4, 1)):
        alone = model(source[row : row + 1, :length], x[row : row + 1])
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-13)
    loss = model.loss(source, other, hidden, padding)
    torch.testing.assert_close(loss, model.loss(source, x[:, :5], hidden), rtol=0, atol=1e-13)


def test_positions_tell_the_order_of_tokens():
    """Without them an encoder's mean could not tell a sequence from itself reversed."""
    torch.manual_seed(5)
    model, x = TransformerClassifier(TransformerTrunk(VOCABULARY, CONFIG), 3).double(), tokens(4, LENGTH)
    assert not torch.isclose(model(x), model(x.flip(1))).any()
    model.trunk.positions.weight.data.zero_()
    torch.testing.assert_close(model(x), model(x.flip(1)), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ learning


def overfit(model, loss, steps=80):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return loss().item()


@NORMS
def test_language_model_learns_sentences_by_heart(norm_first):
    """And says them: the first token of each is another, so that everything behind it is known."""
    model, x = language_model(norm_first, dtype=torch.float32), tokens(3, LENGTH)
    x[:, 0] = torch.arange(3)
    assert overfit(model, lambda: model.loss(x)) < 0.05
    assert torch.equal(model.generate(x[:, :1], LENGTH - 1), x)


@NORMS
def test_encoder_decoder_learns_to_reverse_a_few(norm_first):
    model, source = encoder_decoder(norm_first, dtype=torch.float32), tokens(4, 6, seed=8, vocabulary=SOURCE)
    target = torch.cat((torch.full((4, 1), 10), source.flip(1)), dim=1)
    assert overfit(model, lambda: model.loss(source, target)) < 0.05
    assert torch.equal(model.generate(source, 6, start=10), target)


def test_fine_tuning_goes_on_with_the_pretrained_trunk():
    """The trunk is taken, not copied: what the classifier learns is learned by the language model's own parameters."""
    language = language_model(dtype=torch.float32)
    classifier = TransformerClassifier(language.trunk, 2)
    assert classifier.trunk is language.trunk
    before = {name: parameter.clone() for name, parameter in language.named_parameters()}
    x = tokens(6, LENGTH)
    assert overfit(classifier, lambda: F.cross_entropy(classifier(x), torch.arange(6) % 2), steps=40) < 0.05
    changed = {name for name, parameter in language.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.startswith("trunk.")}


def test_models_refuse():
    model = language_model()
    with pytest.raises(ValueError, match="the table holds max_length=12"):
        model(tokens(1, LENGTH + 1))
    with pytest.raises(ValueError, match="the table holds max_length=12"):
        model.generate(tokens(1, 5), 9)
    assert model.generate(tokens(1, 5), 8).shape == (1, 13), "the last token is said, never read"
    with pytest.raises(ValueError, match=r"prompt has shape \(2, 0\)"):
        model.generate(tokens(2, 0), 3)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(tokens(1, 1), 3, temperature=-1)
    trunk = TransformerTrunk(VOCABULARY, CONFIG)
    with pytest.raises(ValueError, match="causal=False"):
        trunk.step(tokens(1, 1), trunk.new_cache(1))


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("make", [language_model, encoder_decoder])
@NORMS
def test_training_step_on_kernels_matches_torch(make, norm_first):
    """The loss and every gradient; what the kernels may lose is what eager torch loses, twice."""
    pytest.importorskip("triton", reason="triton is not installed")
    source, padding = source_and_padding()

    def step(backend, dtype):
        model = make(norm_first, dtype=torch.float32, layers=1).to(dtype)
        with fastattn.use_backend(backend):
            x = tokens(3, 6)
            loss = model.loss(x) if make is language_model else model.loss(source, x, padding)
            loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return loss.detach()[None], gradients

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, *three in zip(("loss", "gradients"), actual, peer, truth):
        ours, theirs, exact = three
        # Sums of some 50 terms in another order, through a block and back
        allowance = 50 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_within_budget(ours, truth=exact, peer=theirs, name=name, allowance=allowance)


def test_classifier_on_kernels_matches_torch():
    """A training step: nothing is causal here, and padding hides keys from both sides of a row."""
    pytest.importorskip("triton", reason="triton is not installed")
    x, padding = tokens(3, 6), torch.arange(6) >= torch.tensor([[6], [4], [1]])

    def step(backend, dtype):
        torch.manual_seed(4)
        config = dataclasses.replace(CONFIG, layers=1)
        model = TransformerClassifier(TransformerTrunk(VOCABULARY, config), 3).to(dtype)
        with fastattn.use_backend(backend):
            logits = model(x, padding)
            F.cross_entropy(logits, torch.arange(3)).backward()
        gradients = [torch.as_tensor(parameter.grad).flatten() for parameter in model.parameters()]
        return logits.detach(), torch.cat(gradients)

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, ours, theirs, exact in zip(("logits", "gradients"), actual, peer, truth):
        # Sums of some 50 terms in another order, through a block and back
        allowance = 50 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_within_budget(ours, truth=exact, peer=theirs, name=name, allowance=allowance)
