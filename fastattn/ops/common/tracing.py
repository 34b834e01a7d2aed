"""Whether a call computes something now or is traced into a graph, and whether that graph leaves this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as is_functorch_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.fx import Proxy
from torch.nn import Parameter
from torch.overrides import handle_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def is_symbolically_traced(*tensors: object) -> bool:
    """Is one of ``tensors`` a ``torch.fx.Proxy``, which stands for a tensor in ``torch.fx.symbolic_trace``?

    A Proxy has no shape, dtype or device, and a branch on one raises a TraceError. Where time counts ask
    ``torch.overrides.has_torch_function_variadic`` first, which is faster and True for a Proxy.
    """
    return any(isinstance(tensor, Proxy) for tensor in tensors)


def recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The node of a graph that calls ``function``, a public one of this package, with Proxies among its arguments."""
    proxies = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Proxy))
    return handle_torch_function(function, proxies, *args, **kwargs)


def is_traced() -> bool:
    """Is this call traced into a graph, or made under a mode whose tensors have no values (fake, functional)?

    Modes of users, such as ``FlopCounterMode`` and that of selective checkpointing, do not count: under them a call is
    eager, and they see the operators that it runs.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def is_transformed() -> bool:
    """Is this under ``torch.func``, or in forward mode?"""
    return is_functorch_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Is this gradient several of them, that a backward has to take together: under ``torch.vmap``, or for
    ``torch.autograd.grad(is_grads_batched=True)``? Nothing may be written in place of them, nor ``out`` of them."""
    return is_functorch_active() or is_legacy_batchedtensor(tensor)


def is_eager_on_cpu(tensor: Tensor) -> bool:
    """Is this a plain call on the CPU that nothing traces or transforms, so that tensors' values may be read?"""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, Parameter)
        and not is_traced()
        and not is_functorch_active()
    )


def is_recorded() -> bool:
    """Is this call written into a graph that leaves this process: by ``torch.export``, ``torch.jit.trace``, ``make_fx``
    or an ONNX exporter?

    Such a graph is run where this package is not there, by other runtimes too, so it has to consist of torch's own
    operators. The graphs of ``torch.compile`` are run here and may hold ours.
    """
    if torch.compiler.is_compiling():
        # What is_exporting() returns, were it not that torch.compile of torch 2.11 puts True in the place of that call.
        return torch.compiler._is_exporting_flag
    if torch.jit.is_tracing() or not torch._C._len_torch_dispatch_stack():
        return torch.jit.is_tracing()
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # imports sympy, as all of torch.fx.experimental does

    return get_proxy_mode() is not None


def are_sizes(have: Sequence[int], want: Sequence[int], *, or_one: bool = False) -> bool:
    """Is each size of ``have`` that of ``want``, or, where ``or_one``, 1, which broadcasts?

    A size that depends on data (``lengths.max()``) is unknown while a graph is traced. It is taken to be that of
    ``want``, and the graph checks it when it runs.
    """
    if not torch.compiler.is_compiling():
        return tuple(have) == tuple(want) or (or_one and all(h == w or h == 1 for h, w in zip(have, want)))
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    for h, w in zip(have, want):
        if or_one and guard_or_false(h == 1):
            continue
        if not guard_or_true(h == w):
            return False
        torch._check(h == w)
    return True


def promise_not_empty(size: int) -> None:
    """Promise the tracer that a size which depends on data is not 0; the graph raises where it is 0 when it runs.

    Without that promise torch's operators ask for the size while the graph is traced, and fail.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if not statically_known_true(size == 0):
            torch._check(size > 0)


def is_left_open(left: int, right: int) -> bool:
    """Is it unknown, while a graph is traced, whether these sizes are equal? Then no Python branch may depend on it."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not (statically_known_true(left == right) or statically_known_true(left != right))


def is_known(condition: Any) -> bool:
    """Does this condition on sizes hold, whatever they are that the graph which is traced leaves open?"""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def saved_tensors(node: Any, *names: str) -> list[Tensor]:
    """The tensors that a node of autograd saved.

    They are read inside a backward pass of their own: checkpointing lets a saved tensor be unpacked once in each pass,
    and the node itself unpacks it in the pass that is running.
    """
    found: list[Tensor] = []
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        leaf.register_hook(lambda _: found.extend(getattr(node, f"_saved_{name}") for name in names))
        torch.autograd.grad(leaf * 1, leaf)
    return found
