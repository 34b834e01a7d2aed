"""Rotary position embedding (arXiv:2104.09864) of rows as they are loaded."""

import triton
import triton.language as tl


@triton.jit
def load_turned(
    ptrs, stride_d, belongs, position, rotary, positions,
    COLS: tl.constexpr, USED_COLS: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A float32 tile ``[N, COLS]`` of rows from pointers ``[N, 1]`` on, turned by the angles of their positions
    ``[N]``.

    Of each pair of features the other one is read as well, from lines that are in the cache by then. Features from
    ROTARY_DIM on stay as they are, and so does a row whose position has no angle.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    cols = tl.arange(0, COLS)[None, :]
    if INTERLEAVED:
        is_first = cols % 2 == 0
        other_col, angle = cols ^ 1, cols // 2
    else:
        is_first = cols < HALF
        other_col = tl.where(is_first, cols + HALF, cols - HALF)
        angle = tl.where(is_first, cols, cols - HALF)
    inside = belongs[:, None] & (cols < USED_COLS)
    turns = belongs[:, None] & (position < positions)[:, None] & (cols < ROTARY_DIM)
    x = tl.load(ptrs + cols.to(tl.int64) * stride_d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(ptrs + other_col.to(tl.int64) * stride_d, mask=turns, other=0.0).to(tl.float32)
    place = position.to(tl.int64)[:, None]
    cos_ptrs = rotary.cos_ptr + place * rotary.cos_stride_p + angle.to(tl.int64) * rotary.cos_stride_d
    sin_ptrs = rotary.sin_ptr + place * rotary.sin_stride_p + angle.to(tl.int64) * rotary.sin_stride_d
    cos = tl.load(cos_ptrs, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=turns, other=0.0).to(tl.float32)
    return x * cos + tl.where(is_first, -other, other) * sin
