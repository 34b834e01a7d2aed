"""The arguments of the backward kernels on Hopper, beside descriptors of whole heads."""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn_kernels.attention.hopper.config import is_of_keys
from fastattn_kernels.attention.hopper.mask_bits import pack_mask
from fastattn_kernels.attention.hopper.problem import (
    BiasAxes,
    PackedMask,
    bias_axes_of,
    bias_for_tma,
    packed,
    suits_tma,
    unexpanded,
)
from fastattn_kernels.common.arguments import Pairs, PerBatch, PerKey, Rules, documents, strided
from fastattn_kernels.common.problem import Problem

_WIDEST_TILE = 128


@contextlib.contextmanager
def writable_by_tma(*gradients: Tensor) -> Generator[list[Tensor]]:
    """The gradients, or contiguous ones in their stead that are copied to them in the end."""
    written = [gradient if suits_tma(gradient) else torch.empty_like(gradient, memory_format=torch.contiguous_format)
               for gradient in gradients]  # fmt: skip
    yield written
    for gradient, tensor in zip(gradients, written, strict=True):
        if tensor is not gradient:
            gradient.copy_(tensor)


def row_descriptor(numbers: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of ``rows`` numbers of contiguous float32 ones."""
    return TensorDescriptor(numbers.view(-1), [numbers.numel()], [1], [rows], gl.NVMMASharedLayout(0, 32, rank=1))


def pieces_descriptor(pieces: Tensor) -> TensorDescriptor:
    """A descriptor of the pieces of dQ, one a box."""
    return TensorDescriptor(pieces, list(pieces.shape), [256, 1], [16, 256], gl.NVMMASharedLayout(0, 32, rank=2))


def bias_arguments(problem: Problem) -> tuple[Tensor | None, BiasAxes | None, Pairs | None]:
    """A bias that TMA reads by tiles and its axes; or, last, one that broadcasts over rows."""
    bias = problem.bias
    if bias is None:
        return None, None, None
    if is_of_keys(bias):
        return None, None, strided(Pairs, unexpanded(bias))
    bias = bias_for_tma(bias)
    return bias, bias_axes_of(bias), None


def _words(mask: Tensor, columns: int, hidden: bool = False) -> PackedMask:
    """A mask packed along its last axis, of ``columns``. One that broadcasts over them is packed for a single tile: a
    mask of keys, packed for tiles ``[keys, rows]``, would grow by a factor of rows."""
    mask = unexpanded(mask, axes=(0, 1, 2, 3))
    broadcasts = mask.shape[3] == 1
    return packed(pack_mask(mask, _WIDEST_TILE if broadcasts else columns, hidden), broadcasts=broadcasts)


def rules_of_keys(problem: Problem) -> Rules:
    """The kernel argument ``rules`` for tiles ``[keys, rows]``: the mask as bits, its columns being rows of scores."""
    mask = problem.mask
    return Rules(
        mask=None if mask is None else _words(mask.transpose(2, 3), problem.query.shape[2]),
        padding=strided(PerKey, problem.key_padding_mask),
        documents=documents(problem.query_documents, problem.key_documents),
        prefix=strided(PerBatch, problem.prefix),
        softcap=problem.softcap,
    )


def rules_of_rows(problem: Problem) -> Rules:
    """The same for tiles ``[rows, keys]``; bits for the padding as well, which would be 32 loads a thread."""
    mask, padding, columns = problem.mask, problem.key_padding_mask, problem.key.shape[2]
    return Rules(
        mask=None if mask is None else _words(mask, columns),
        padding=None if padding is None else _words(padding[:, None, None], columns, hidden=True),
        documents=documents(problem.query_documents, problem.key_documents),
        prefix=strided(PerBatch, problem.prefix),
        softcap=problem.softcap,
    )
