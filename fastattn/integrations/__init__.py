"""Floor 3: putting this package's modules into models that others wrote."""

from fastattn.integrations.replace import Replacement, replace_attention

__all__ = ["Replacement", "replace_attention"]
