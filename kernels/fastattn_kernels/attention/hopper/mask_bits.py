"""Boolean masks as bits, in the order in which the threads of a warpgroup hold a tile of scores.

In the accumulator of a wgmma a thread holds, of each of its rows and of every 64 keys, the 16 keys ``8 i + 2 q + e``:
``q`` is its place among the four threads of the row, ``i`` < 8, ``e`` < 2. Their bits, ``2 i + e``, are one int16. For
128 keys of a row a thread then loads two words, not 32 bytes; the mask takes an eighth of the memory; and unpacking
takes no shuffle, and no shift by a number that is unknown at compile time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from fastattn_kernels.attention.hopper.compat import gluon
from fastattn_kernels.attention.hopper.config import CONSUMER_ROWS
from fastattn_kernels.common.launch import launch

# Rows of a warpgroup's tile, and the keys of a group of words: one word for each of the four threads of a row.
ROWS = gl.constexpr(CONSUMER_ROWS)
_GROUP = 64
# Keys are padded to whole tiles, with zeros, of whatever size.
_PADDED_TO = 256
_TILE = (16, 32)  # rows and words that a program packs


@triton.jit(do_not_specialize=["heads", "rows", "keys", "words"])
def _pack_kernel(
    words_ptr, mask_ptr, stride_b, stride_h, stride_m, stride_n, heads, rows, keys, words, HIDDEN,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of words; a bit is 1 where the mask's byte is not HIDDEN."""
    tiles_n = tl.cdiv(words, WORDS)
    tiles = tl.cdiv(rows, ROWS) * tiles_n
    pid = tl.program_id(0).to(tl.int64)
    head = pid // tiles
    row = pid % tiles // tiles_n * ROWS + tl.arange(0, ROWS)[:, None]
    word = (pid % tiles_n * WORDS + tl.arange(0, WORDS))[None, :]
    bit = tl.arange(0, 16)[None, None, :]
    key = (word // 4 * 64 + word % 4 * 2)[:, :, None] + bit // 2 * 8 + bit % 2
    row_ptrs = mask_ptr + head // heads * stride_b + head % heads * stride_h + row * stride_m
    read = (row < rows)[:, :, None] & (key < keys)
    byte = tl.load(row_ptrs[:, :, None] + key * stride_n, mask=read, other=HIDDEN)
    bits = tl.sum((byte != HIDDEN).to(tl.int32) << bit, 2)
    inside = (row < rows) & (word < words)
    tl.store(words_ptr + (head * rows + row) * words + word, bits.to(tl.int16), mask=inside)


def pack_mask(mask: Tensor, seqlen_k: int, hidden: bool = False) -> Tensor:
    """A boolean ``[B | 1, H | 1, L | 1, S | 1]`` as int16 ``[B | 1, H | 1, L | 1, words]``: bits of keys that are not
    ``hidden``, 0 past the last one. What broadcasts stays as small as it is, but for the keys."""
    batch, heads, rows, keys = mask.shape
    words = int(triton.cdiv(seqlen_k, _PADDED_TO)) * _PADDED_TO // 16
    packed = torch.empty(batch, heads, rows, words, dtype=torch.int16, device=mask.device)
    tiles = int(triton.cdiv(rows, _TILE[0]) * triton.cdiv(words, _TILE[1]))
    stride_n = 0 if keys == 1 else mask.stride(3)
    launch(
        _pack_kernel, (batch * heads * tiles,), mask,
        packed, mask.view(torch.uint8), *mask.stride()[:3], stride_n, heads, rows, seqlen_k, words, int(hidden),
        ROWS=_TILE[0], WORDS=_TILE[1],
    )  # fmt: skip
    return packed


@gluon.constexpr_function
def owner_layout(BLOCK_N):
    """The accumulator's layout of a ``[64, BLOCK_N]`` tile, seen as ``[row, group, i, q, e]``."""
    groups = [[0, 1 << bit, 0, 0, 0] for bit in range((BLOCK_N // _GROUP).bit_length() - 1)]
    registers = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0], *groups]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    warps = [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, BLOCK_N // _GROUP, 8, 4, 2])


@gluon.jit
def load_words(words, row_offsets, col_start, BLOCK_N: gl.constexpr):
    """The words ``[64, BLOCK_N / 64, 4]`` of a tile: ``words`` points to its first row, ``row_offsets`` are int32."""
    OWNER: gl.constexpr = owner_layout(BLOCK_N)
    WORDS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, OWNER))
    offsets = gl.convert_layout(row_offsets, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)), assert_trivial=True)
    group = gl.arange(0, BLOCK_N // 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, WORDS)))
    word = group[None, :][:, :, None] * 4 + thread[None, :][None, :, :]
    return gl.load(words + col_start // 16 + offsets[:, None][:, :, None] + word)


@gluon.jit
def unpack_words(words, SCORES: gl.constexpr, BLOCK_N: gl.constexpr):
    """The words' bits as a boolean tile in the layout SCORES."""
    OWNER: gl.constexpr = owner_layout(BLOCK_N)
    ELEMENTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, OWNER)))
    i = gl.arange(0, 8, layout=gl.SliceLayout(1, ELEMENTS))[:, None]
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, ELEMENTS))[None, :]
    bit = (i * 2 + e)[None, :, :][:, None, :, :][:, :, :, None, :]  # [1, 1, 8, 1, 2]: a constant in every register
    seen = (words.to(gl.int32)[:, :, None, :][:, :, :, :, None] & (1 << bit)) != 0
    return gl.convert_layout(seen.reshape([64, BLOCK_N]), SCORES, assert_trivial=True)
