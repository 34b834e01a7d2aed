"""The torch backend's additive attention as it is for large calls, in calls of a test's size."""

from fastattn.ops.additive_attention import blocks, formula


def cut_small(monkeypatch, elements):
    """Leave no call to the formula, and give blocks and pieces at most so many elements."""
    monkeypatch.setattr(formula, "MOST_TANGENTS", 0)
    for name in ("BLOCK_ELEMENTS", "BLOCK_ELEMENTS_ON_GPU", "PIECE_ELEMENTS"):
        monkeypatch.setattr(blocks, name, elements)
