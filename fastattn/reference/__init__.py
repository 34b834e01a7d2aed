"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.additive import AdditiveResult, additive_attention
from fastattn.reference.attention import AttentionResult, attention, distances, visibility
from fastattn.reference.residual_norm import NormResult, add_norm

__all__ = [
    "AdditiveResult",
    "AttentionResult",
    "NormResult",
    "add_norm",
    "additive_attention",
    "attention",
    "distances",
    "visibility",
]
