"""Exact, fused attention for PyTorch: a drop-in for ``nn.MultiheadAttention`` on Triton kernels."""

from fastattn.ops import Explanation, attention, explain, scaled_dot_product_attention, use_backend

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "attention",
    "explain",
    "scaled_dot_product_attention",
    "use_backend",
]
