"""What stands beside attention in a parallel model: parameters that all tensor-parallel ranks have, and trunks that
share sequences out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from fastattn.distributed.parallel_attention import Context
from fastattn.distributed.regions import local
from fastattn.distributed.sharing import position_ids, shard, unshard
from fastattn.models._checks import check_padding, check_tokens
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

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """As there; ``x`` is this rank's shard of a sequence."""
        ranks, table = self.context.mesh.size(), self.weight
        length = x.shape[-2] * ranks
        if start != 0:
            raise NotImplementedError(f"start={start} with a 'context': expected 0, since a rank has no later tokens")
        if length > table.shape[0]:
            raise ValueError(f"positions 0 to {length - 1}: the table holds max_length={table.shape[0]}")
        places = position_ids(length, self.context.mesh, balance=self.context.balance, device=x.device)
        positions = table[places].to(x.dtype)
        if self.concatenate:
            return torch.cat((x, positions.expand(*x.shape[:-1], table.shape[1])), dim=-1)
        return x + positions


class ParallelTrunk(TransformerTrunk):
    """A trunk that shares its sequences out, and gives back whole ones; it does not decode.

    Attributes:
        context: how the sequences are shared out, or None.
    """

    context: Context | None = None

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

    def new_cache(self, *arguments: Any, **words: Any) -> Any:
        """Refused: decoding reads the parameters of whole modules."""
        raise NotImplementedError(
            "decoding with a parallel model: load its full state dict (get_model_state_dict with full_state_dict=True) "
            "into a model of one process"
        )
