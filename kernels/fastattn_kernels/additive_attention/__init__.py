"""Additive attention."""
