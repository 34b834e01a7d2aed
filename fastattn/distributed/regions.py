"""From tensors that ranks have alike to the share of each and back, with the gradients that belong to it.

Parallel modules compute on plain tensors, which takes less time of the host than a DTensor at each operator; a DTensor
stands only at the seams, where it knows which sum over ranks a pass owes.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a parameter, with its gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A tensor that the ranks have alike and each uses for its share: its gradient is the sum of theirs."""
    if mesh is None:
        return tensor
    replicated = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return replicated.to_local(grad_placements=[Partial()])


def summed(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum of what the ranks have, on all of them; all of them have its gradient alike."""
    if mesh is None:
        return tensor
    return (
        DTensor.from_local(tensor, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
    )


def joined(tensor: Tensor, dim: int, mesh: DeviceMesh | None) -> Tensor:
    """What the ranks have, side by side, on all of them; all of them have its gradient alike."""
    if mesh is None:
        return tensor
    return (
        DTensor.from_local(tensor, mesh, [Shard(dim)], run_check=False)
        .redistribute(placements=[Replicate()])
        .to_local()
    )
