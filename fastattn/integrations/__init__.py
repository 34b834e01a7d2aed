"""Floor 3: putting this package's modules into models that others wrote."""

from fastattn.integrations.fuse import Fusion, fuse
from fastattn.integrations.sdpa import SdpaPatch, patch_sdpa

__all__ = ["Fusion", "SdpaPatch", "fuse", "patch_sdpa"]
