"""What the ranks of the tests of ``parallelize`` do: each compares its part of a parallel model with a whole one."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import fastattn
from fastattn import distributed
from fastattn.models import TransformerConfig, TransformerEncoderDecoder, TransformerLanguageModel

STEPS = 20
FULL = StateDictOptions(full_state_dict=True)
MESHES: dict[str, dict[str, int]] = {
    "tensor x data": {"data": 2, "tensor": 2},
    "tensor x context": {"context": 2, "tensor": 2},
    "context x data": {"data": 2, "context": 2},
    "tensor": {"tensor": 4},
}


def mesh_of(sizes: dict[str, int]) -> DeviceMesh:
    """The ranks of all processes, by the names of the dimensions."""
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def language_model(**words: Any) -> TransformerLanguageModel:
    """The same on every rank."""
    torch.manual_seed(0)
    config = TransformerConfig(width=16, heads=4, layers=2, feed_forward=32, max_length=32, **words)
    return TransformerLanguageModel(11, config)


def train(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> list[float]:
    """The losses of a training by Adam, with clipped gradients."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=True)
    losses = []
    for batch in batches:
        loss = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_this_rank(batches: list[tuple[Tensor, ...]], mesh: DeviceMesh) -> list[tuple[Tensor, ...]]:
    """A rank's share of every batch."""
    if "data" not in (mesh.mesh_dim_names or ()):
        return batches
    data = mesh["data"]
    return [tuple(t.chunk(data.size())[data.get_local_rank()] for t in batch) for batch in batches]


def mean_over_data(losses: list[float], mesh: DeviceMesh) -> list[float]:
    """The losses of the whole batch, of those of its shares."""
    if "data" not in (mesh.mesh_dim_names or ()):
        return losses
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=mesh["data"].get_group())
    return (total / mesh["data"].size()).tolist()


def _apart(ours: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected))


def training(group: dist.ProcessGroup) -> dict[str, Any]:
    """For each mesh, how far losses and trained weights are from one process."""
    torch.manual_seed(1)
    batches = [(torch.randint(11, (4, 17)),) for _ in range(STEPS)]
    found = {}
    for name, sizes in MESHES.items():
        mesh = mesh_of(sizes)
        whole = language_model(norm_first=name == "tensor x context")
        model = distributed.parallelize(copy.deepcopy(whole), mesh)
        expected = train(whole, batches)
        ours = mean_over_data(train(model, of_this_rank(batches, mesh)), mesh)
        state = get_model_state_dict(model, options=FULL)
        weights = max((state[key] - value).abs().max().item() for key, value in whole.state_dict().items())
        found[name] = {
            "losses": _apart(ours, expected),
            "weights": weights,
            "learned": expected[0] - expected[-1],
            "all DTensors": all(isinstance(p, DTensor) for p in model.parameters()),
        }
    return found
