"""Attention of a few new tokens to a key/value cache, contiguous or in pages, which takes them in."""
