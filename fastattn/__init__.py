"""Exact, fused attention for PyTorch: a drop-in for ``nn.MultiheadAttention`` on Triton kernels."""

from fastattn.integrations import replace_attention
from fastattn.modules import MultiheadAttention
from fastattn.ops import Explanation, attention, explain, scaled_dot_product_attention, use_backend

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "MultiheadAttention",
    "attention",
    "explain",
    "replace_attention",
    "scaled_dot_product_attention",
    "use_backend",
]
