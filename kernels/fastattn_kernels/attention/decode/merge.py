"""The shares of several programs weighed against each other: one output, one LSE."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import Heads, strided
from fastattn_kernels.common.config import head_block
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import INFINITY, LN_2

# Shares that a program reads at once.
_AT_ONCE = tl.constexpr(16)


@triton.jit(do_not_specialize=["heads", "seqlen_q", "splits", "all_rows"])
def _merge_kernel(
    part_ptr, statistics_ptr, output, lse_ptr, heads, seqlen_q, splits, all_rows,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One row. Shares are ``[splits, rows, VALUE_DIM]``, their statistics, maximum and sum, ``[splits, 2, rows]``; both
    are added up in the order of the splits. A share in which the row sees nothing is not read."""
    line = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, _AT_ONCE)
    cols = tl.arange(0, BLOCK_DV)
    maxima = tl.full([_AT_ONCE], -INFINITY, tl.float32)
    for start in tl.range(0, splits, _AT_ONCE):
        number = start + numbers
        ptrs = statistics_ptr + number.to(tl.int64) * 2 * all_rows + line
        maxima = tl.maximum(maxima, tl.load(ptrs, mask=number < splits, other=-INFINITY))
    row_max = tl.max(maxima, 0)
    pivot = tl.where(row_max == -INFINITY, 0.0, row_max)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    for start in tl.range(0, splits, _AT_ONCE):
        number = start + numbers
        ptrs = statistics_ptr + number.to(tl.int64) * 2 * all_rows + line
        share_max = tl.load(ptrs, mask=number < splits, other=-INFINITY)
        share_sum = tl.load(ptrs + all_rows, mask=number < splits, other=0.0)
        weight = tl.exp2(share_max - pivot) * share_sum
        part_ptrs = part_ptr + (number.to(tl.int64) * all_rows + line)[:, None] * VALUE_DIM + cols[None, :]
        part = tl.load(part_ptrs, mask=(share_sum != 0.0)[:, None] & (cols < VALUE_DIM)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
        total += tl.sum(weight, 0)
    o = acc * tl.where(total == 0.0, 0.0, 1.0 / total)
    batch_head = line // seqlen_q
    batch, head = batch_head // heads, batch_head % heads
    o_ptr = output.ptr + batch * output.stride_b + head * output.stride_h + line % seqlen_q * output.stride_m
    tl.store(
        o_ptr + cols.to(tl.int64) * output.stride_d, o.to(output.ptr.dtype.element_ty), mask=cols < VALUE_DIM
    )  # fmt: skip
    tl.store(lse_ptr + line, (pivot + tl.log2(total)) * LN_2)


def launch_merge(part: Tensor, statistics: Tensor, output: Tensor, lse: Tensor) -> None:
    """Write the output and the LSE.

    Args:
        part: ``[splits * B, H, L, Dv]``, contiguous float32: the attention of each share.
        statistics: ``[splits, 2, B, H, L]``, contiguous float32: the maximum and the sum of each row in each share.
        output: ``[B, H, L, Dv]``, any strides.
        lse: ``[B, H, L]``, contiguous float32.
    """
    _, heads, length, value_dim = output.shape
    launch(
        _merge_kernel, (lse.numel(),), output,
        part, statistics, strided(Heads, output), lse, heads, length, statistics.shape[0], lse.numel(),
        VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), num_warps=4,
    )  # fmt: skip
