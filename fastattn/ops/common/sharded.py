"""Calls whose tensors are DTensors: each rank computes on what it has, where the axes that are sharded allow it.

A public function says by names what the axes of its tensors are. Along a dimension of the mesh the work is shared out
by one axis, that along which the query (or the first tensor that is sharded at all) lies in shards, if the call
computes each of its entries by itself and all tensors can be cut evenly; otherwise all ranks do all of the work.
Tensors are brought into these placements as torch's own operators bring theirs. What every rank of a dimension has
whole, while the work is shared out, gets of each rank a share of its gradient: a partial sum, of which torch knows when
to add it up.

The function itself runs on plain tensors. So every backend, mask and derivative is that of a call on one rank, and
nothing is sent where all tensors lie as they should.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Of these a plain tensor may be a rank's own shard as well as the whole.
_ACTIVATIONS = ("query", "key", "value", "x", "residual")

Axes = tuple[str | None, ...]  # the names of the last axes of a tensor; None: computed together


def _dtensor() -> Any:
    """torch's class of DTensors, or one without instances where nobody has imported it: then there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return _Nothing if module is None else module.DTensor


class _Nothing:
    """The class of no object."""


# As torch.compiler.assume_constant_result does: the tracer runs the function, and takes the class for a constant.
_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def are_sharded(*tensors: Any) -> bool:
    """Is one of these a DTensor? Those of torch's own classes are told apart without a look for that one."""
    odd = [tensor for tensor in tensors if tensor is not None and type(tensor) not in (Tensor, Parameter)]
    return len(odd) > 0 and any(isinstance(tensor, _dtensor()) for tensor in odd)


def on_local(
    function: Callable[..., Any],
    axes: Mapping[str, Axes],
    words: dict[str, Any],
    results: Sequence[Axes | None],
    averaged: tuple[int, str] | None = None,
    dropout_p: Any = 0.0,
    shown: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """The results of a function, as DTensors.

    Args:
        function: takes ``words`` by their names, and returns a tuple of tensors, or None in the place of one.
        axes: of each argument that may hold a tensor the names of its axes, those whose placements decide ahead. A
            tensor with fewer axes has the last ones. One of these arguments is a DTensor.
        words: the arguments. Plain tensors among them without a gradient are taken to be the same on all ranks, but
            for those of which ranks might have shards.
        results: the names of the axes of each result.
        averaged: the number of a result that is an average over an axis, and that axis.
        dropout_p: of the call: ranks that share the work draw different numbers.
        shown: what a user calls an argument, where that is another name.

    Raises:
        TypeError: a plain tensor has a gradient, or may be a shard.
        ValueError: meshes differ.
        NotImplementedError: dropout in a graph.
    """
    tensors = {name: words[name] for name in axes if isinstance(words.get(name), Tensor)}
    tensors = _on_one_mesh(tensors, shown or {})
    mesh = next(iter(tensors.values())).device_mesh
    shared = _shared_out(axes, tensors, mesh)
    local = {name: _local_of(tensor, axes[name], mesh, shared) for name, tensor in tensors.items()}
    with _own_numbers(mesh, shared, dropout_p):
        found = function(**{**words, **local})
    return tuple(
        None
        if result is None or names is None
        else _global_of(result, names, mesh, shared, averaged[1] if averaged and averaged[0] == number else None)
        for number, (result, names) in enumerate(zip(found, results))
    )


def _on_one_mesh(tensors: Mapping[str, Any], shown: Mapping[str, str]) -> dict[str, Any]:
    """DTensors of all tensors, on the mesh of the first, or raise."""
    from torch.distributed.tensor import DTensor, Replicate

    found: dict[str, Any] = {}
    first = next(name for name, tensor in tensors.items() if isinstance(tensor, DTensor))
    mesh = tensors[first].device_mesh
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != mesh:
                raise ValueError(
                    f"{shown.get(name, name)} is on {tensor.device_mesh} and {shown.get(first, first)} on {mesh}: "
                    "expected one mesh for all"
                )
        elif tensor.requires_grad or name in _ACTIVATIONS:
            raise TypeError(
                f"{shown.get(name, name)} is a {type(tensor).__name__} and {shown.get(first, first)} a DTensor: "
                "expected a DTensor, such as torch.distributed.tensor.distribute_tensor makes of a tensor that all "
                "ranks have"
            )
        else:
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        found[name] = tensor
    return found


def _shared_out(axes: Mapping[str, Axes], tensors: Mapping[str, Any], mesh: Any) -> list[str | None]:
    """For each dimension of the mesh the axis along which its ranks share the work; None: each does all of it."""
    found: list[str | None] = []
    for dim in range(mesh.ndim):
        along = [_axis_along(axes[name], tensor, dim) for name, tensor in tensors.items()]
        wanted = next((axis for axis in along if axis is not None), None)
        parts = math.prod([mesh.size(other) for other, axis in enumerate(found) if axis == wanted]) * mesh.size(dim)
        sizes = [
            size
            for name, tensor in tensors.items()
            for axis, size in _named(axes[name], tensor)
            if axis == wanted and size != 1
        ]
        is_even = len(sizes) > 0 and all(size % parts == 0 for size in sizes)
        found.append(wanted if wanted is not None and is_even else None)
    return found


def _named(axes: Axes, tensor: Tensor) -> Iterator[tuple[str | None, int]]:
    return zip(axes[len(axes) - tensor.dim() :], tensor.shape)


def _axis_along(axes: Axes, tensor: Any, dim: int) -> str | None:
    """The name of the axis of which the ranks of a dimension have shards."""
    placement = tensor.placements[dim]
    return axes[len(axes) - tensor.dim() + placement.dim] if placement.is_shard() else None


def _local_of(tensor: Any, axes: Axes, mesh: Any, shared: Sequence[str | None]) -> Tensor:
    """This rank's part of an argument; its gradient is that of its shards, or a partial sum."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = list(_named(axes, tensor))
    wanted: list[Any] = []
    gradients: list[Any] = []
    for axis in shared:
        places = [number for number, (name, size) in enumerate(names) if name == axis and size != 1]
        if axis is None:
            wanted.append(Replicate()), gradients.append(Replicate())
        elif places:
            wanted.append(Shard(places[0])), gradients.append(Shard(places[0]))
        else:
            wanted.append(Replicate()), gradients.append(Partial())
    return tensor.redistribute(mesh, wanted).to_local(grad_placements=gradients)


def _global_of(result: Tensor, axes: Axes, mesh: Any, shared: Sequence[str | None], averaged: str | None) -> Any:
    """A result, of what each rank has of it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    names = axes[len(axes) - result.dim() :]
    placements: list[Any] = []
    for dim, axis in enumerate(shared):
        if axis is None:
            placements.append(Replicate())
        elif axis == averaged:
            result = result / mesh.size(dim)
            placements.append(Partial())
        else:
            placements.append(Shard(names.index(axis)))
    return DTensor.from_local(result, mesh, placements, run_check=False)


@contextlib.contextmanager
def _own_numbers(mesh: Any, shared: Sequence[str | None], dropout_p: Any) -> Generator[None]:
    """Random numbers that differ between ranks which share the work, from generators that are alike on all of them, and
    are alike behind the call."""
    if not isinstance(dropout_p, float) or dropout_p == 0.0 or not any(shared):
        yield
        return
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"dropout_p={dropout_p} of DTensors under torch.compile: expected 0.0, or a call outside of a graph"
        )
    place = 0
    for dim, axis in enumerate(shared):
        place = place * mesh.size(dim) + mesh.get_local_rank(dim) if axis is not None else place
    seed = int(torch.randint(0, 2**48, (), device="cpu"))
    devices = [] if mesh.device_type == "cpu" else [getattr(torch, mesh.device_type).current_device()]
    with torch.random.fork_rng(devices, device_type=mesh.device_type if devices else "cuda"):
        torch.manual_seed(seed + place)
        yield
