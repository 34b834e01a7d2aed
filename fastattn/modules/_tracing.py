"""What ``torch.fx.symbolic_trace`` sees of the modules: one node each, as it does of torch's."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def leaf_node(module: nn.Module, *args: Any, **kwargs: Any) -> Proxy | None:
    """The node of a graph that calls ``module`` on ``args`` and ``kwargs``, at least one of which is a ``Proxy``.

    torch.fx records a call of a module of ``torch.nn`` as one node, named after the module, and traces through all
    others. Modules of this package take the place of torch's, so ``forward`` asks here for such a node: the graph
    is that of the model before it was fused, names included, by which feature extractors find what they are to return;
    and the module inside it still computes by its kernels, and drops in training only.

    None where there cannot be such a node: the module is the root of what is traced, or has hooks, which have been
    called on the Proxies by now and would be called again at the node.
    """
    tracer = next(a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)).tracer
    path = tracer.path_of_module(module)
    if not path or module._forward_hooks or module._forward_pre_hooks:
        return None
    return tracer.create_proxy("call_module", path, args, kwargs)
