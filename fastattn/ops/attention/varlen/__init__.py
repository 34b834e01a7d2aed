"""Attention over packed sequences: ``[T, H, D]``, and offsets that say where each sequence begins."""
