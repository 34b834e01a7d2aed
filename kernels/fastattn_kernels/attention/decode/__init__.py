"""Attention of a few queries to keys held in a cache: new keys put in, slots divided among programs, a merge."""
