"""Floor 3: putting this package's modules into models that others wrote."""

from fastattn.integrations.fuse import Fusion, fuse

__all__ = ["Fusion", "fuse"]
