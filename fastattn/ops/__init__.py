"""Floor 1: validation, dispatch and autograd over the kernels."""

from fastattn.ops._dispatch import Explanation, use_backend
from fastattn.ops.attention import attention, explain, scaled_dot_product_attention

__all__ = ["Explanation", "attention", "explain", "scaled_dot_product_attention", "use_backend"]
