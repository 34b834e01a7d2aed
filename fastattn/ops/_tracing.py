"""Calls that are made to be written down in a graph of ``torch.fx``, and not to compute anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Proxy
from torch.overrides import handle_torch_function


def is_symbolically_traced(*tensors: object) -> bool:
    """Is one of ``tensors`` a ``torch.fx.Proxy``, which stands for a tensor in ``torch.fx.symbolic_trace``?

    A Proxy has no shape, dtype or device to look at, and whoever branches on one raises a TraceError. Where time counts
    ask ``torch.overrides.has_torch_function_variadic`` first, which is faster and True for a Proxy.
    """
    return any(isinstance(tensor, Proxy) for tensor in tensors)


def recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The node of a graph that calls ``function``, a public one of this package, with Proxies among its arguments."""
    proxies = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Proxy))
    return handle_torch_function(function, proxies, *args, **kwargs)
