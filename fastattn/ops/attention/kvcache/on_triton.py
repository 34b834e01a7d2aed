"""Attention over a cache on the Triton backend."""

from __future__ import annotations

from fastattn.ops.attention.kvcache.contract import KVCacheCall


def refusals(call: KVCacheCall) -> list[str]:
    """Why the kernels cannot run ``call``."""
    return ["it has no kernels for a cache yet"]


def describe(call: KVCacheCall) -> str:
    """What would run."""
    return ""
