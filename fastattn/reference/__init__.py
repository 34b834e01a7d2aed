"""Eager definitions in plain torch, any dtype up to float64: they define what is right."""

from fastattn.reference.attention import AttentionResult, attention, distances, visibility

__all__ = ["AttentionResult", "attention", "distances", "visibility"]
