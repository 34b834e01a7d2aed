"""Floor 2: ``nn.Module``s over :func:`fastattn.attention`."""

from fastattn.modules.multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
