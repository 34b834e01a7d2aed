"""A cache with a row of slots for each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.modules.layered_kv_cache import LayeredKVCache, rotary_words


class KVCache(LayeredKVCache):
    """A cache in which each sequence has ``max_length`` slots of its own, one behind the other.

    Args:
        layers: of the stack.
        batch: number of sequences.
        kv_heads: number of heads ``Hk`` of keys and values.
        max_length: how many tokens a sequence may have.
        head_dim: size ``D`` of a key.
        value_dim: size ``Dv`` of a value; None: ``head_dim``.
        dtype: of keys and values; None: torch's default.
        device: where they lie; None: torch's default.
        rotary_cos: ``[positions, R / 2]``, as for :func:`fastattn.attention_with_kvcache`: the caches then hold turned
            keys. Given once, it is used by every layer.
        rotary_sin: as ``rotary_cos``.
        rotary_interleaved: as there.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive, or a table is too short.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
    ) -> None:
        super().__init__(
            layers,
            batch,
            kv_heads,
            head_dim,
            value_dim,
            max_length,
            rows=batch,
            slots=max_length,
            dtype=dtype,
            device=device,
            rotary=rotary_words(rotary_cos, rotary_sin, rotary_interleaved),
        )

    def _make_room(self, tokens: int, chosen: range) -> None:
        """It is there."""

    def _fork(self, parents: list[int]) -> None:
        """Copy what is in use, of the sequences that change."""
        targets = [i for i, parent in enumerate(parents) if i != parent and self._lengths[parent]]
        sources = [parents[i] for i in targets]
        self._copy_rows(sources, targets, max((self._lengths[source] for source in sources), default=0))

    def _release(self, sequence: int, length: int) -> None:
        """Slots belong to their sequence for good."""

    def _room(self) -> str:
        return f"{sum(self._lengths)} of {self.batch * self.max_length} slots held"
