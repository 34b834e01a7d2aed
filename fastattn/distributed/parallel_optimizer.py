"""An optimizer's state in the shapes of torch's modules, as the state dict of a parallel model has its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastattn.distributed.parallel_attention import (
    PACKED,
    ParallelMultiheadAttention,
    in_shape_of,
    in_torch_shape,
    is_in_torch_shape,
)


def keep_torch_shapes(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer's state dicts in torch's shapes, in both directions.

    One parameter of a model that is parallel along ``"tensor"`` has another shape inside, ``in_proj_weight``, and what
    an optimizer keeps of it has that shape, too. With this, state dicts and checkpoints of the optimizer go into an
    optimizer of the model in one process, and back. Like the model's, they are made by all ranks, or by none.

    Args:
        model: behind :func:`parallelize`.
        optimizer: of its parameters.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")

    def show(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _converted(model, optimizer, state_dict, _shown)

    def take(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _converted(model, optimizer, state_dict, _taken)

    optimizer.register_state_dict_post_hook(show)
    optimizer.register_load_state_dict_pre_hook(take)


def _converted(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    convert: Callable[[Tensor, DTensor], Tensor],
) -> dict[str, Any]:
    """A state dict with what is kept of packed weights in another shape."""
    # looked for here, since FSDP2 makes new parameters
    packed = {id(m._parameters[PACKED]) for m in model.modules() if isinstance(m, ParallelMultiheadAttention)}
    state = dict(state_dict["state"])
    for named, group in zip(state_dict["param_groups"], optimizer.param_groups):
        for name, parameter in zip(named["params"], group["params"]):
            if id(parameter) in packed and isinstance(parameter, DTensor) and name in state:
                kept = state[name].items()
                state[name] = {key: convert(v, parameter) if isinstance(v, Tensor) else v for key, v in kept}
    return {**state_dict, "state": state}


def _shown(kept: Tensor, parameter: DTensor) -> Tensor:
    if isinstance(kept, DTensor) and kept.dim() == 3 and kept.shape == parameter.shape:
        return in_torch_shape(kept)
    return kept


def _taken(kept: Tensor, parameter: DTensor) -> Tensor:
    return in_shape_of(kept, parameter) if is_in_torch_shape(kept, parameter) else kept
