"""Derivatives beyond the first: ``torch.func`` over an operator's formula, for operators over rows block by block.

Every block of rows is a call of its own, and the parts of a result that depends on keys or on shared vectors are added
up over the blocks. Forward mode and second derivatives are therefore exact on every backend, in the memory of one
block: the formula's intermediates are never made for a whole call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common.blocks import Axes, Part, statistics_dtype

Tensors = Sequence[Tensor | None]
# The results of a block, as a differentiable function of its share of the primals.
Formula = Callable[..., Sequence[Tensor]]


# -------------------------------------------------------------------------------- functions whose arguments may be None


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """The values of ``function``, and its pullback."""
    values, pullback = torch.func.vjp(function, *primals)[:2]
    return values, pullback


def restricted(
    chosen: Sequence[bool], function: Callable[..., Any], arguments: Tensors
) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` as a function of the chosen arguments alone, the others held as they are; and the chosen ones."""

    def of_chosen(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return function(*(next(remaining) if c else a for c, a in zip(chosen, arguments)))

    return of_chosen, [a for c, a in zip(chosen, arguments) if c]


def pushed_forward(function: Callable[..., Any], primals: Tensors, tangents: Tensors) -> Sequence[Tensor]:
    """The forward-mode derivative of ``function``, where primals and tangents may be None.

    Forward mode itself cannot be nested inside a Function's ``jvp``. So this is the vjp of the vjp, which is linear in
    its cotangent.
    """
    of_tensors, given = restricted([t is not None for t in primals], function, primals)
    directions = [
        torch.zeros_like(p) if t is None else t.to(p.dtype) for p, t in zip(primals, tangents) if p is not None
    ]
    values, pullback = vjp(of_tensors, *given)
    _, pushforward = vjp(pullback, tuple(torch.zeros_like(v) for v in values))
    return pushforward(tuple(directions))[0]


# ------------------------------------------------------------------------------------------------------- block by block


class Blocked(NamedTuple):
    """An operator's results as a formula of its differentiable inputs, cut into blocks."""

    primals: Tensors  # the differentiable inputs, whole; None where one is absent
    axes: Sequence[Axes]  # how each of them follows the blocks
    result_shapes: Sequence[Sequence[int]]
    result_dtypes: Sequence[torch.dtype]
    result_axes: Sequence[Axes]
    blocks: Callable[[], Iterator[tuple[Part, Formula]]]  # every block that adds anything


def forward_jvp(blocked: Blocked, tangents: Tensors) -> list[Tensor]:
    """The tangents of the results, given those of the inputs (None: zero)."""

    def pieces() -> Iterator[tuple[Part, Sequence[Tensor]]]:
        for block, formula in blocked.blocks():
            primals, directions = (_cut(block, tensors, blocked.axes) for tensors in (blocked.primals, tangents))
            yield block, pushed_forward(formula, primals, directions)

    totals = _assembled(pieces(), blocked, blocked.result_shapes, blocked.result_axes)
    return [total.to(dtype) for total, dtype in zip(totals, blocked.result_dtypes)]


def backward_jvp(blocked: Blocked, gradients: Tensors, tangents: Tensors) -> list[Tensor | None]:
    """The tangents of the inputs' gradients (None for absent inputs), given those of the results' ``gradients`` and of
    the inputs."""
    arguments, axes = (*gradients, *blocked.primals), (*blocked.result_axes, *blocked.axes)
    present = [t is not None for t in blocked.primals]

    def pieces() -> Iterator[tuple[Part, Sequence[Tensor]]]:
        for block, formula in blocked.blocks():
            function = _first_order(formula, len(gradients), present)
            yield block, pushed_forward(function, _cut(block, arguments, axes), _cut(block, tangents, axes))

    return _by_position(present, blocked.primals, blocked.axes, pieces(), blocked)


def backward_vjp(
    blocked: Blocked, gradients: Tensors, cotangents: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``gradients`` and of the inputs, those that are ``wanted``, given those of the inputs' gradients
    (None where one is absent or was not computed)."""
    arguments, axes = (*gradients, *blocked.primals), (*blocked.result_axes, *blocked.axes)
    wanted = [w and t is not None for w, t in zip(wanted, arguments)]
    computed = [t is not None for t in cotangents]

    def pieces() -> Iterator[tuple[Part, Sequence[Tensor]]]:
        for block, formula in blocked.blocks():
            first_order = _first_order(formula, len(gradients), computed)
            function, primals = restricted(wanted, first_order, _cut(block, arguments, axes))
            _, pullback = vjp(function, *primals)
            yield block, pullback(tuple(t for t in _cut(block, cotangents, blocked.axes) if t is not None))

    return _by_position(wanted, arguments, axes, pieces(), blocked)


def _first_order(formula: Formula, results: int, computed: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the ``computed`` inputs, as a differentiable function of the gradients of the first ``results``
    results and of the inputs."""

    def function(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        gradients, inputs = arguments[:results], arguments[results:]
        of_computed, primals = restricted(computed, formula, inputs)
        values, pullback = vjp(of_computed, *primals)
        return pullback(tuple(torch.zeros_like(v) if g is None else g.to(v.dtype) for g, v in zip(gradients, values)))

    return function


def _cut(block: Part, tensors: Tensors, axes: Sequence[Axes]) -> list[Tensor | None]:
    return [None if t is None else block.of(t, a) for t, a in zip(tensors, axes)]


def _by_position(
    computed: Sequence[bool], arguments: Tensors, axes: Sequence[Axes], pieces: Any, blocked: Blocked
) -> list[Tensor | None]:
    """:func:`_assembled` in the shapes and dtypes of the arguments that are ``computed``, None for the others."""
    chosen = [a for a, c in zip(arguments, computed) if c and a is not None]
    totals = _assembled(pieces, blocked, [a.shape for a in chosen], [a for a, c in zip(axes, computed) if c])
    found = iter(total.to(argument.dtype) for total, argument in zip(totals, chosen))
    return [next(found) if c else None for c in computed]


def _assembled(
    pieces: Iterator[tuple[Part, Sequence[Tensor]]],
    blocked: Blocked,
    shapes: Sequence[Sequence[int]],
    axes: Sequence[Axes],
) -> list[Tensor]:
    """Tensors of these shapes, the sums of the blocks' parts, added up in at least float32."""
    like = blocked.primals[0]
    assert like is not None
    totals: list[Tensor | None] = [None] * len(shapes)
    # The formula casts up what it computes in a wider dtype than its inputs'; autocast would cast that down again. It
    # may be on in the backward even where it was off in the forward.
    with torch.autocast(like.device.type, enabled=False):
        for block, parts in pieces:
            for i, (part, shape, part_axes) in enumerate(zip(parts, shapes, axes)):
                total, wide = totals[i], statistics_dtype(part.dtype)
                if part.shape == torch.Size(shape):
                    totals[i] = part.to(wide) if total is None else total + part
                    continue
                if total is None:  # made from the part, so that it carries the same transforms
                    total = totals[i] = part.new_zeros(shape, dtype=wide)
                view = block.of(total, part_axes)
                view += part
    wide = statistics_dtype(like.dtype)
    return [like.new_zeros(shape, dtype=wide) if t is None else t for shape, t in zip(shapes, totals)]
