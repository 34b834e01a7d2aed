"""Is a call made to be written down in a graph of ``torch.fx``, and not to compute anything?"""

from __future__ import annotations

from torch.fx import Proxy


def is_symbolically_traced(*tensors: object) -> bool:
    """Is one of ``tensors`` a ``torch.fx.Proxy``, which stands for a tensor in ``torch.fx.symbolic_trace``?

    A Proxy has no shape, dtype or device to look at, and whoever branches on one raises a TraceError. Where time counts
    ask ``torch.overrides.has_torch_function_variadic`` first, which is faster and True for a Proxy.
    """
    return any(isinstance(tensor, Proxy) for tensor in tensors)
