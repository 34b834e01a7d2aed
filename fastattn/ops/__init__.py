"""Floor 1: validation, dispatch and autograd over the kernels."""

from fastattn.ops._dispatch import Explanation, use_backend
from fastattn.ops._kernels import use_kernels
from fastattn.ops.additive import additive_attention
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.explain import explain
from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "Explanation",
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "attention",
    "explain",
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "use_backend",
    "use_kernels",
]
