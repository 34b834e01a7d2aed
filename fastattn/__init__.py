"""Exact, fused attention for PyTorch: a drop-in for ``nn.MultiheadAttention`` on Triton kernels."""

from fastattn.integrations import Fusion, fuse
from fastattn.modules import (
    AddLayerNorm,
    AddRMSNorm,
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastattn.ops import (
    Explanation,
    add_layer_norm,
    add_rms_norm,
    attention,
    explain,
    layer_norm,
    rms_norm,
    scaled_dot_product_attention,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "Explanation",
    "Fusion",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "explain",
    "fuse",
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "use_backend",
]
