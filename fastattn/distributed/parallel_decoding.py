"""Decoding with a model that is shared out.

Tensor-parallel ranks each keep the keys and values of their own heads. The ranks of a context each keep those of some
of the tokens, for all heads that they have: those of their shards of the prompt, and in turn those of the tokens behind
it. Each query of these meets the keys of every rank, and what it finds there is merged by the LSEs (the partial softmax
of flash decoding, across ranks); what is no attention all ranks of the context compute alike. So the ranks along both
dimensions have the same logits, and say what the first of them says. The ranks of a batch each say their own, and stop
together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fastattn.distributed import exchange
from fastattn.distributed.agreement import agree, digest
from fastattn.distributed.api import context_parallel_attention
from fastattn.distributed.layout import Place, places_in
from fastattn.distributed.parallel_attention import Context, ParallelMultiheadAttention
from fastattn.models._decoding import DecodingCache
from fastattn.modules import CacheFullError, KVCache, MultiheadAttention
from fastattn.ops.attention.partial import Merge


class ParallelCache(DecodingCache):
    """What this rank keeps between two steps of decoding.

    Args:
        layers: as for the class that it is made of, and so are the others.
        batch: as there.
        max_length: as there.
        memory: as there, whole; each rank keeps all of it, of its own heads.
        memory_padding: as there.
        mesh: the ranks of the model, by the names of the dimensions.
        context: how sequences are shared out, or None.
        keeps_whole: FSDP2 was told not to shard a layer's parameters again behind its forward.
        **pages: as there; not with a context.

    Raises:
        NotImplementedError: there are a context and pages.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        batch: int,
        max_length: int,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        *,
        mesh: DeviceMesh,
        context: Context | None,
        keeps_whole: bool,
        **pages: Any,
    ) -> None:
        names = mesh.mesh_dim_names or ()
        self._alike = tuple(_place(mesh, name) for name in ("context", "tensor") if name in names)
        self._data = _place(mesh, "data") if "data" in names else None
        self._context, self._keeps_whole = context, keeps_whole
        self._held, self._longest = 0, max_length  # of the whole sequences
        self._takes_shards = False
        room = max_length
        if context is not None:
            if pages.get("page_size") is not None:
                raise NotImplementedError(
                    f"page_size={pages['page_size']} with a 'context': a rank keeps its tokens in rows of slots; pass "
                    "page_size=None"
                )
            room = min(max_length, -(-max_length // context.mesh.size()) + 1)
        super().__init__(layers, batch, room, memory, memory_padding, **pages)

    @property
    def length(self) -> int:
        """How many positions the sequences have, on all ranks together."""
        return super().length if self._context is None else self._held

    @contextlib.contextmanager
    def reading(self, layer: Any) -> Generator[None]:
        """Whole parameters, of those that FSDP2 shards."""
        is_sharded = isinstance(layer, FSDPModule)
        if is_sharded:
            layer.unshard()
        try:
            yield
        finally:
            if is_sharded and not self._keeps_whole:
                layer.reshard()

    def projection(self, attention: MultiheadAttention) -> tuple[int, Tensor, Tensor | None]:
        """Of this rank's heads."""
        if not isinstance(attention, ParallelMultiheadAttention):  # the mesh has data alone
            return super().projection(attention)
        weight, _, bias, *_ = attention.own_parameters()
        assert weight is not None, "the layers of a transformer have one size for all three"
        return weight.shape[0] // (3 * attention.head_dim), weight, bias

    def project_back(self, attention: MultiheadAttention, merged: Tensor) -> Tensor:
        """The sum over the ranks that share the heads."""
        if not isinstance(attention, ParallelMultiheadAttention):
            return super().project_back(attention, merged)
        return attention.project_back(merged)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Any:
        """With a context: of this rank's shard of the first positions, or of the next one, which all ranks have."""
        context, kv = self._context, self.kv
        if context is None:
            return super().attend(index, query, key, value, backend)
        assert isinstance(kv, KVCache)
        if self._takes_shards:
            rows, slots = slice(0, len(query)), slice(0, query.shape[2])
            kv.key_cache[index, rows, :, slots], kv.value_cache[index, rows, :, slots] = key, value
            words: dict[str, Any] = {"method": context.method, "balance": context.balance, "backend": backend}
            return context_parallel_attention(query, key, value, context.mesh, is_causal=True, **words)
        words = {"sequences": slice(0, len(query)), "backend": backend, "return_lse": True}
        if self._is_own_turn():
            part = kv.attend(index, query, key, value, **words)
        else:
            part = kv.attend(index, query, is_causal=False, **words)
        (place,) = places_in(context.mesh)
        merged = Merge(query, value.shape[3])
        for output, lse in zip(*exchange.all_gather(part, place)):
            merged.add(output, lse, slice(None))
        return merged.finish(None)[0].to(query.dtype)

    @contextlib.contextmanager
    def taking_shards(self) -> Generator[None]:
        """While it lasts, positions are those of this rank's shard of a sequence's beginning."""
        self._takes_shards = True
        try:
            yield
        finally:
            self._takes_shards = False

    def reserve(self, tokens: int, sequences: slice) -> None:
        """Of the positions that this rank will keep."""
        if self._context is None:
            return super().reserve(tokens, sequences)
        free = self._longest - self._held
        if self._of_all_ranks(tokens) > free:  # which all ranks find
            raise CacheFullError(
                f"reserve({tokens}): {tokens} slots asked for, {self._held} held and {free} free of the "
                f"{self._longest} that a sequence may have",
                tokens,
                self._held,
                free,
            )
        return super().reserve(self._own(tokens), sequences)

    def advance(self, tokens: int, sequences: slice) -> None:
        """Of the positions that this rank keeps."""
        if self._context is None:
            return super().advance(tokens, sequences)
        super().advance(self._own(tokens), sequences)
        self._held += self._of_all_ranks(tokens)
        return None

    def check_alike(self, prompt: Tensor, words: dict[str, Any]) -> None:
        """As the base class; a batch's ranks have prompts of their own, and draw by seeds of their own."""
        agree({"prompt": digest(prompt), **words}, {}, None, self._alike, prompt.device)
        if self._data is not None:
            agree({name: words[name] for name in ("length", "end")}, {}, None, (self._data,), prompt.device)

    def agreed(self, tensor: Tensor) -> Tensor:
        """The first rank's, along the tensor and along the context."""
        for place in reversed(self._alike):
            tensor = exchange.from_first(tensor, place, "the broadcast of what is said next")
        return tensor

    def everywhere(self, is_done: bool) -> bool:
        """Whether all ranks of a batch are done: those that are not need the others' shards of the parameters."""
        if self._data is None:
            return is_done
        own = torch.tensor([is_done], device=self.kv.lengths.device)
        return bool(exchange.all_gather([own], self._data)[0].all())

    def _of_all_ranks(self, tokens: int) -> int:
        """How many positions sequences have more, where this rank computes so many."""
        return tokens * (self._context.mesh.size() if self._takes_shards and self._context is not None else 1)

    def _own(self, tokens: int) -> int:
        """How many of them this rank keeps."""
        return tokens if self._takes_shards or self._is_own_turn() else 0

    def _is_own_turn(self) -> bool:
        """Whether the next single position is for this rank to keep."""
        assert self._context is not None
        return self._held % self._context.mesh.size() == self._context.mesh.get_local_rank()


def _place(mesh: DeviceMesh, name: str) -> Place:
    return places_in(mesh[name])[0]
