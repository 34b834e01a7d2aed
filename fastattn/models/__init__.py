"""Floor 3: the lecture's systems, small and readable, built from the modules of floor 2."""

from fastattn.models.attention_decoder import AttentionDecoder, Decoded, Memory
from fastattn.models.captioning import ImageCaptioner
from fastattn.models.cnn import ConvNet, PointwiseResidual
from fastattn.models.seq2seq import Seq2Seq
from fastattn.models.transformer import (
    TransformerClassifier,
    TransformerConfig,
    TransformerEncoderDecoder,
    TransformerLanguageModel,
    TransformerTrunk,
)

__all__ = [
    "AttentionDecoder",
    "ConvNet",
    "Decoded",
    "ImageCaptioner",
    "Memory",
    "PointwiseResidual",
    "Seq2Seq",
    "TransformerClassifier",
    "TransformerConfig",
    "TransformerEncoderDecoder",
    "TransformerLanguageModel",
    "TransformerTrunk",
]
