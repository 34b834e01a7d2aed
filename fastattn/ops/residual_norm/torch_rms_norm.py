"""RMS norm in plain torch: ``F.rms_norm``, and on a CPU, where that is eight operations, fewer passes over the rows.

Rows are taken in blocks that stay in the cache from one operation to the next, so that nothing is made that is as large
as ``x`` but the results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common.checks import DTYPES
from fastattn.ops.common.tracing import is_batched, is_eager_on_cpu, is_transformed
from fastattn.ops.residual_norm.torch_layer_norm import last_size

# Elements from which on fewer passes save more than it takes to write them in Python; where threads share each of
# them they have to wait for one another more often than in torch's.
_FEWEST, _FEWEST_OF_THREADS = 1 << 15, 1 << 20
# Elements of a block for each thread: in float32 a megabyte, of which a backward has four at a time. A block of 2^16
# stays in a core's own cache, but its dozen calls from Python take as long as what that saves.
_BLOCK = 1 << 18
# Squares are added up in pieces of a row of at most so many elements, of at least so many if it divides into such.
_PIECE, _LEAST_PIECE = 256, 32
_length = torch.linalg.vector_norm


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``F.rms_norm`` over the last axis of ``x``.

    Args:
        x: ``[..., N]``.
        weight: ``[N]``, of the dtype of ``x``.
        eps: added to the mean square.
    """
    if not is_eager_on_cpu(x) or is_transformed():
        return F.rms_norm(x, last_size(x), weight, eps)
    return eager_rms_norm(x, None, x.shape[-1:], weight, eps)


def eager_rms_norm(
    x: Tensor, residual: Tensor | None, size: Sequence[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    """:func:`rms_norm` of ``residual + x`` on a CPU where nothing traces or transforms the call.

    Args:
        x: ``[..., N]``.
        residual: of the shape and dtype of ``x``; default none.
        size: ``(N,)``.
        weight: ``[N]``, of the dtype of ``x``.
        eps: added to the mean square; default, as in torch, that of the dtype it is computed in.
    """
    if not _is_worth_blocks(x, size, weight):
        return torch.rms_norm(x if residual is None else residual + x, size, weight, eps)
    if eps is None:
        eps = torch.finfo(_wide(x)).eps
    if _trains(x, residual, weight):
        return _RMSNorm.apply(x if residual is None else residual + x, weight, eps)
    return _forward(x, residual, weight, eps, None, None)


def eager_add_rms_norm(
    x: Tensor, residual: Tensor | None, size: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """:func:`eager_rms_norm`, and ``residual + x``."""
    if residual is None or _trains(x, residual, weight) or not _is_worth_blocks(x, size, weight):
        total = x if residual is None else residual + x
        return eager_rms_norm(total, None, size, weight, eps), total
    total = torch.empty_like(x)
    return _forward(x, residual, weight, torch.finfo(_wide(x)).eps if eps is None else eps, None, total), total


def _is_worth_blocks(x: Tensor, size: Sequence[int], weight: Tensor | None) -> bool:
    # of one element the terms of its gradient cancel but for eps, and torch's operations leave less of their rounding
    fewest = _FEWEST if torch.get_num_threads() == 1 else _FEWEST_OF_THREADS
    return x.numel() >= fewest and x.shape[-1] != 1 and _fits(x, size, weight)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fits(x: Tensor, size: Sequence[int], weight: Tensor | None) -> bool:
    """Whether this is a norm over the last axis of a dense tensor of ours; torch has the words for what is not."""
    last = x.shape[-1:]
    if x.dtype not in DTYPES or x.layout is not torch.strided or type(size[0]) is not int or last != tuple(size):
        return False
    return weight is None or (weight.is_cpu and weight.layout is torch.strided and weight.shape == last)


class _RMSNorm(torch.autograd.Function):
    """RMS norm of ``x`` ``[..., N]`` with one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=_wide(x))
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return _forward(x, None, weight, eps, rstd, None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (d_output,) = grads
        x, weight, rstd = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        differentiated = torch.is_grad_enabled()  # the gradients may be differentiated again
        if not (differentiated or is_batched(d_output)):
            return *_backward(d_output, x, weight, rstd, wants), None
        with torch.enable_grad():
            x = x.view_as(x)  # one tensor may be both, or one made from the other: no gradient is counted twice
            weight = None if weight is None else weight.view_as(weight)
            wanted = [t for t, is_wanted in zip((x, weight), wants) if is_wanted and t is not None]
            output = F.rms_norm(x, x.shape[-1:], weight, ctx.eps)
            found = iter(torch.autograd.grad([output], wanted, [d_output], create_graph=differentiated))
        return *(next(found) if is_wanted else None for is_wanted in wants), None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which a norm of ``x`` is computed."""
    return torch.promote_types(x.dtype, torch.float32)


def _height(x: Tensor) -> int:
    """How many rows a block has."""
    return max(1, _BLOCK * torch.get_num_threads() // x.shape[-1])


def _blocks(x: Tensor, *others: Tensor | None) -> Any:
    """The rows of the tensors, a block at a time; None for those that are None."""
    height, rows = _height(x), [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, *others)]
    # unsafe to autograd alone, which sees none of this, and takes a third of split's time
    return zip(*(itertools.repeat(None) if t is None else t.unsafe_split(height) for t in rows))


def _buffers(x: Tensor, count: int) -> list[Tensor]:
    """So many blocks of rows, ``[height, N]``, of the dtype in which ``x`` is normalised."""
    size = x.shape[-1]
    return list(x.new_empty((count, min(_height(x), x.numel() // size), size), dtype=_wide(x)))


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x ** 2) + eps)`` of each row ``[rows, N]``, ``[rows, 1]``."""
    size, piece = x.shape[-1], math.gcd(x.shape[-1], _PIECE)
    if size <= _PIECE:
        norm = _length(x, 2, -1, True)
    elif piece >= _LEAST_PIECE:
        # the norm of the pieces' norms: one after the other, the squares of a long row would add up their roundings
        norm = _length(_length(x.unflatten(-1, (-1, piece)), 2, -1), 2, -1, True)
    else:
        return x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return norm.square_().mul_(1.0 / size).add_(eps).rsqrt_()


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, rstd: Tensor | None, total: Tensor | None
) -> Tensor:
    """The norm of ``residual + x``, laid out as by ``F.rms_norm``, but for results in channels-last formats, which are
    laid out by the caller; its inverse roots are written to ``rstd``, and the sum to ``total``."""
    output, wide = x.new_empty(x.shape), _wide(x)
    buffers = [] if x.dtype is wide else _buffers(x, 1)
    weight = None if weight is None else weight.to(wide)
    for rows, of_residual, normal, roots, of_sum in _blocks(x, residual, output, rstd, total):
        if of_residual is not None:
            rows = torch.add(of_residual, rows, out=normal if of_sum is None else of_sum)
        target = normal
        if buffers:
            rows = target = buffers[0][: rows.shape[0]].copy_(rows)
        root = _inverse_root(rows, eps)
        torch.mul(rows, root, out=target)
        if weight is not None:
            target.mul_(weight)
        if buffers:
            normal.copy_(target)
        if roots is not None:
            roots.copy_(root)
    return output


def _backward(
    d_output: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, wants: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and of the weight, those that are wanted."""
    wants_x, wants_weight = wants
    wide = _wide(x)
    d_x = x.new_empty(x.shape) if wants_x else None
    d_weight = x.new_zeros(x.shape[-1], dtype=wide) if wants_weight else None
    scale = None if weight is None else weight.to(wide)
    product, scaled, *converted = _buffers(x, 2 if x.dtype is wide else 4)
    for rows, of_output, root, of_rows in _blocks(x, d_output, rstd, d_x):
        count = rows.shape[0]
        if converted:
            rows, of_output = (buffer[:count].copy_(t) for buffer, t in zip(converted, (rows, of_output)))
        # in this order: the gradient times the row overflows near the end of float32, and underflows near zero
        part = torch.mul(rows, root, out=product[:count]).mul_(of_output)
        if d_weight is not None:
            d_weight += part.sum(0)
        if of_rows is None:
            continue
        # torch's layer norm backward, told a mean of zero, would do; but it sums a row in few chains, whose errors add
        # up where gradients are alike
        if scale is None:
            inner = torch.mul(of_output, root, out=scaled[:count])
        else:
            inner = torch.mul(of_output, scale, out=scaled[:count]).mul_(root)
            part.mul_(scale)
        mean = part.mean(-1, keepdim=True).mul_(root).mul_(root)
        if converted:
            of_rows.copy_(inner.addcmul_(rows, mean, value=-1.0))
        else:
            torch.addcmul(inner, rows, mean, value=-1.0, out=of_rows)
    return d_x, None if d_weight is None or weight is None else d_weight.to(weight.dtype)
