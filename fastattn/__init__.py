"""Exact, fused attention for PyTorch: a drop-in for ``nn.MultiheadAttention`` on Triton kernels."""

from fastattn.integrations import Fusion, fuse
from fastattn.modules import (
    AdditiveAttention,
    AddLayerNorm,
    AddRMSNorm,
    CacheFullError,
    KVCache,
    LearnedPositionalEncoding,
    MultiheadAttention,
    PagedKVCache,
    SelfAttention2d,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    pack,
    unpack,
)
from fastattn.ops import (
    Explanation,
    add_layer_norm,
    add_rms_norm,
    additive_attention,
    attention,
    attention_varlen,
    explain,
    layer_norm,
    rms_norm,
    scaled_dot_product_attention,
    use_backend,
    use_kernels,
)

__version__ = "0.1.0"

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "AdditiveAttention",
    "CacheFullError",
    "Explanation",
    "Fusion",
    "KVCache",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PagedKVCache",
    "SelfAttention2d",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "attention",
    "attention_varlen",
    "explain",
    "fuse",
    "layer_norm",
    "pack",
    "rms_norm",
    "scaled_dot_product_attention",
    "unpack",
    "use_backend",
    "use_kernels",
]
