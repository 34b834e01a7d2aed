"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.attention import AttentionResult, attention, distances, visibility
from fastattn.reference.residual_norm import NormResult, add_norm

__all__ = ["AttentionResult", "NormResult", "add_norm", "attention", "distances", "visibility"]
