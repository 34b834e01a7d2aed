"""The transformers that the tests of models take: small, far from the same token at every step."""

import dataclasses
from typing import Any

import torch

from fastattn.models.transformer import TransformerConfig, TransformerEncoderDecoder, TransformerLanguageModel

VOCABULARY, SOURCE, LENGTH = 11, 9, 12
CONFIG = TransformerConfig(width=16, heads=4, layers=2, max_length=LENGTH)


def tokens(*shape, seed=0, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def language_model(norm_first: bool = False, seed: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, norm_first=norm_first, **changes)
    return TransformerLanguageModel(VOCABULARY, config).to(dtype).eval()


def encoder_decoder(norm_first: bool = False, seed: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, norm_first=norm_first, **changes)
    return TransformerEncoderDecoder(SOURCE, VOCABULARY, config).to(dtype).eval()


def source_and_padding():
    source = tokens(3, 7, seed=5, vocabulary=SOURCE)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    return source, padding
