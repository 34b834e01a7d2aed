"""What a client is: a model of another package, what it is called with, and which of its classes are torch's in all but
name.

The tables of clients can be read where the packages are not installed: each is imported when a model is made.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.poison import poisoned_memory

Inputs = dict[str, Any]  # arguments by name; tensors of floating point are cast to the model's dtype

_SPREAD = 0.05  # of what is added to the initial weights


class Client(NamedTuple):
    """A model and how to call it.

    Attributes:
        package: whose it is, as it is installed by pip.
        name: of the model.
        make: the model, in float32.
        inputs: the arguments of a call, drawn from a generator.
        also: classes of the package that are one of torch's, ``module:Class``; see :func:`fastattn.fuse`.
        unlike: classes that derive from a norm of torch and compute another, which :func:`fastattn.fuse` has to refuse.
        cast: to another dtype, where that is not ``model.to(dtype)``.
        attends: its attention calls ``F.scaled_dot_product_attention`` (else it multiplies matrices itself).
        registry: its attention asks the registry of diffusers.
    """

    package: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    also: Mapping[str, type[nn.Module]] = {}
    unlike: Mapping[str, type[nn.Module]] = {}
    cast: Callable[[nn.Module, torch.dtype], nn.Module] = nn.Module.to
    attends: bool = True
    registry: bool = False


def resolve(path: str) -> Any:
    """The object called ``module:name``; the module is imported."""
    return pkgutil.resolve_name(path)


def classes(named: Mapping[str, type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    """The classes that ``also`` or ``unlike`` names."""
    return {resolve(path): kind for path, kind in named.items()}


def make(client: Client) -> nn.Module:
    """The client's model, the same in every run.

    Every parameter is moved from its initial value: a gate that begins at zero would hide all that lies behind it, and
    a norm that begins with weights of one and biases of zero would not tell whether these are used. Parameters that the
    package leaves without a value, to be loaded, begin at zero.
    """
    torch.manual_seed(0)
    with poisoned_memory():
        model = client.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0.0).add_(torch.randn_like(parameter), alpha=_SPREAD)
    return model


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The arguments with tensors of floating point in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, inputs)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float32."""
    return torch.randn(shape, generator=generator)


def image(generator: torch.Generator, *, batch: int = 2, size: int = 64) -> Tensor:
    """Images ``[B, 3, size, size]``."""
    return normal(generator, batch, 3, size, size)


def prefix_mask(*lengths: int) -> Tensor:
    """``[B, S]``, True for the first so many tokens of each sequence of as many as the longest."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
