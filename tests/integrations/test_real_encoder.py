"""Real weights on real sentences: the embeddings of a trained encoder, against those of the original model."""

import pytest
import torch

import fastattn
from tests.real_encoder import SENTENCES, load_encoder, pool, tokenize, wheel_folder


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


def test_encoder_embeddings_are_the_original_models(backend, original_embeddings):
    tokens, padding = tokenize(SENTENCES)
    lengths = (~padding).sum(dim=1)
    assert len(set(lengths.tolist())) == len(SENTENCES)
    assert padding.any()
    with torch.no_grad(), fastattn.use_backend(backend):
        embeddings = load_encoder()(tokens, padding)
    cosine = torch.nn.functional.cosine_similarity(embeddings.double(), original_embeddings.double())
    assert cosine.min() > 0.99999, cosine.tolist()
    # Not because all embeddings are alike: the two about cats are close, and far from the others.
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > 0.5 > similar[0, 2:].max()
