"""Memory for the keys and values that a stack of layers keeps of the tokens so far.

A step of decoding is the same whichever cache there is::

    cache.reserve(1)  # room for one more token of every sequence
    for layer in range(layers):
        ...
        output = cache.attend(layer, query, key, value)
        ...
    cache.advance(1)  # the token is held by all layers now

The host keeps the lengths as well, so that nothing here waits for the device. What a kernel reads (keys, values,
lengths and, where there is one, the block table) never moves: a CUDA graph that captured
:meth:`~LayeredKVCache.attend` of all layers is right at every later step, with the other calls made between replays.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.modules._common import check_number
from fastattn.ops import attention_with_kvcache
from fastattn.ops.common.checks import DTYPES


class CacheFullError(RuntimeError):
    """A cache has no room for the tokens that were asked for. It is as it was before.

    Attributes:
        asked: how many slots (contiguous) or pages (paged) were asked for.
        held: how many of them are in use.
        free: how many are not.
    """

    def __init__(self, message: str, asked: int, held: int, free: int) -> None:
        super().__init__(message)
        self.asked, self.held, self.free = asked, held, free

    def __reduce__(self) -> tuple[Any, ...]:
        """What is pickled, as when a worker process hands it on: all arguments, of which ``args`` holds the message."""
        return type(self), (str(self), self.asked, self.held, self.free)


class LayeredKVCache(abc.ABC):
    """What :class:`fastattn.KVCache` and :class:`fastattn.PagedKVCache` have in common: lengths, and all checks.

    Attributes:
        key_cache: ``[layers, batch, Hk, S, D]``, or ``[layers, pages, Hk, page_size, D]``.
        value_cache: the same, ``Dv`` wide.
        lengths: int32 ``[batch]``, on the device: how many tokens of each sequence are held.
        batch: how many sequences there is memory for.
        max_length: how many tokens a sequence may have.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        max_length: int,
        *,
        rows: int,
        slots: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        rotary: Mapping[str, Any],
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"layers": layers, "batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in (sizes | {"max_length": max_length}).items():
            check_number(name, size)
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype={dtype}: expected float16, bfloat16, float32 or float64")
        for name in ("rotary_cos", "rotary_sin"):
            table = rotary.get(name)
            if table is not None and not isinstance(table, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(table).__name__}")
            if table is not None and (table.dim() != 2 or len(table) < max_length or 2 * table.shape[1] > head_dim):
                raise ValueError(
                    f"{name} has shape {tuple(table.shape)}: expected [at least {max_length}, at most {head_dim // 2}]"
                )
        self.batch, self.max_length = batch, max_length
        # Not filled: what no slot in use holds takes no part, whatever it is.
        self.key_cache = torch.empty(layers, rows, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.value_cache = torch.empty(layers, rows, kv_heads, slots, value_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._lengths = [0] * batch  # the same, on the host
        self._reserved = [0] * batch  # for how many tokens behind those there is room
        self._rotary = rotary

    @property
    def block_table(self) -> Tensor | None:
        """int32 ``[batch, pages of a sequence]``, on the device; None where there are no pages."""
        return None

    @property
    def layers(self) -> int:
        """How many layers there is memory for."""
        return self.key_cache.shape[0]

    @property
    def lengths_on_host(self) -> list[int]:
        """How many tokens of each sequence are held; a copy, read without waiting for the device."""
        return list(self._lengths)

    def reserve(self, tokens: int, sequences: slice | None = None) -> None:
        """Make room for the next ``tokens`` of every sequence, which :meth:`attend` may then write.

        Args:
            tokens: how many.
            sequences: those that need room; None: all.

        Raises:
            CacheFullError: there is no such room. Nothing is changed then.
            TypeError: ``tokens`` is no int.
            ValueError: ``tokens`` is negative, or there are no such sequences.
        """
        check_number("tokens", tokens, 0)
        chosen = self._chosen(sequences)
        longest = max((self._lengths[sequence] for sequence in chosen), default=0)
        if longest + tokens > self.max_length:
            message = (
                f"reserve({tokens}): {tokens} slots asked for, {longest} held and {self.max_length - longest} free of "
                f"the {self.max_length} that a sequence may have"
            )
            raise CacheFullError(message, tokens, longest, self.max_length - longest)
        self._make_room(tokens, chosen)
        for sequence in chosen:
            self._reserved[sequence] = max(self._reserved[sequence], tokens)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        sequences: slice | None = None,
        **words: Any,
    ) -> Any:
        """:func:`fastattn.attention_with_kvcache` on what one layer holds.

        Lengths stay as they are: every layer of a step begins with the same, and :meth:`advance` ends the step. Where
        the cache has rotary tables, they turn queries and new keys; without new keys nothing is turned.

        Args:
            layer: which one.
            query: ``[B, H, L, D]``, of all sequences or of ``sequences``.
            key: ``[B, Hk, L, D]``: new keys, which are written behind those that are held; None: nothing is new.
            value: ``[B, Hk, L, Dv]``, or None with ``key``.
            sequences: those that the query is of, neighbours; None: all.
            **words: what else that function takes: ``is_causal``, ``window``, ``attn_mask``, ``return_lse``,
                ``backend`` and so on.

        Returns:
            What that function returns, ``[B, H, L, Dv]``, or with ``return_lse`` a pair.

        Raises:
            TypeError: ``layer`` is no int, or an argument is no tensor.
            ValueError: there is no such layer, the batch is another one, or no room was reserved.
        """
        check_number("layer", layer, 0, self.layers - 1, "a layer")
        chosen = self._chosen(sequences)
        self._check_batch("query", query, chosen)
        if key is not None:
            self._check_batch("key", key, chosen)
            room = min([key.shape[2], *(self._reserved[sequence] for sequence in chosen)])
            if key.shape[2] > room:
                raise ValueError(
                    f"key has {key.shape[2]} new tokens but room is reserved for {room}: call reserve({key.shape[2]}) "
                    "first"
                )
            words = {**self._rotary, **words}
        first, last = chosen.start, chosen.stop
        keys, values = self.key_cache[layer], self.value_cache[layer]
        if self.block_table is None:
            keys, values = keys[first:last], values[first:last]
        else:
            words["block_table"] = self.block_table[first:last]
        return attention_with_kvcache(query, keys, values, key, value, cache_seqlens=self.lengths[first:last], **words)

    def advance(self, tokens: int | Sequence[int] | Tensor, sequences: slice | None = None) -> None:
        """Hold the next tokens, once all layers have written them.

        Args:
            tokens: one number for all sequences, or one for each. It may be less than was written, as for prompts of
                unequal length or a draft that was accepted in part: the next tokens then overwrite the rest.
            sequences: those that grow; None: all.

        Raises:
            TypeError: a number is no int.
            ValueError: a number is negative, or beyond what was reserved; or there is not one for each sequence.
        """
        chosen = self._chosen(sequences)
        counts = self._one_each("tokens", tokens, chosen)
        for sequence, count in zip(chosen, counts):
            check_number(f"tokens[{sequence}]", count, 0, self._reserved[sequence], "what room is reserved for,")
        for sequence, count in zip(chosen, counts):
            self._lengths[sequence] += count
            self._reserved[sequence] -= count
        self._write_lengths()

    def fork(self, parents: Sequence[int] | Tensor) -> None:
        """Make sequence ``i`` a copy of what sequence ``parents[i]`` was before, all of them at once.

        Sequences for which there is no parent are freed. What was reserved is forgotten.

        Args:
            parents: one for each of the first sequences. A tensor is read from the device, which waits for it.

        Raises:
            ValueError: there are more parents than sequences, or one of them is no sequence.
        """
        parents = _as_list(parents)
        if len(parents) > self.batch:
            raise ValueError(f"parents: {len(parents)} of them, expected at most {self.batch}, one a sequence")
        for parent in parents:
            check_number("parents", parent, 0, self.batch - 1, "sequences")
        self._fork(parents)
        missing = self.batch - len(parents)
        self._lengths = [self._lengths[parent] for parent in parents] + [0] * missing
        self._reserved = [0] * self.batch
        self._write_lengths()

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget the last tokens of sequences, as speculative decoding does with a draft that was refused.

        Args:
            lengths: how many tokens to keep of each; a single int: at most so many of every sequence.

        Raises:
            TypeError: a number is no int.
            ValueError: a length is negative or longer than what is held, or there is not one for each sequence.
        """
        if isinstance(lengths, int):
            check_number("lengths", lengths, 0)
            kept = [min(lengths, held) for held in self._lengths]
        else:
            kept = self._one_each("lengths", lengths, range(self.batch))
        for sequence, (length, held) in enumerate(zip(kept, self._lengths)):
            check_number(f"lengths[{sequence}]", length, 0, held, "a length")
        for sequence, length in enumerate(kept):
            if length < self._lengths[sequence]:
                self._drop(sequence, length)
        self._write_lengths()

    def free(self, sequences: Iterable[int]) -> None:
        """Forget all tokens of these sequences, and what was reserved for them.

        Raises:
            ValueError: there is no such sequence.
        """
        sequences = list(sequences)  # read twice
        for sequence in sequences:
            check_number("sequences", sequence, 0, self.batch - 1, "sequences")
        for sequence in sequences:
            self._drop(sequence, 0)
        self._write_lengths()

    def reset(self) -> None:
        """Forget all tokens of all sequences."""
        self.free(range(self.batch))

    # ------------------------------------------------------------------------------------------- what caches differ in

    @abc.abstractmethod
    def _make_room(self, tokens: int, chosen: range) -> None:
        """Make room for so many tokens of each, or raise CacheFullError; ``max_length`` was looked at."""

    @abc.abstractmethod
    def _fork(self, parents: list[int]) -> None:
        """Give each sequence what its parent holds; the lengths are still those from before."""

    @abc.abstractmethod
    def _release(self, sequence: int, length: int) -> None:
        """Give back what a sequence does not need for so many tokens."""

    # -------------------------------------------------------------------------------------------------------- helpers

    def _copy_rows(self, sources: Sequence[int], targets: Sequence[int], slots: int) -> None:
        """Copy the first slots of rows of the caches to other rows, all at once.

        A layer at a time, so that what is held in between is small. (On a CPU, one ``index_select`` of rows of all
        layers takes fifty times as long.)
        """
        if not sources:
            return
        read, written = self._to_device([sources, targets])
        for caches in (self.key_cache, self.value_cache):
            for cache in caches[:, :, :, :slots]:
                cache.index_copy_(0, written, cache.index_select(0, read))

    def _to_device(self, numbers: Any) -> Tensor:
        """A few numbers of the host as int64, without waiting for the device."""
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(self.lengths.device, non_blocking=True)

    def _drop(self, sequence: int, length: int) -> None:
        self._lengths[sequence], self._reserved[sequence] = length, 0
        self._release(sequence, length)

    def _write_lengths(self) -> None:
        """On the device, in place."""
        self.lengths.copy_(self._to_device(self._lengths))

    def _chosen(self, sequences: slice | None) -> range:
        """Which sequences are meant."""
        if sequences is None:
            return range(self.batch)
        if not isinstance(sequences, slice):
            raise TypeError(f"sequences={sequences!r}: expected a slice or None, got {type(sequences).__name__}")
        chosen = range(self.batch)[sequences]
        if chosen.step != 1 or any(
            bound is not None and bound > self.batch for bound in (sequences.start, sequences.stop)
        ):
            raise ValueError(f"sequences={sequences}: expected neighbours among the {self.batch} sequences")
        return chosen

    def _one_each(self, name: str, numbers: int | Sequence[int] | Tensor, sequences: range) -> list[int]:
        """A number for each of these sequences."""
        if not isinstance(numbers, (Sequence, Tensor)):
            return [numbers] * len(sequences)
        if len(numbers) != len(sequences):
            raise ValueError(f"{name}: {len(numbers)} numbers, expected {len(sequences)}, one for each sequence")
        return _as_list(numbers)

    @staticmethod
    def _check_batch(name: str, tensor: Tensor, sequences: range) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4 or tensor.shape[0] != len(sequences):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected [{len(sequences)}, heads, length, size], of "
                f"sequences {sequences.start} to {sequences.stop - 1}"
            )

    @abc.abstractmethod
    def _room(self) -> str:
        """How much there is and how much is in use, in words."""

    def __repr__(self) -> str:
        _, _, heads, _, size = self.key_cache.shape
        sizes = f"layers={self.layers}, batch={self.batch}, kv_heads={heads}, head_dim={size}"
        return f"{type(self).__name__}({sizes}, {self._room()})"


def rotary_words(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> dict[str, Any]:
    """The arguments of a call that turns queries and keys; none where there are no tables."""
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin: expected both or neither")
    return {} if cos is None else {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}


def _as_list(numbers: Sequence[int] | Tensor) -> list[int]:
    return numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
