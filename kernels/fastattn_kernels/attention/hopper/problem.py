"""The arguments of the Hopper kernels: descriptors of a call's tensors, packed masks; and which calls they refuse."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn_kernels.attention.hopper.config import head_block, is_of_keys
from fastattn_kernels.attention.hopper.mask_bits import pack_mask
from fastattn_kernels.common.arguments import (
    PerBatch,
    PerHead,
    Rules,
    documents,
    pointer_and_strides,
    strided,
)
from fastattn_kernels.common.problem import Problem

# Bytes of which strides and addresses have to be multiples for TMA.
_ALIGNMENT = 16
LARGEST_HEAD = 256


class PackedMask(NamedTuple):
    """A mask as ``mask_bits`` packs it. The stride of words is 0 where the mask broadcasts over what is packed: one
    tile's words then serve all tiles."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any
    stride_word: Any


class BiasAxes(NamedTuple):
    """1 where a bias that is read by TMA has an axis of batches, and of heads; 0 where it broadcasts over them."""

    batch: Any
    head: Any


def refusals(problem: Problem) -> list[str]:
    """Why the Hopper forward does not take a problem; empty if it does."""
    query, key, value = problem.query, problem.key, problem.value
    reasons = []
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype={query.dtype}: the Hopper kernels take float16 and bfloat16")
    if max(query.shape[3], value.shape[3]) > LARGEST_HEAD:
        reasons.append(f"head_dim={query.shape[3]}, value_dim={value.shape[3]}: at most {LARGEST_HEAD}")
    if problem.seed is not None:
        reasons.append(f"dropout_p={problem.dropout_p}: the Hopper kernels draw no random numbers")
    if problem.alibi_slopes is not None:
        reasons.append("alibi_slopes: not in the Hopper kernels")
    for name in ("score_mod", "mask_mod"):
        if getattr(problem, name) is not None:
            reasons.append(f"{name}: functions are not in the Hopper kernels")
    if problem.scale < 0.0:
        reasons.append(f"scale={problem.scale}: a negative scale would need the queries negated, which TMA does not do")
    if query.shape[2] == 0 or key.shape[2] == 0:
        reasons.append(f"seqlen_q={query.shape[2]}, seqlen_k={key.shape[2]}: TMA wants tensors that are not empty")
    if problem.bias is not None and problem.bias.shape[3] == 1 < key.shape[2]:
        reasons.append("bias: one that broadcasts over keys is not in the Hopper kernels")
    if problem.bias is not None and problem.bias.element_size() > 2 and not is_of_keys(problem.bias):
        if head_block(query.shape[3], value.shape[3]) > 128:
            reasons.append(f"bias.dtype={problem.bias.dtype}: too large beside heads of more than 128 elements")
    if value.shape[3] * value.element_size() % _ALIGNMENT:
        reasons.append(f"value_dim={value.shape[3]}: TMA would not store rows of that many elements")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not suits_tma(tensor):
            reasons.append(
                f"{name} with strides {tuple(tensor.stride())} at address {tensor.data_ptr():#x}: TMA wants rows that "
                f"are contiguous, aligned and apart by multiples of {_ALIGNMENT} bytes, and nothing expanded"
            )
    return reasons


def suits_tma(tensor: Tensor) -> bool:
    """Whether TMA takes the tensor as it lies."""
    step = _ALIGNMENT // tensor.element_size()
    shape, strides = tensor.shape, tensor.stride()
    apart = all(stride > 0 and stride % step == 0 for size, stride in zip(shape[:-1], strides[:-1]) if size > 1)
    return tensor.data_ptr() % _ALIGNMENT == 0 and apart and (strides[-1] == 1 or shape[-1] == 1)


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of boxes of ``rows`` x ``columns`` of a ``[B, H, length, size]``; boxes are zero past its ends."""
    # the stride of an axis of size 1 is never used, but TMA checks it
    unused = _ALIGNMENT // tensor.element_size()
    strides = [unused if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1])]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * tensor.element_size(), rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)


def head_descriptor(tensor: Tensor, rows: int, problem: Problem) -> TensorDescriptor:
    """:func:`descriptor` of whole heads."""
    return descriptor(tensor, rows, head_block(problem.query.shape[3], problem.value.shape[3]))


def unexpanded(tensor: Tensor, axes: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """The axes that were expanded, back to size 1."""
    for axis in axes:
        if tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def bias_for_tma(bias: Tensor) -> Tensor:
    """A bias that TMA takes: itself, or a copy with padded rows. Reading it in place, as few bytes at a time as its
    alignment allows, would cost every tile 64 loads a thread."""
    bias = unexpanded(bias, (0, 1))  # not the rows: boxes are zero past the only one
    if bias.dtype == torch.float64:
        bias = bias.float()
    if suits_tma(bias):
        return bias
    keys, step = bias.shape[3], _ALIGNMENT // bias.element_size()
    padded = bias.new_empty(*bias.shape[:3], -(-keys // step) * step)
    return padded[..., :keys].copy_(bias)


def bias_axes_of(bias: Tensor) -> BiasAxes:
    """The axes of a bias that :func:`bias_for_tma` returned."""
    return BiasAxes(int(bias.shape[0] > 1), int(bias.shape[1] > 1))


def bias_of_keys(bias: Tensor | None) -> PerHead | None:
    """A bias that broadcasts over rows, by the first key of every head: its keys are contiguous."""
    if bias is None:
        return None
    bias = unexpanded(bias)
    bias = bias if bias.stride(3) == 1 else bias.contiguous()
    return PerHead(*pointer_and_strides(bias)[:3])


def packed(words: Tensor, *, broadcasts: bool = False) -> PackedMask:
    """Packed words as a kernel argument; ``broadcasts``: over what is packed."""
    return PackedMask(*pointer_and_strides(words)[:4], 0 if broadcasts else 1)


def packed_rules(problem: Problem) -> Rules:
    """The kernel argument ``rules`` of the forward: masks and padding as packed bits, without what is added."""
    mask, padding = problem.mask, problem.key_padding_mask
    seqlen_k = problem.key.shape[2]
    bits_of_padding = None
    if padding is not None:
        bits_of_padding = packed(pack_mask(unexpanded(padding[:, None, None]), seqlen_k, hidden=True))
    return Rules(
        mask=None if mask is None else packed(pack_mask(unexpanded(mask), seqlen_k)),
        padding=bits_of_padding,
        documents=documents(problem.query_documents, problem.key_documents),
        prefix=strided(PerBatch, problem.prefix),
        softcap=problem.softcap,
    )
