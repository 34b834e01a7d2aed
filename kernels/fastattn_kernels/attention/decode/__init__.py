"""Attention of a few queries to keys held in a cache: the new keys put in, the slots divided among programs, a merge."""
