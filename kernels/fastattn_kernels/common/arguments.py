"""The named tuples in which kernels get tensors, masks and sizes, and how a launcher makes them.

Triton 3.6 to 3.8, interpreted and compiled, and its Gluon take a NamedTuple as a kernel argument, read its fields by
name and let a kernel build one. Four rules of the compiler's shape what stands here:

- A field that is None, or a stride that is 1, is a constant: what depends on it is decided at compile time.
- Numbers in a tuple are specialised on whatever ``do_not_specialize`` says. Lengths and bounds, which change from call
  to call, are therefore arguments of their own (``RUN_TIME``), from which a kernel builds :class:`Sizes`.
- A tuple that is given a name inside a kernel holds no other constants than None: the compiler turns them into run-time
  values. :class:`Blocks`, all of whose fields have to stay constants, is built in the call that it is passed to.
- Triton 3.6 loses constants of tuples in a tuple of kernel arguments; see :class:`Rules`.

The fields hold tensors and numbers on the host, pointers and scalars in a kernel.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# The kernel arguments that Triton must not specialise on: a new length is no reason to compile again.
RUN_TIME = (
    "heads", "group", "seqlen_q", "seqlen_k", "lower", "upper", "shift", "lists_per_batch", "lists_per_head",
    "sequences", "longest_q", "longest_k", "bottom_right",
)  # fmt: skip


class Heads(NamedTuple):
    """A tensor ``[B, H, length, size]``."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_d: Any


class Matrix(NamedTuple):
    """One head of :class:`Heads`, ``[length, size]``."""

    ptr: Any
    stride_row: Any
    stride_col: Any


class Pairs(NamedTuple):
    """A tensor of pairs of a query and a key, ``[B, H, L, S]``: a mask, a bias, weights, the gradient of a bias."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


class PerRow(NamedTuple):
    """A number for every row of every head, ``[B, H, L]``."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any


class PerKey(NamedTuple):
    """A number for every key, ``[B, S]``."""

    ptr: Any
    stride_b: Any
    stride_n: Any


class PerHead(NamedTuple):
    """A number for every head, ``[B, H]``."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class PerBatch(NamedTuple):
    """A number for every batch entry, ``[B]``."""

    ptr: Any
    stride_b: Any


class Documents(NamedTuple):
    """The document of every query, ``[B, L]``, and of every key, ``[B, S]``."""

    query_ptr: Any
    query_stride_b: Any
    query_stride_m: Any
    key_ptr: Any
    key_stride_b: Any
    key_stride_n: Any


class Captured(NamedTuple):
    """A tensor that a user's function reads, with tuples of its sizes and strides, 0 on the axes of size 1."""

    ptr: Any
    sizes: Any
    strides: Any


class ScoreMod(NamedTuple):
    """A user's function of scores, its gradient, and a tuple of :class:`Captured`; see ``functions.Modifier``."""

    captured: Any
    gradient: Any
    function: Any


class MaskMod(NamedTuple):
    """A user's function that says which keys a query sees, and a tuple of :class:`Captured`."""

    captured: Any
    function: Any


class Rules(NamedTuple):
    """What decides which keys a query sees, and what becomes of its scores; None: not there, and not compiled.

    Triton 3.6 builds a tuple of kernel arguments anew inside every loop and branch, by a type that it derived when it
    last put in a value of the tuple's own: first the run-time values, then the constants, each from left to right. The
    constants of a tuple inside it that are put in later are None in the loop. ``last_constant`` is put in last, as in
    :class:`ScoreMod` and :class:`MaskMod` the function is.

    Rules never get a name inside a kernel, for the functions are constants: they are handed on as an argument.
    """

    mask: Any = None
    bias: Any = None
    padding: Any = None
    documents: Any = None
    prefix: Any = None
    alibi_slopes: Any = None
    softcap: Any = None
    score_mod: Any = None
    mask_mod: Any = None
    last_constant: None = None


class Sizes(NamedTuple):
    """The lengths and the bounds of a call: row ``i`` sees keys ``i + lower <= j <= i + upper``, and stands at key
    position ``i + shift``. A bound that is None does not exist."""

    seqlen_q: Any
    seqlen_k: Any
    lower: Any
    upper: Any
    shift: Any


class At(NamedTuple):
    """The batch entry and the head that a tile belongs to, 64 bits wide; and where its queries are those of a cache,
    the slot at which the first of them stands, from which a user's function counts them."""

    batch: Any
    head: Any
    first_slot: Any = None


class Dropout(NamedTuple):
    """A pointer to seed and offset, int64 ``[2]``, and the probability of dropping."""

    state_ptr: Any
    p: Any


class TileLists(NamedTuple):
    """The lists of ``tile_map``: a pointer (None: arithmetic says which tiles are visited), and how many lists there
    are for each batch entry and head, 0 where all share theirs."""

    ptr: Any
    per_batch: Any
    per_head: Any


class WeightsShare(NamedTuple):
    """The gradient of the returned weights, ``[B, H, L, S]``, and the share of it that is a single head's."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any
    share: Any


class OnlyIf(NamedTuple):
    """A pointer to a byte, and what it has to be for a kernel to do anything."""

    flag_ptr: Any
    expected: Any


class Blocks(NamedTuple):
    """The compile-time sizes of a kernel's tiles, all of them constants.

    Attributes:
        M: rows of a tile.
        N: keys of a tile.
        D: columns of a tile of queries or keys, of which HEAD_DIM are used.
        DV: columns of a tile of values, of which VALUE_DIM are used.
        HEAD_DIM: the head size of queries and keys.
        VALUE_DIM: the head size of values.
        PRECISION: ``input_precision`` of the products.
        CAREFUL: whether products keep NaN and inf of what is masked out where they are; see ``tiles.weighted_sum``.
    """

    M: Any
    N: Any
    D: Any
    DV: Any
    HEAD_DIM: Any
    VALUE_DIM: Any
    PRECISION: Any
    CAREFUL: Any


Described = TypeVar("Described", bound=tuple[Any, ...])


def strided(kind: type[Described], tensor: Tensor | None) -> Described | None:
    """A tensor as a kernel argument of some kind: the tensor, then its strides, 0 on the axes of size 1.

    Those axes broadcast, and nothing is expanded. Booleans are seen as bytes. None stays None.
    """
    return None if tensor is None else kind(*pointer_and_strides(tensor))


def pointer_and_strides(tensor: Tensor) -> tuple[Any, ...]:
    """What :func:`strided` is made of."""
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *strides)


def documents(query_documents: Tensor | None, key_documents: Tensor | None) -> Documents | None:
    """The argument for the documents of queries and keys, which are given together or not at all."""
    if query_documents is None or key_documents is None:
        return None
    return Documents(*pointer_and_strides(query_documents), *pointer_and_strides(key_documents))
