"""What the kernels over a key/value cache are told: the tensors and numbers of one call."""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor

from fastattn_kernels.common.arguments import (
    Pairs,
    PerBatch,
    PerHead,
    PerKey,
    Rules,
    pointer_and_strides,
    strided,
)
from fastattn_kernels.common.config import Load
from fastattn_kernels.common.functions import Modifier

# The kernel arguments that Triton must not specialise on, beside those of all kernels of attention.
OF_CACHES = (
    "batches", "kv_heads", "new", "room", "pages", "positions", "splits", "all_rows", "tiles",
)  # fmt: skip


class Rotary(NamedTuple):
    """The cosine and the sine of every angle, ``[positions, R / 2]`` both."""

    cos_ptr: Any
    cos_stride_p: Any
    cos_stride_d: Any
    sin_ptr: Any
    sin_stride_p: Any
    sin_stride_d: Any


@dataclasses.dataclass(frozen=True)
class CacheProblem:
    """One call's inputs, already validated but for the numbers that only the device knows.

    Those are taken as they come: a length is clamped to the room there is, tokens behind it are dropped, and slots of a
    page that does not exist are seen by nobody. No memory is touched that is not the problem's.

    Attributes:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32, any strides; so are all tensors below.
        key_cache: ``[B, Hk, S, D]``, or with a ``block_table`` ``[pages, Hk, page_size, D]``.
        value_cache: the same, ``Dv`` wide.
        cache_seqlens: int32 ``[B]``: how many slots were in use before the new tokens.
        scale: multiplies the products of queries and keys.
        key: ``[B, Hk, L, D]``: belongs into the slots ``cache_seqlens`` and following; None: nothing is new.
        value: ``[B, Hk, L, Dv]``.
        block_table: int32 ``[B, pages of a sequence]``; None: the cache has a batch entry for each sequence.
        cache_leftpad: int32 ``[B]``: so many first slots are padding.
        rotary_cos: ``[positions, R / 2]``, floating: of the angles by which queries and new keys are turned.
        rotary_sin: the same.
        rotary_interleaved: whether features ``2 i`` and ``2 i + 1`` are a pair, and not ``i`` and ``i + R / 2``.
        bias: ``[B | 1, H | 1, L | 1, slots | 1]``, floating, added to the scores; a sequence has no slots beyond it.
        alibi_slopes: ``[B | 1, H]``, floating.
        sinks: ``[B | 1, H]``, floating.
        lower: the query at slot ``p`` sees slots ``>= p + lower``; None: no such bound.
        upper: the query at slot ``p`` sees slots ``<= p + upper``; None: no such bound.
        softcap: scores become ``softcap * tanh(score / softcap)`` before anything is added; None: they stay.
        score_mod: a function that changes the scores behind the softcap. A query's index is the slot at which it
            stands, and a key's is its slot.
        mask_mod: a function that says which slots a query sees, of those that all else leaves visible.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cache_seqlens: Tensor
    scale: float
    key: Tensor | None = None
    value: Tensor | None = None
    block_table: Tensor | None = None
    cache_leftpad: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    lower: int | None = None
    upper: int | None = None
    softcap: float | None = None
    score_mod: Modifier | None = None
    mask_mod: Modifier | None = None

    @property
    def room(self) -> int:
        """How many slots a sequence may have."""
        size = self.key_cache.shape[2]
        return size if self.block_table is None else size * self.block_table.shape[1]

    @property
    def seen_room(self) -> int:
        """How many of them may be seen: no more than the bias, past whose end a longer sequence would read."""
        of_bias = 1 if self.bias is None else self.bias.shape[3]
        return self.room if of_bias == 1 else min(self.room, of_bias)

    @property
    def group(self) -> int:
        """How many heads share a head of keys."""
        return self.query.shape[1] // max(self.key_cache.shape[1], 1)

    @property
    def rows(self) -> int:
        """How many rows share the keys of a head: the queries of all heads of a group."""
        return self.group * self.query.shape[2]

    def hides_from_some(self) -> bool:
        """Whether one query may see a slot that another one of the same tile may not.

        Slots that none of a tile's queries sees are not even read, unless it is the bias or a function that hides them.
        """
        is_bounded = self.lower is not None or self.upper is not None
        hides = self.bias is not None or self.score_mod is not None or self.mask_mod is not None
        return hides or (is_bounded and self.query.shape[2] > 1)

    def load(self) -> Load:
        """What a tile of scores carries beside itself."""
        adds = self.bias is not None or self.alibi_slopes is not None or self.softcap is not None
        return "heavy" if adds or self.score_mod is not None or self.mask_mod is not None else "plain"

    def of_sequences(self) -> tuple[PerBatch | None, PerBatch | None, PerKey | None]:
        """The kernel arguments ``seqlens, leftpad, table``."""
        return (
            strided(PerBatch, self.cache_seqlens),
            strided(PerBatch, self.cache_leftpad),
            strided(PerKey, self.block_table),
        )

    def rotary(self) -> tuple[Rotary | None, int]:
        """The kernel arguments ``rotary, positions``."""
        if self.rotary_cos is None or self.rotary_sin is None:
            return None, 0
        cos, sin = self.rotary_cos, self.rotary_sin
        return Rotary(*pointer_and_strides(cos), *pointer_and_strides(sin)), cos.shape[0]

    def rules(self) -> Rules:
        """The kernel argument ``rules``."""
        return Rules(
            bias=strided(Pairs, self.bias),
            alibi_slopes=strided(PerHead, self.alibi_slopes),
            softcap=self.softcap,
            score_mod=self.score_mod and self.score_mod.score_mod(),
            mask_mod=self.mask_mod and self.mask_mod.mask_mod(),
        )

    def constants(self) -> dict[str, int | bool]:
        """What kernels know of pages and of rotary embedding when they are compiled: models have one of each."""
        return {
            "PAGE_SIZE": 0 if self.block_table is None else self.key_cache.shape[2],
            "ROTARY_DIM": 0 if self.rotary_cos is None else 2 * self.rotary_cos.shape[1],
            "INTERLEAVED": self.rotary_interleaved,
        }
