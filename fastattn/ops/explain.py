"""The public function that says which backend a call of an operator would run on, and why not on the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.ops import (
    _additive_call,
    _additive_torch,
    _additive_triton,
    _call,
    _dispatch,
    _norm_call,
    _norm_torch,
    _norm_triton,
    _torch_backend,
    _triton_backend,
)
from fastattn.ops.additive import additive_attention
from fastattn.ops.attention import attention
from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class _Operator(NamedTuple):
    """How an operator's arguments become a call, and the modules of its two backends."""

    make_call: Callable[..., Any]
    triton: Any
    torch: Any
    more: dict[str, Any]  # arguments of make_call that the operator itself knows


def _additive(average_attn_weights: bool, **arguments: Any) -> _additive_call.AdditiveCall:
    return _additive_call.make_call(**arguments)


def _of_input(input: Tensor, **arguments: Any) -> _norm_call.NormCall:
    given: dict[str, Any] = {"residual": None, "bias": None, **arguments}
    return _norm_call.make_call(input, **given)


def _norm(make_call: Callable[..., Any], kind: str) -> _Operator:
    return _Operator(make_call, _norm_triton, _norm_torch, {"kind": kind})


_OPERATORS: dict[Callable[..., Any], _Operator] = {
    attention: _Operator(_call.make_call, _triton_backend, _torch_backend, {}),
    additive_attention: _Operator(_additive, _additive_triton, _additive_torch, {}),
    add_layer_norm: _norm(_norm_call.make_call, "layer"),
    add_rms_norm: _norm(_norm_call.make_call, "rms"),
    layer_norm: _norm(_of_input, "layer"),
    rms_norm: _norm(_of_input, "rms"),
}


def explain(*arguments: Any, **keywords: Any) -> _dispatch.Explanation:
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
    operator = _OPERATORS.get(function)
    if operator is None:
        names = ", ".join(known.__name__ for known in _OPERATORS)
        raise TypeError(f"{getattr(function, '__name__', function)!r} cannot be explained: expected one of {names}")
    bound = inspect.signature(function).bind(*rest, **keywords)
    bound.apply_defaults()
    given = dict(bound.arguments)
    backend = given.pop("backend")
    describe = {"triton": operator.triton.describe, "torch": operator.torch.describe}
    call = operator.make_call(**given, **operator.more)
    return _dispatch.explain_call(call, backend, operator.triton.refusals, describe)
