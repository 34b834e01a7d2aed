"""Is a call made to be written down in a graph of ``torch.fx``, and not to compute anything?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter


def is_symbolically_traced(*tensors: object) -> bool:
    """Is one of ``tensors`` a ``torch.fx.Proxy``, which stands for a tensor in ``torch.fx.symbolic_trace``?

    A Proxy has no shape, dtype or device to look at, and whoever branches on one raises a TraceError. Where time counts
    ask ``torch.overrides.has_torch_function_variadic`` first, which is faster and True for a Proxy.
    """
    return any(isinstance(tensor, Proxy) for tensor in tensors)


def is_traced() -> bool:
    """Does a graph, or a mode that sees every operator, stand between this call and its numbers?"""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or bool(torch._C._len_torch_dispatch_stack())


def is_eager_on_cpu(tensor: Tensor) -> bool:
    """Is this a plain call on the CPU, that nothing traces or transforms, so that looking at numbers is allowed?"""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, Parameter)
        and not is_traced()
        and not torch._C._are_functorch_transforms_active()
    )


def is_transformed() -> bool:
    """Is this under ``torch.func``, or in forward mode?"""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def saved_tensors(node: Any, *names: str) -> list[Tensor]:
    """What a node of autograd saved, read in a backward pass of its own: checkpointing unpacks a tensor once a pass."""
    found: list[Tensor] = []
    with torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        leaf.register_hook(lambda _: found.extend(getattr(node, f"_saved_{name}") for name in names))
        torch.autograd.grad(leaf * 1, leaf)
    return found
