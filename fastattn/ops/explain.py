"""The public function that says which backend a call of an operator would run on, and why not on the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.ops.additive_attention import call as additive_attention_call
from fastattn.ops.additive_attention import on_torch as additive_attention_torch
from fastattn.ops.additive_attention import on_triton as additive_attention_triton
from fastattn.ops.additive_attention.api import additive_attention
from fastattn.ops.attention import call as attention_call
from fastattn.ops.attention import on_torch as attention_torch
from fastattn.ops.attention import on_triton as attention_triton
from fastattn.ops.attention.api import attention
from fastattn.ops.attention.kvcache import call as attention_with_kvcache_call
from fastattn.ops.attention.kvcache import on_torch as attention_with_kvcache_torch
from fastattn.ops.attention.kvcache import on_triton as attention_with_kvcache_triton
from fastattn.ops.attention.kvcache.api import attention_with_kvcache
from fastattn.ops.attention.varlen import call as attention_varlen_call
from fastattn.ops.attention.varlen import on_torch as attention_varlen_torch
from fastattn.ops.attention.varlen import on_triton as attention_varlen_triton
from fastattn.ops.attention.varlen.api import attention_varlen
from fastattn.ops.common import backends
from fastattn.ops.residual_norm import call as residual_norm_call
from fastattn.ops.residual_norm import on_torch as residual_norm_torch
from fastattn.ops.residual_norm import on_triton as residual_norm_triton
from fastattn.ops.residual_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class _Explained(NamedTuple):
    """How the arguments of a public function become a call, and the modules of its two backends."""

    make_call: Callable[..., Any]
    triton: Any
    torch: Any
    more: dict[str, Any]  # arguments of make_call that the function's name stands for


def _of_additive_attention(average_attn_weights: bool, **arguments: Any) -> Any:
    return additive_attention_call.make_call(**arguments)


def _of_input(input: Tensor, **arguments: Any) -> Any:
    given: dict[str, Any] = {"residual": None, "bias": None, **arguments}
    return residual_norm_call.make_call(input, **given)


def _norm(make_call: Callable[..., Any], kind: str) -> _Explained:
    return _Explained(make_call, residual_norm_triton, residual_norm_torch, {"kind": kind})


_FUNCTIONS: dict[Callable[..., Any], _Explained] = {
    attention: _Explained(attention_call.make_call, attention_triton, attention_torch, {}),
    attention_varlen: _Explained(attention_varlen_call.make_call, attention_varlen_triton, attention_varlen_torch, {}),
    attention_with_kvcache: _Explained(
        attention_with_kvcache_call.make_call, attention_with_kvcache_triton, attention_with_kvcache_torch, {}
    ),
    additive_attention: _Explained(_of_additive_attention, additive_attention_triton, additive_attention_torch, {}),
    add_layer_norm: _norm(residual_norm_call.make_call, "layer"),
    add_rms_norm: _norm(residual_norm_call.make_call, "rms"),
    layer_norm: _norm(_of_input, "layer"),
    rms_norm: _norm(_of_input, "rms"),
}


def explain(*arguments: Any, **keywords: Any) -> backends.Explanation:
    """Say which backend an operator would run on for these arguments, and why not on the others.

    ``explain(query, key, value, ...)`` is about :func:`attention`; of the others the first argument says which:
    ``explain(fastattn.add_layer_norm, x, residual, ...)``.

    Args:
        *arguments: the operator (default :func:`attention`), then its positional arguments.
        **keywords: its other arguments, ``backend`` among them.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        TypeError, ValueError: as the operator would, or the first argument is no operator of this package.
    """
    function, rest = (arguments[0], arguments[1:]) if arguments and callable(arguments[0]) else (attention, arguments)
    explained = _FUNCTIONS.get(function)
    if explained is None:
        names = ", ".join(known.__name__ for known in _FUNCTIONS)
        raise TypeError(f"{getattr(function, '__name__', function)!r} cannot be explained: expected one of {names}")
    bound = inspect.signature(function).bind(*rest, **keywords)
    bound.apply_defaults()
    given = dict(bound.arguments)
    backend = given.pop("backend")
    describe = {"triton": explained.triton.describe, "torch": explained.torch.describe}
    call = explained.make_call(**given, **explained.more)
    return backends.explain_call(call, backend, explained.triton.refusals, describe)
