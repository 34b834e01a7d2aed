"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.attention import AttentionResult, attention, visibility

__all__ = ["AttentionResult", "attention", "visibility"]
