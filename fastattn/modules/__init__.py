"""Floor 2: ``nn.Module``s over the operations of floor 1."""

from fastattn.modules.multihead_attention import MultiheadAttention
from fastattn.modules.norm import AddLayerNorm, AddRMSNorm
from fastattn.modules.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
