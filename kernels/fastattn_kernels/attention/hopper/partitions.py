"""The named tuples that the partitions of the backward kernels are given: descriptors, shared memory and barriers.

A kernel that owns keys makes dK and dV (and in the one-pass form dQ), one that owns rows makes dQ.
"""

from typing import Any, NamedTuple


class Descriptors(NamedTuple):
    """Descriptors of what the producer loads; bias: None where it is not read by tiles."""

    query: Any
    key: Any
    value: Any
    d_output: Any
    bias: Any


class NumberDescriptors(NamedTuple):
    """Descriptors of the numbers of rows that the producer loads; see ``backward_rows.row_numbers``."""

    pivots: Any
    deltas: Any
    inverse_sums: Any


class GradientDescriptors(NamedTuple):
    """Descriptors of what the kernel that owns keys stores, and the pointer of the keys' marks (None: nothing hides).
    ``d_query`` are the pieces of dQ, None but in one pass."""

    d_query: Any
    d_key: Any
    d_value: Any
    marks_ptr: Any


class Buffers(NamedTuple):
    """Shared memory for inputs: each consumer's own rows or keys, and rings of tiles of the other axis."""

    query: Any
    d_output: Any
    key: Any
    value: Any
    bias: Any


class RowNumbers(NamedTuple):
    """Rings of the numbers of rows that the consumers read: the pivot (where there is no inverse sum, the LSE in base
    2), delta, the inverse sum (None without a bias) and the index."""

    pivots: Any
    deltas: Any
    inverse_sums: Any
    ids: Any


class Mailbox(NamedTuple):
    """Rings of single numbers that the consumers are told of a tile: its first row, its head, and its piece of dQ."""

    start: Any
    head: Any
    piece: Any


class QueryGradientBuffers(NamedTuple):
    """Shared memory of the one-pass form, else None: two buffers of dS for each consumer, and one of its dQ."""

    ds: Any
    dq: Any


class KeyOwnerBarriers(NamedTuple):
    """Barriers whose phase ends with the bytes of a copy, in the kernel that owns keys."""

    keys_and_values: Any
    query: Any
    d_output: Any


class RowOwnerBarriers(NamedTuple):
    """Barriers whose phase ends with the bytes of a copy, in the kernel that owns rows."""

    query_and_d_output: Any
    key: Any
    value: Any


class Meeting(NamedTuple):
    """Barriers at which the two consumers wait for each other: for dS, and until both have read all keys."""

    ds_full: Any
    finished: Any
