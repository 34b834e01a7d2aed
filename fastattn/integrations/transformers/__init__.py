"""Hugging Face transformers on this package: ``attn_implementation="fastattn"``.

Importing this module imports no transformers: :func:`register` does.
"""

from fastattn.integrations.transformers.registration import Registration, register

__all__ = ["Registration", "register"]
