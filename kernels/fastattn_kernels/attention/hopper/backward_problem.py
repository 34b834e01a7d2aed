"""What the backward kernels on Hopper are told of a call, beside descriptors of whole heads."""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn_kernels.attention.hopper.config import is_of_keys
from fastattn_kernels.attention.hopper.mask_bits import pack_mask
from fastattn_kernels.attention.hopper.problem import bias_for_tma, suits_tma, unexpanded
from fastattn_kernels.common.problem import Argument, Problem, nested, strided

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


def bias_arguments(problem: Problem) -> tuple[Tensor | None, tuple[int, int] | None, Argument]:
    """A bias by tiles, whether it has an axis of batches and one of heads; or one that broadcasts over rows."""
    bias = problem.bias
    if bias is None or is_of_keys(bias):
        return None, None, strided(None if bias is None else unexpanded(bias))
    bias = bias_for_tma(bias)
    return bias, (int(bias.shape[0] > 1), int(bias.shape[1] > 1)), None


def _words(mask: Tensor | None, columns: int, hidden: bool = False) -> Argument:
    """A mask packed along its last axis, of ``columns``. One that broadcasts over them is packed for a single tile: a
    mask of keys, packed for tiles ``[keys, rows]``, would grow by a factor of rows."""
    if mask is None:
        return None
    mask = unexpanded(mask, axes=(0, 1, 2, 3))
    broadcasts = mask.shape[3] == 1
    words = strided(pack_mask(mask, _WIDEST_TILE if broadcasts else columns, hidden)) or ()
    return (*words[:4], 0 if broadcasts else 1)


def _documents(problem: Problem) -> Argument:
    if problem.query_documents is None:
        return None
    return (*(strided(problem.query_documents) or ()), *(strided(problem.key_documents) or ()))


def rules_of_keys(problem: Problem) -> tuple[object, ...]:
    """The kernel argument ``rules`` for tiles ``[keys, rows]``: the mask as bits, its columns being rows of scores."""
    mask = None if problem.mask is None else problem.mask.transpose(2, 3)
    words = _words(mask, problem.query.shape[2])
    return nested(
        words, None, strided(problem.key_padding_mask), _documents(problem), strided(problem.prefix), None,
        problem.softcap,
    )  # fmt: skip


def rules_of_rows(problem: Problem) -> tuple[object, ...]:
    """The same for tiles ``[rows, keys]``; bits for the padding as well, which would be 32 loads a thread."""
    padding = problem.key_padding_mask
    columns = problem.key.shape[2]
    padding_words = None if padding is None else _words(padding[:, None, None], columns, hidden=True)
    return nested(
        _words(problem.mask, columns), None, padding_words, _documents(problem), strided(problem.prefix), None,
        problem.softcap,
    )  # fmt: skip
