"""``score_mod`` and ``mask_mod`` of a call, checked and traced."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.contract import Function
from fastattn.ops.attention.functions.in_triton import check
from fastattn.ops.attention.functions.lookups import Extent, made, with_lookups
from fastattn.ops.attention.functions.of_triton import in_torch, is_of_triton
from fastattn.ops.attention.functions.program import Program
from fastattn.ops.attention.functions.writing import INDICES, NotUnderstood


def check_function(kind: Any, function: Any, query: Tensor, extent: Extent) -> Function:
    """A function as the operators take it, or raise.

    Args:
        kind: ``score_mod`` or ``mask_mod``.
        function: a Python or ``@triton.jit`` function, or a tuple of one and of tensors that it takes behind its other
            arguments, which are pointers to a function of Triton.
        query: of the call.
        extent: how many values each of the indices takes.

    Raises:
        TypeError: it is no function, or does not return a number.
        ValueError: it captures tensors of another device.
        NotImplementedError: it does something that no program can say; the message shows the line.
    """
    from fastattn.ops.attention.functions.memory import traced  # the tracer is imported with the first function

    arguments: tuple[Any, ...] = ()
    if isinstance(function, tuple) and function:
        function, *rest = function
        arguments = tuple(rest)
    if is_of_triton(function):
        function = in_torch(function, len(INDICES) + (kind == "score_mod"))
    if not callable(function):
        raise TypeError(
            f"{kind}={function!r}: expected a function, a tuple of one and of tensors that it takes behind its other "
            "arguments, or None"
        )
    for number, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            raise TypeError(f"{kind}: behind the function stand tensors, but item {number + 1} is {argument!r}")
    found, captured = traced(kind, function, arguments)
    own = [_moved(kind, tensor, query, is_literal) for tensor, is_literal in captured]
    program, read = with_lookups(found.text), found.inputs(own)
    differentiable = any(tensor.requires_grad for tensor in (query, *read))
    if kind == "score_mod" and differentiable and torch.is_grad_enabled():
        _check_gradient(function, program.text)
    return Function(program.text, (*read, *(made(each, extent, read, query.device) for each in program.lookups)))


@functools.lru_cache(maxsize=1024)
def _refusal_of_gradient(text: str) -> str | None:
    """Why the gradient of a program cannot be written; None where it can."""
    try:
        check(Program.of(text).gradient)
    except NotUnderstood as error:
        return str(error)
    return None


def _check_gradient(function: Any, text: str) -> None:
    """Raise NotImplementedError unless a score_mod can be differentiated: in the call, and not in its backward."""
    if (refusal := _refusal_of_gradient(text)) is not None:
        name = getattr(function, "__name__", type(function).__name__)
        raise NotUnderstood(f"score_mod {name} cannot be differentiated: {refusal}; call it under torch.no_grad()")


def _moved(kind: str, tensor: Tensor, query: Tensor, is_literal: bool) -> Tensor:
    """A captured tensor on the query's device: numbers, and what the function makes itself, are moved there."""
    if tensor.device == query.device:
        return tensor
    if is_literal or (tensor.dim() == 0 and tensor.device.type == "cpu"):
        return tensor.to(query.device)
    raise ValueError(
        f"{kind} captures a tensor of shape {list(tensor.shape)} on {tensor.device} but query is on {query.device}: "
        "expected one device"
    )
