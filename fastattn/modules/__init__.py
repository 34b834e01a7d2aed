"""Floor 2: ``nn.Module``s over the operations of floor 1."""

from fastattn.modules.additive_attention import AdditiveAttention
from fastattn.modules.kv_cache import KVCache
from fastattn.modules.layered_kv_cache import CacheFullError
from fastattn.modules.multihead_attention import MultiheadAttention
from fastattn.modules.norm import AddLayerNorm, AddRMSNorm
from fastattn.modules.packing import pack, unpack
from fastattn.modules.paged_kv_cache import PagedKVCache
from fastattn.modules.positional_encoding import LearnedPositionalEncoding
from fastattn.modules.self_attention_2d import SelfAttention2d
from fastattn.modules.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "AdditiveAttention",
    "CacheFullError",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PagedKVCache",
    "SelfAttention2d",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "pack",
    "unpack",
]
