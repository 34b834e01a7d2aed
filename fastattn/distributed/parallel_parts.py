"""What stands beside attention in a parallel model: parameters that all tensor-parallel ranks have, and trunks that
share sequences out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fastattn.distributed.parallel_attention import Context
from fastattn.distributed.parallel_decoding import ParallelCache
from fastattn.distributed.regions import local
from fastattn.distributed.sharing import position_ids, shard, unshard
from fastattn.models._checks import check_padding, check_tokens
from fastattn.models._decoding import DecodingCache
from fastattn.models.transformer import TransformerTrunk
from fastattn.modules import LearnedPositionalEncoding


def replicate_parameters(module: nn.Module, mesh: DeviceMesh, made: dict[int, nn.Parameter]) -> None:
    """Make the module's own parameters DTensors that all ranks have, as those that are shared out are DTensors: then
    optimizers and gradient clipping find one kind of tensor. The module computes on what is local.

    Args:
        module: of a class that reads its parameters as attributes.
        mesh: the tensor-parallel ranks; the parameters of the first become those of all.
        made: what became of parameters so far, by their ``id``: tied ones stay tied.
    """
    names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
    for name in names:
        before = module._parameters[name]
        assert before is not None
        if id(before) not in made:
            replicated = distribute_tensor(before.detach(), mesh, [Replicate()])
            made[id(before)] = nn.Parameter(replicated, requires_grad=before.requires_grad)
        module.register_parameter(name, made[id(before)])
    if names:
        module.__class__ = _reads_locally(type(module), names)


@functools.cache
def _reads_locally(kind: type[nn.Module], names: tuple[str, ...]) -> Any:
    """A subclass whose parameters read as this rank's plain tensors while it computes.

    At other times they read as they are, since FSDP2 looks at them by their names, too.
    """

    def reader(name: str) -> Any:
        def read(module: Any) -> Any:
            parameter = module._parameters[name]
            return local(parameter) if module.is_computing else parameter

        return property(read)

    def forward(module: Any, *arguments: Any, **words: Any) -> Any:
        module.is_computing = True
        try:
            return kind.forward(module, *arguments, **words)
        finally:
            module.is_computing = False

    members = {"is_computing": False, "forward": forward, **{name: reader(name) for name in names}}
    return type(f"Replicated{kind.__name__}", (kind,), members)


class ContextPositionalEncoding(LearnedPositionalEncoding):
    """:class:`fastattn.LearnedPositionalEncoding` of this rank's tokens."""

    context: Context

    def forward(self, x: Tensor, start: int | None = None) -> Tensor:
        """As there.

        Args:
            x: this rank's shard of a sequence, or with a ``start`` what all ranks have alike.
            start: the position of the first vector; None: those of the shard.
        """
        if start is not None:
            return super().forward(x, start)
        ranks, table = self.context.mesh.size(), self.weight
        length = x.shape[-2] * ranks
        if length > table.shape[0]:
            raise ValueError(f"positions 0 to {length - 1}: the table holds max_length={table.shape[0]}")
        places = position_ids(length, self.context.mesh, balance=self.context.balance, device=x.device)
        positions = table[places].to(x.dtype)
        if self.concatenate:
            return torch.cat((x, positions.expand(*x.shape[:-1], table.shape[1])), dim=-1)
        return x + positions


class ParallelTrunk(TransformerTrunk):
    """A trunk that shares its sequences out, and gives back whole ones.

    Attributes:
        mesh: the ranks that it is shared out among.
        context: how the sequences are shared out, or None.
        keeps_whole: FSDP2 was told not to shard a layer's parameters again behind its forward.
    """

    mesh: DeviceMesh
    context: Context | None = None
    keeps_whole: bool = False

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """As for the trunk that it was: of whole sequences, the same on every rank of the context."""
        if self.context is None:
            return super().forward(tokens, padding, memory=memory, memory_padding=memory_padding)
        check_tokens("tokens", tokens)
        check_padding("padding", padding, tokens.shape)
        self._check_memory(memory, memory_padding, tokens.shape[0])
        own = [
            None if tensor is None else shard(tensor, 1, self.context.mesh, balance=self.context.balance)
            for tensor in (tokens, padding, memory, memory_padding)
        ]
        assert own[0] is not None
        output = super().forward(own[0], own[1], memory=own[2], memory_padding=own[3])
        return unshard(output, 1, self.context.mesh, balance=self.context.balance)

    def new_cache(
        self,
        batch: int,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        *,
        max_length: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> ParallelCache:
        """As for the trunk that it was: of whole sequences, of which each rank keeps a part."""
        self._check_gathered()
        self._check_memory(memory, memory_padding, None)
        most = self.config.max_length if max_length is None else max_length
        return ParallelCache(
            list(self.layers),
            batch,
            most,
            memory,
            memory_padding,
            mesh=self.mesh,
            context=self.context,
            keeps_whole=self.keeps_whole,
            page_size=page_size,
            pages=pages,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: DecodingCache) -> Tensor:
        """As for the trunk that it was: of whole sequences, the same on every rank of the context.

        With a context the first tokens are shared out, as many as can be shared out evenly; the ranks compute the
        others alike, one after the other, and take turns in keeping them.
        """
        self._check_gathered()
        if self.context is None:
            return super().step(tokens, cache)
        assert isinstance(cache, ParallelCache)
        self._check_step(tokens, cache)
        mesh, balance = self.context.mesh, self.context.balance
        together = mesh.size() * (2 if balance == "zigzag" else 1)
        shared = tokens.shape[1] // together * together if cache.length == 0 else 0
        found = []
        if shared:
            own = shard(tokens[:, :shared], 1, mesh, balance=balance)
            with cache.taking_shards():
                output = self._decoded(self.positions(self.tokens(own)), cache)
            found.append(unshard(output, 1, mesh, balance=balance))
        for place in range(shared, tokens.shape[1]):
            found.append(super().step(tokens[:, place : place + 1], cache))
        return torch.cat(found, dim=1) if found else self.tokens(tokens)  # of no tokens there is nothing to compute

    def _check_gathered(self) -> None:
        """Raise where FSDP2 has not gathered the parameters that are of no layer."""
        weight = self.tokens._parameters["weight"]
        if isinstance(weight, DTensor) and set(weight.device_mesh.mesh_dim_names or ()) - {"tensor"}:
            raise RuntimeError(
                "decoding with sharded parameters: expected a call of the model that parallelize was given; if "
                "that calls this one, torch.distributed.fsdp.register_fsdp_forward_method(model, name) of its method"
            )
