"""Real weights on real sentences: the embeddings of a trained encoder, against those of the original model."""

import pytest
import torch
from torch import nn

import fastattn
from tests.real_encoder import SENTENCES, load_config, load_encoder, make_layer, pool, tokenize, wheel_folder


@pytest.fixture(scope="module")
def original_embeddings():
    """What ``transformers`` makes of the same weights, each sentence alone: so without any padding."""
    from transformers import BertModel

    model = BertModel.from_pretrained(wheel_folder(), local_files_only=True, attn_implementation="eager").eval()
    embeddings = []
    with torch.no_grad():
        for sentence in SENTENCES:
            tokens, padding = tokenize([sentence])
            embeddings.append(pool(model(tokens).last_hidden_state, padding))
    return torch.cat(embeddings)


def assert_same(embeddings, original):
    cosine = torch.nn.functional.cosine_similarity(embeddings.double(), original.double())
    assert cosine.min() > 0.99999, cosine.tolist()


def test_encoder_embeddings_are_the_original_models(backend, original_embeddings):
    tokens, padding = tokenize(SENTENCES)
    lengths = (~padding).sum(dim=1)
    assert len(set(lengths.tolist())) == len(SENTENCES)
    assert padding.any()
    with torch.no_grad(), fastattn.use_backend(backend):
        embeddings = load_encoder()(tokens, padding)
    assert_same(embeddings, original_embeddings)
    # Not because all embeddings are alike: the two about cats are close, and far from the others.
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > 0.5 > similar[0, 2:].max()


def test_torchs_encoder_keeps_its_embeddings_when_fused_and_undone(original_embeddings):
    tokens, padding = tokenize(SENTENCES)
    encoder = load_encoder()
    plain = nn.TransformerEncoder(make_layer(nn.TransformerEncoderLayer, load_config()), len(encoder.layers)).eval()
    plain.layers.load_state_dict(encoder.layers.state_dict())
    encoder.layers = nn.ModuleList([plain])
    with torch.no_grad(), fastattn.use_backend("torch"):
        before = encoder(tokens, padding)
        with fastattn.fuse(plain) as fusion:
            assert len(fusion.replaced) == 4 * len(plain.layers)
            assert not fusion.left_alone
            assert_same(encoder(tokens, padding), original_embeddings)
        assert torch.equal(encoder(tokens, padding), before)
    assert_same(before, original_embeddings)


def test_encoder_loaded_by_transformers_embeds_as_with_eager(backend, original_embeddings):
    """All sentences in one padded batch, each attention one of this package's."""
    from transformers import AutoModel

    from fastattn.integrations.transformers import register
    from tests.integrations.transformers.harness import watching

    tokens, padding = tokenize(SENTENCES)
    with register(), fastattn.use_backend(backend), torch.no_grad(), watching(elsewhere=True) as watch:
        model = AutoModel.from_pretrained(wheel_folder(), local_files_only=True, attn_implementation="fastattn").eval()
        embeddings = pool(model(tokens, attention_mask=(~padding).long()).last_hidden_state, padding)
    assert (len(watch.calls), watch.elsewhere.total()) == (model.config.num_hidden_layers, 0)
    assert watch.carried == {"padding"}
    assert_same(embeddings, original_embeddings)
