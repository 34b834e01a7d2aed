"""Packed sequences: N of them lie behind one another in one batch entry, and offsets on the device say where.

No tile straddles two sequences. Tiles are numbered so that nobody has to add up lengths: those of sequence ``n`` begin
at the number ``offset // BLOCK + n``, where ``offset`` is its first row. A sequence has at most one tile more than
``length // BLOCK``, so that the next one's numbers begin behind its last. How many numbers there are is known from the
shapes alone, and a program finds the sequence of its number by bisection; a few numbers are nobody's.

To a kernel the sequence stands in the place of the batch entry: rules, positions and dropout count inside it. Only
where rows and keys lie in memory differs, and that is what :class:`Span` says.
"""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import At, Sizes


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the sequences of a packed problem lie.

    Offsets that descend, are negative or pass the end are clamped where they are read: what comes out then means
    nothing, but no memory is touched that is not the problem's.

    Attributes:
        cu_seqlens_q: int32 ``[N + 1]``, contiguous: the queries of sequence ``n`` are those from ``cu_seqlens_q[n]`` to
            before ``cu_seqlens_q[n + 1]``.
        cu_seqlens_k: the same of its keys.
        seqused_k: int32 ``[N]``, contiguous: so many first keys of each sequence are in use; None: all.
        bottom_right: whether causality, windows and positions count from the last key in use of each sequence:
            ``keys - queries`` of the sequence is then added to the problem's ``lower``, ``upper`` and ``shift``.
        longest: rows and keys of the longest sequences, where the host knows them; None: it does not. Of a longer one
            the rest is left out.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None = None
    bottom_right: bool = False
    longest: tuple[int, int] | None = None

    @property
    def sequences(self) -> int:
        """N."""
        return self.cu_seqlens_q.shape[0] - 1


class Offsets(NamedTuple):
    """Pointers to the tensors of :class:`Packed`."""

    query_ptr: Any
    key_ptr: Any
    used_ptr: Any


class Packing(NamedTuple):
    """What a kernel is told of packed sequences, in arguments of their own (``arguments.RUN_TIME``), of which it builds
    this; everything is None where nothing is packed. Whether anything is, ``sequences`` says: triton 3.6 does not
    compile the question whether a tuple is None where an element of it is, as ``offsets.used_ptr``.

    Attributes:
        offsets: where the sequences lie.
        sequences: how many there are.
        longest_q: rows of a sequence past so many are left out.
        longest_k: keys past so many are left out.
        bottom_right: 0 or 1.
    """

    offsets: Any
    sequences: Any
    longest_q: Any
    longest_k: Any
    bottom_right: Any


class Span(NamedTuple):
    """The batch entry or the sequence that a tile belongs to.

    Attributes:
        sizes: its lengths and bounds.
        sequence: which of the packed sequences; None: a batch entry, as are the next two.
        first_row: its first row among all rows, 64 bits wide.
        first_key: its first key among all keys.
        all_rows: how many rows a head has in memory.
        all_keys: how many keys.
    """

    sizes: Any
    sequence: Any
    first_row: Any
    first_key: Any
    all_rows: Any
    all_keys: Any


@triton.jit
def count_tiles(length, sequences, BLOCK: tl.constexpr):
    """How many numbers the tiles have of one head of a batch entry; see ``Problem.tiles_of_rows``."""
    if sequences is None:
        tiles = tl.cdiv(length, BLOCK)
    else:
        tiles = length // BLOCK + sequences
    return tiles


@triton.jit
def offset_of(index, offsets_ptr, length):
    """An offset, inside the memory whatever it is."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + index), 0), length)


@triton.jit
def sequence_of(number, offsets_ptr, sequences, length, BLOCK: tl.constexpr):
    """``(sequence, its first row, tile)`` of the number of a tile. The tile may lie in front of the sequence or behind
    it: then the number is nobody's."""
    first, last = 0, sequences
    while last - first > 1:
        middle = (first + last) // 2
        is_behind = number < offset_of(middle, offsets_ptr, length) // BLOCK + middle
        first, last = tl.where(is_behind, first, middle), tl.where(is_behind, middle, last)
    first_row = offset_of(first, offsets_ptr, length)
    return first, first_row, number - (first_row // BLOCK + first)


@triton.jit
def _length_of(sequence, first_row, offsets_ptr, length, longest):
    """The length of a sequence, inside the memory whatever the offsets are."""
    end = tl.maximum(offset_of(sequence + 1, offsets_ptr, length), first_row)
    return tl.minimum(end - first_row, longest)


@triton.jit
def span_of(sequence, sizes, packing):
    """The :class:`Span` of a packed sequence, or of any batch entry where nothing is packed. ``sizes`` are those of the
    tensors in memory."""
    offsets = packing.offsets
    if packing.sequences is None:
        span = Span(sizes, None, None, None, sizes.seqlen_q, sizes.seqlen_k)
    else:
        first_row = offset_of(sequence, offsets.query_ptr, sizes.seqlen_q)
        first_key = offset_of(sequence, offsets.key_ptr, sizes.seqlen_k)
        rows = _length_of(sequence, first_row, offsets.query_ptr, sizes.seqlen_q, packing.longest_q)
        keys = _length_of(sequence, first_key, offsets.key_ptr, sizes.seqlen_k, packing.longest_k)
        if offsets.used_ptr is not None:
            keys = tl.minimum(keys, tl.maximum(tl.load(offsets.used_ptr + sequence), 0))
        moved = packing.bottom_right * (keys - rows)
        lower, upper = None, None
        if sizes.lower is not None:
            lower = sizes.lower + moved
        if sizes.upper is not None:
            upper = sizes.upper + moved
        of_sequence = Sizes(rows, keys, lower, upper, sizes.shift + moved)
        span = Span(
            of_sequence, sequence, first_row.to(tl.int64), first_key.to(tl.int64), sizes.seqlen_q, sizes.seqlen_k
        )  # fmt: skip
    return span


@triton.jit
def find_tile(number, sizes, packing, BLOCK: tl.constexpr, OF_ROWS: tl.constexpr):
    """``(tile, span)`` of the number of a tile, of rows if OF_ROWS, else of keys; the tile is negative where the number
    is nobody's, or where all of its keys are unused. Where nothing is packed, the number is the tile."""
    if packing.sequences is None:
        tile = number
        span = span_of(None, sizes, packing)
    else:
        if OF_ROWS:
            sequence, _, tile = sequence_of(number, packing.offsets.query_ptr, packing.sequences, sizes.seqlen_q, BLOCK)
            span = span_of(sequence, sizes, packing)
            length = span.sizes.seqlen_q
        else:
            sequence, _, tile = sequence_of(number, packing.offsets.key_ptr, packing.sequences, sizes.seqlen_k, BLOCK)
            span = span_of(sequence, sizes, packing)
            length = span.sizes.seqlen_k
        tile = tl.where(tile * BLOCK < length, tile, -1)
    return tile, span


@triton.jit
def is_somebodys(tile, span):
    """Whether there is the tile that :func:`find_tile` has found. Where nothing is packed there always is, as is known
    when the kernel is compiled: a comparison spilled 80 bytes more in the careful backward (sm_120, head size 512)."""
    if span.sequence is None:
        found = True
    else:
        found = tile >= 0
    return found


@triton.jit
def place_of(entry, heads, span):
    """``(at, batch_head)`` of an entry: one of the heads of all batch entries, of which packed sequences have one. The
    second, the head counted over all batch entries or sequences, is what dropout draws by."""
    batch = (entry // heads).to(tl.int64)
    head = (entry % heads).to(tl.int64)
    batch_head = entry
    if span.sequence is not None:
        batch = tl.cast(span.sequence, tl.int64)
        batch_head = span.sequence * heads + entry
    return At(batch, head), batch_head


@triton.jit
def line_of(batch_head, at, first, length, PLANES: tl.constexpr):
    """Where the numbers of the rows (keys) of a head begin in contiguous ``[B, H, PLANES, length]``; ``first`` is that
    of the :class:`Span`."""
    if first is None:
        offset = PLANES * (tl.cast(batch_head, tl.int64) * length)
    else:
        offset = PLANES * (at.head * length) + first
    return offset
