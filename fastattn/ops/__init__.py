"""Floor 1: validation, dispatch and autograd over the kernels."""

from fastattn.ops.additive_attention.api import additive_attention
from fastattn.ops.attention.api import attention, scaled_dot_product_attention
from fastattn.ops.attention.functions.flex import flex_attention
from fastattn.ops.attention.kvcache.api import attention_with_kvcache
from fastattn.ops.attention.varlen.api import attention_varlen
from fastattn.ops.common.backends import Explanation, use_backend, use_kernels
from fastattn.ops.explain import explain
from fastattn.ops.residual_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "Explanation",
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "flex_attention",
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "use_backend",
    "use_kernels",
]
