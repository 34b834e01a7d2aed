"""Runs of a model: its outputs and gradients by name, and what it calls."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.clients.cases import Inputs

Tensors = dict[str, Tensor]
Compute = Callable[[nn.Module, list[Inputs]], Tensors]


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs of floating point."""
    return [x for x in tree_leaves(model(**inputs)) if isinstance(x, Tensor) and x.is_floating_point()]


def evaluate(model: nn.Module, draws: list[Inputs]) -> Tensors:
    """Outputs in evaluation, without gradients, the runs along a new first axis."""
    model.eval()
    with torch.no_grad():
        return _stacked([_named("evaluated", outputs(model, inputs)) for inputs in draws])


def train(model: nn.Module, draws: list[Inputs]) -> Tensors:
    """Outputs and gradients of training steps, the runs along a new first axis."""
    return _stacked([_step(model, inputs) for inputs in draws])


def _step(model: nn.Module, inputs: Inputs) -> Tensors:
    """Outputs of a training step, and the gradients of all parameters for a random gradient of the outputs."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # DiT's class labels are dropped at random, and nothing else is
    found = outputs(model, inputs)
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(found, [torch.randn(x.shape, generator=generator).to(x.dtype) for x in found])
    gradients = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _named("output", [x.detach() for x in found]) | gradients


def _named(name: str, tensors: list[Tensor]) -> Tensors:
    return {f"{name} {i}": tensor for i, tensor in enumerate(tensors)}


def _stacked(draws: list[Tensors]) -> Tensors:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


class KeepDouble(TorchFunctionMode):
    """Casts of float64 tensors to float32 leave them as they are: models write them for the sake of 16 bits."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------ who was called


def called_modules(model: nn.Module, inputs: Inputs) -> set[str]:
    """The names of the modules that one forward calls."""
    called: set[str] = set()
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(lambda *_, name=name: called.add(name))
            stack.callback(handle.remove)
        evaluate(model, [inputs])
    return called


def calls_of_sdpa(model: nn.Module, inputs: Inputs, compute: Compute) -> Counter[str]:
    """How often one run calls ``F.scaled_dot_product_attention``, by the class of the innermost module that does.

    In evaluation ``nn.MultiheadAttention`` mostly calls a fused function instead.
    """
    model = copy.deepcopy(model)
    inside: list[str] = []
    callers: Counter[str] = Counter()
    original = F.scaled_dot_product_attention

    def counting(*arguments: Any, **words: Any) -> Tensor:
        callers[inside[-1]] += 1
        return original(*arguments, **words)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", counting))
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, _: inside.append(type(module).__name__))
            module.register_forward_hook(lambda *_: inside.pop() and None)
        compute(model, [inputs])
    return callers
