"""Delta, the mean that the gradient of softmax subtracts: one number a row, computed once for all kernels that need it.

The plain backward computes it in the pass of dQ, which reads its rows' output gradients anyway, so that it takes no
launch of its own (``attention.backward``). All others ask for it before their own launch, and it is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import Heads, PerRow, strided
from fastattn_kernels.common.config import head_block
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.tiles import head_of, load_tile

# Rows that a program sums up at once.
_BLOCK_M = 64


@triton.jit
def delta_of_rows(o, do, d_lse, batch, head, row, seqlen_q, first_row=None):
    """``rowsum(dO * O) - dLSE`` of a tile of rows; ``d_lse`` is None or of all rows, ``first_row`` is that of a packed
    sequence."""
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    # A row that sees nothing is 0. Where NaN or inf comes in as its gradient, the product would be NaN, and reach the
    # gradient of the sink.
    delta = tl.where(tl.max(tl.abs(o.to(tl.float32)), 1) == 0.0, 0.0, delta)
    if d_lse is not None:
        ptrs = d_lse.ptr + batch * d_lse.stride_b + head * d_lse.stride_h + row.to(tl.int64) * d_lse.stride_m
        if first_row is not None:
            ptrs += first_row * d_lse.stride_m
        delta -= tl.load(ptrs, mask=row < seqlen_q, other=0.0).to(tl.float32)
    return delta


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def _delta_kernel(
    output, d_output, d_lse, delta_ptr, heads, seqlen_q,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta of BLOCK_M rows of one head."""
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    row_start = tl.program_id(0) % tiles * BLOCK_M
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    o = load_tile(head_of(output, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    do = load_tile(head_of(d_output, batch, head), row_start, seqlen_q, BLOCK_M, BLOCK_DV, VALUE_DIM, True)
    row = row_start + tl.arange(0, BLOCK_M)
    delta = delta_of_rows(o, do, d_lse, batch, head, row, seqlen_q)
    tl.store(delta_ptr + batch_head.to(tl.int64) * seqlen_q + row, delta, mask=row < seqlen_q)


class Delta:
    """Delta, ``rowsum(dO * O) - dLSE``: contiguous float32 ``[B, H, L]``, computed when it is first asked for.

    The first kernel of a backward may compute it instead (:meth:`unwritten`), if it reads O and dO of every row.

    Args:
        output: ``[B, H, L, Dv]``, any strides, and so are the next two.
        d_output: its gradient.
        d_lse: ``[B, H, L]``, the gradient of the LSE; None: zero.

    Attributes:
        is_written: whether a kernel that writes the numbers has been launched, or is about to be.
    """

    def __init__(self, output: Tensor, d_output: Tensor, d_lse: Tensor | None) -> None:
        self.output, self.d_output, self.d_lse = output, d_output, d_lse
        self.is_written = False
        self._tensor = torch.empty(output.shape[:3], dtype=torch.float32, device=output.device)

    @property
    def tensor(self) -> Tensor:
        """The numbers, by a launch of their own unless they are there."""
        if not self.is_written:
            self.is_written = True
            _launch_delta(self.output, self.d_output, self.d_lse, self._tensor)
        return self._tensor

    def unwritten(self) -> Tensor:
        """The memory for the numbers. The caller launches a kernel that writes them ahead of any that reads them."""
        self.is_written = True
        return self._tensor


def tensor_of(delta: Tensor | Delta) -> Tensor:
    """The numbers of delta, which are computed now if they are not there."""
    return delta.tensor if isinstance(delta, Delta) else delta


def launch_delta(output: Tensor, d_output: Tensor, d_lse: Tensor | None) -> Tensor:
    """``rowsum(dO * O) - dLSE``, contiguous float32 ``[B, H, L]``.

    Args:
        output: ``[B, H, L, Dv]``, any strides, and so are the next two.
        d_output: its gradient.
        d_lse: ``[B, H, L]``, the gradient of the LSE; None: zero.
    """
    return Delta(output, d_output, d_lse).tensor


def _launch_delta(output: Tensor, d_output: Tensor, d_lse: Tensor | None, delta: Tensor) -> None:
    batch, heads, seqlen_q, value_dim = output.shape
    if delta.numel() == 0:
        return
    launch(
        _delta_kernel, (triton.cdiv(seqlen_q, _BLOCK_M) * batch * heads,), output,
        strided(Heads, output), strided(Heads, d_output), strided(PerRow, d_lse), delta, heads, seqlen_q,
        VALUE_DIM=value_dim, BLOCK_DV=head_block(value_dim), BLOCK_M=_BLOCK_M,
    )  # fmt: skip
