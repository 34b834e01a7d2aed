"""Padded batches without their padding, and back: as jagged nested tensors, which models of these modules take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from fastattn.ops.common.checks import shape_of


def pack(x: Tensor, key_padding_mask: Tensor) -> Tensor:
    """A padded batch as a jagged nested tensor ``[N, j, ...]`` of the rows that are no padding.

    ``fastattn.MultiheadAttention`` and the transformer layers take such tensors, and torch's position-wise modules do,
    so that a whole ``nn.TransformerEncoder`` of these layers runs without padding from its first layer to its last::

        y = fastattn.unpack(encoder(fastattn.pack(x, padding)), padding)

    Args:
        x: ``[N, L, ...]``.
        key_padding_mask: boolean ``[N, L]``, True = padding, which may be anywhere in a row. Rows of nothing but
            padding become sequences of length 0.

    Returns:
        The jagged tensor; differentiable. How many rows there are is read from the mask, for which a GPU is waited for,
        once.

    Raises:
        TypeError: ``key_padding_mask`` is not boolean.
        ValueError: the shapes do not fit.
    """
    _check(key_padding_mask, x.shape[:2], "x", x)
    kept = ~key_padding_mask
    lengths = kept.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return nested_tensor_from_jagged(x[kept], offsets)


def unpack(packed: Tensor, key_padding_mask: Tensor, padding_value: float = 0.0) -> Tensor:
    """The opposite of :func:`pack`: ``[N, L, ...]``, with ``padding_value`` where the mask is True.

    Args:
        packed: jagged ``[N, j, ...]``, with as many rows in each sequence as the mask leaves.
        key_padding_mask: boolean ``[N, L]``, the one that the batch was packed with.
        padding_value: what padded places hold.

    Raises:
        TypeError: ``key_padding_mask`` is not boolean, or ``packed`` not jagged.
        ValueError: the mask leaves another number of rows than there are.
    """
    if packed.layout is not torch.jagged:
        raise TypeError(f"packed is {packed.layout}: expected a jagged nested tensor, as fastattn.pack makes it")
    jagged: Any = packed
    _check(key_padding_mask, (packed.shape[0], key_padding_mask.shape[-1]), "packed", packed)
    values, kept = jagged.values(), ~key_padding_mask
    if not torch.equal(kept.sum(1), jagged.offsets().diff()):
        raise ValueError("key_padding_mask leaves other lengths than packed has: expected the mask of fastattn.pack")
    padded = values.new_full((*key_padding_mask.shape, *values.shape[1:]), padding_value)
    return padded.index_put(tuple(kept.nonzero(as_tuple=True)), values)


def _check(key_padding_mask: Tensor, shape: tuple[Any, ...], name: str, of: Tensor) -> None:
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        found = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
        raise TypeError(f"key_padding_mask is {found}: expected a boolean tensor (True = padding)")
    if tuple(key_padding_mask.shape) != tuple(shape):
        raise ValueError(
            f"key_padding_mask has shape {shape_of(key_padding_mask)} for {name} of shape {shape_of(of)}: expected "
            "[batch, length]"
        )
