"""``torch.func`` of functions some of whose arguments are None, or are to be left alone; vmap by a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """What ``function`` gives, and its pullback."""
    values, pullback = torch.func.vjp(function, *primals)[:2]
    return values, pullback


def of(
    chosen: Sequence[bool], function: Callable[..., Any], arguments: Tensors
) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` of the chosen arguments alone, and these; the others stay as they are."""

    def of_chosen(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return function(*(next(remaining) if c else a for c, a in zip(chosen, arguments)))

    return of_chosen, [a for c, a in zip(chosen, arguments) if c]


def pushed_forward(function: Callable[..., Any], primals: Tensors, tangents: Tensors) -> Sequence[Tensor]:
    """The forward-mode derivative of ``function``, where arguments and tangents may be None.

    A vjp of the vjp, which is linear in its cotangent: forward mode itself cannot be nested inside a Function's jvp.
    """
    of_tensors, given = of([t is not None for t in primals], function, primals)
    directions = [
        torch.zeros_like(p) if t is None else t.to(p.dtype) for p, t in zip(primals, tangents) if p is not None
    ]
    values, pullback = vjp(of_tensors, *given)
    _, pushforward = vjp(pullback, tuple(torch.zeros_like(v) for v in values))
    return pushforward(tuple(directions))[0]


def looped(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], out_dims: Any) -> Any:
    """A ``vmap`` rule: one call a sample, stacked along ``out_dims``."""
    samples = [[a if d is None else a.select(d, i) for a, d in zip(args, in_dims)] for i in range(info.batch_size)]
    if not samples:  # the shapes of the results are those of a call
        samples = [[a if d is None else torch.zeros_like(a.sum(d)).to(a.dtype) for a, d in zip(args, in_dims)]]
    columns = zip(zip(*(function(*sample) for sample in samples)), out_dims)
    return tuple(
        column[0] if dim is None else torch.stack(column, dim).narrow(dim, 0, info.batch_size)
        for column, dim in columns
    ), out_dims
