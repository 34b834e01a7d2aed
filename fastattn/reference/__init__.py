"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.additive import AdditiveResult, additive_attention
from fastattn.reference.attention import AttentionResult, attention, distances, visibility
from fastattn.reference.kvcache import KVCacheResult, attention_with_kvcache, rotate
from fastattn.reference.residual_norm import NormResult, add_norm

__all__ = [
    "AdditiveResult",
    "AttentionResult",
    "KVCacheResult",
    "NormResult",
    "add_norm",
    "additive_attention",
    "attention",
    "attention_with_kvcache",
    "distances",
    "rotate",
    "visibility",
]
