"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.additive import AdditiveResult, additive_attention
from fastattn.reference.attention import AttentionResult, attention, distances, visibility
from fastattn.reference.kvcache import KVCacheResult, attention_with_kvcache, rotate
from fastattn.reference.residual_norm import NormResult, add_norm
from fastattn.reference.varlen import VarlenResult, attention_varlen

__all__ = [
    "AdditiveResult",
    "AttentionResult",
    "KVCacheResult",
    "NormResult",
    "VarlenResult",
    "add_norm",
    "additive_attention",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "distances",
    "rotate",
    "visibility",
]
