"""What ``torch.fx.symbolic_trace`` sees of the modules: one node each, as it does of torch's."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy


def leaf_node(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The node of a graph that calls ``module`` on ``args`` and ``kwargs``, at least one of which is a ``Proxy``.

    torch.fx records a call of a module of ``torch.nn`` as one node, named after the module, and traces through all
    others. Modules of this package take the place of torch's, so ``forward`` asks here for such a node: the graph
    is that of the model before it was fused, names included, by which feature extractors find what they are to return;
    and the module inside it still computes by its kernels, and drops in training only.

    Keywords that have their defaults are left out of the node. None where there cannot be one: the module is the root
    of what is traced, or has hooks, which are called on the Proxies now and would be called again at the node.
    """
    tracer = _tracer(*args, *kwargs.values())
    path = tracer.path_of_module(module)
    if not path or module._forward_hooks or module._forward_pre_hooks:
        return None
    parameters = inspect.signature(type(module).forward).parameters
    given = {name: value for name, value in kwargs.items() if value is not parameters[name].default}
    return tracer.create_proxy("call_module", path, args, given)


def expect_defaults(module: nn.Module, **kwargs: Any) -> bool:
    """Is ``module`` the root of what is traced, so that ``kwargs`` are placeholders, of which nobody knows yet whether
    they will be given? Then the graph asserts that they are not."""
    tracer = _tracer(*kwargs.values())
    if tracer is None or tracer.path_of_module(module):
        return False
    parameters = inspect.signature(type(module).forward).parameters
    for name, value in kwargs.items():
        is_default = tracer.create_proxy("call_function", operator.is_, (value, parameters[name].default), {})
        message = f"{name} was given to a graph of {type(module).__name__} alone: trace a module that calls it with it"
        tracer.create_proxy("call_function", torch._assert, (is_default, message), {})
    return True


def _tracer(*arguments: Any) -> Any:
    """The tracer that made the Proxies among ``arguments``; None where there are none."""
    return next((a.tracer for a in arguments if isinstance(a, Proxy)), None)
