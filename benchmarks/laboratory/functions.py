"""A user's functions for the laboratory: two written by hand, and those of the cookbook.

By hand: a learned table that differences of positions address, which bends the scores as well, and documents.
"""
# ruff: noqa: TID251  # the laboratory looks at the kernels themselves

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cookbook.examples import Setting, by_name

_SCORES = """
@triton.jit
def read(head, q, k, captured):
    table = captured[0]
    bucket = tl.minimum(tl.maximum(q - k + table.sizes[0] // 2, 0), table.sizes[0] - 1)
    return tl.load(table.ptr + bucket.to(tl.int64) * table.strides[0] + head * table.strides[1])


@triton.jit
def score_mod(score, batch, head, q, k, captured):
    return {limit} * tanh(score / {limit}) + read(head, q, k, captured)


@triton.jit
def gradient(d, score, batch, head, q, k, captured):
    bent = tanh(score / {limit})
    return d * (1.0 - bent * bent)


@triton.jit
def of_table(d, score, batch, head, q, k, captured):
    return d
"""

_DOCUMENTS = """
@triton.jit
def mask_mod(batch, head, q, k, captured):
    ptr = captured[0].ptr + batch.to(tl.int64) * captured[0].strides[0]
    return tl.load(ptr + q * captured[0].strides[1]) == tl.load(ptr + k * captured[0].strides[1])
"""


def score_mod(heads: int, limit: float) -> Any:
    """The modifier of scores, which it bends to stay within ``limit``."""
    from fastattn_kernels.common.functions import Modifier, compiled

    function, gradient = (compiled(_SCORES.format(limit=limit), name) for name in ("score_mod", "gradient"))
    return Modifier(function, gradient, (torch.empty(257, heads),))


def of_table(limit: float) -> Any:
    """The derivative by the table."""
    from fastattn_kernels.common.functions import compiled

    return compiled(_SCORES.format(limit=limit), "of_table")


def mask_mod(batch: int, length: int) -> Any:
    """The modifier that hides keys."""
    from fastattn_kernels.common.functions import Modifier, compiled

    documents = torch.zeros(batch, length, dtype=torch.int32)
    return Modifier(compiled(_DOCUMENTS, "mask_mod"), None, (documents,), batches=True, heads=False)


def of_cookbook(name: str, query: Tensor, key: Tensor) -> dict[str, Any]:
    """The function of an example, traced for a call on these tensors: its kind, ``score_mod`` or ``mask_mod``, and what
    a call hands to the operators of it, a ``contract.Function``."""
    from fastattn.ops.attention.functions.call import check_function
    from fastattn.ops.attention.functions.lookups import extent_of

    def draw(*sizes: int) -> Tensor:
        return torch.ones(sizes, dtype=query.dtype)

    example = by_name(name)
    setting = Setting(query.shape[0], query.shape[1], query.shape[2], key.shape[2], draw)
    arguments = example.arguments(example.inputs(setting))
    return {kind: check_function(kind, each, query, extent_of(query, key)) for kind, each in arguments.items()}
