"""Derivatives beyond the first: ``torch.func`` over the reference's formula, a block of rows at a time.

Every block of rows is an attention call of its own, and what depends on keys, values, slopes or sinks adds up over
them. So forward mode and second derivatives are exact on every backend, in memory O(rows of a block x S): the
``[B, H, L, S]`` intermediates are never whole. Only dropout's kept weights are, as booleans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops._contract import DIFFERENTIABLE, Inputs, Options, implementation, statistics_dtype, weights_shape
from fastattn.ops._functional import Tensors, of, pushed_forward, vjp
from fastattn.ops._torch_blocks import INPUT_AXES, OF_ROWS, SCORES, Axes, Block, batches, blocks
from fastattn.reference import attention as reference


def forward_jvp(inputs: Inputs, options: Options, tangents: Tensors) -> list[Tensor]:
    """The tangents of output, LSE and weights, given those of the differentiable inputs (None: zero)."""
    shapes = (
        (*inputs.query.shape[:3], inputs.value.shape[3]),
        inputs.query.shape[:3],
        weights_shape(inputs.query, inputs.key, options.weights),
    )

    def pieces() -> Iterator[tuple[Block, Sequence[Tensor]]]:
        for block, own, rules in _each_block(inputs, options):
            primals = own[:DIFFERENTIABLE]
            given = _cut(block, tangents, INPUT_AXES)
            yield block, pushed_forward(lambda *t, own=own, rules=rules: _formula(own, rules, t), primals, given)

    return _assembled(pieces(), inputs.query, shapes, _result_axes(options))


def backward_jvp(gradients: Tensors, inputs: Inputs, options: Options, tangents: Tensors) -> list[Tensor | None]:
    """The tangents of the differentiable inputs' gradients (None for absent inputs), given those of the results'
    ``gradients`` and of the inputs."""
    arguments, axes = (*gradients, *inputs[:DIFFERENTIABLE]), (*_result_axes(options), *INPUT_AXES[:DIFFERENTIABLE])
    present = [t is not None for t in inputs[:DIFFERENTIABLE]]

    def pieces() -> Iterator[tuple[Block, Sequence[Tensor]]]:
        for block, own, rules in _each_block(inputs, options):
            first_order = _first_order(own, rules, present)
            yield block, pushed_forward(first_order, _cut(block, arguments, axes), _cut(block, tangents, axes))

    return _by_position(present, arguments[3:], axes[3:], pieces(), inputs.query)


def backward_vjp(
    gradients: Tensors, inputs: Inputs, options: Options, cotangents: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``gradients`` and of the differentiable inputs, those that are ``wanted``, given those of the
    inputs' gradients (None where one is absent or was not computed)."""
    arguments, axes = (*gradients, *inputs[:DIFFERENTIABLE]), (*_result_axes(options), *INPUT_AXES[:DIFFERENTIABLE])
    wanted = [w and t is not None for w, t in zip(wanted, arguments)]
    computed = [t is not None for t in cotangents]

    def pieces() -> Iterator[tuple[Block, Sequence[Tensor]]]:
        for block, own, rules in _each_block(inputs, options):
            function, primals = of(wanted, _first_order(own, rules, computed), _cut(block, arguments, axes))
            _, pullback = vjp(function, *primals)
            yield block, pullback(tuple(t for t in _cut(block, cotangents, axes[3:]) if t is not None))

    return _by_position(wanted, arguments, axes, pieces(), inputs.query)


# ----------------------------------------------------------------------------------------------------- one block's work


def _formula(inputs: Inputs, options: Options, differentiable: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """What ``attention_forward`` computes, as a differentiable expression; the dropout state is the kept weights."""
    query, key, value, bias, alibi_slopes, sinks = differentiable
    assert query is not None and key is not None and value is not None
    compute = torch.promote_types(query.dtype, torch.float32)
    result = reference(
        query.to(compute),
        key.to(compute),
        value.to(compute),
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mask=inputs.mask,
        key_padding_mask=inputs.key_padding_mask,
        query_documents=inputs.query_documents,
        key_documents=inputs.key_documents,
        prefix=inputs.prefix,
        lower=options.lower,
        upper=options.upper,
        shift=options.shift,
        softcap=options.softcap,
        scale=options.scale,
        dropout_keep=inputs.dropout_state,
        dropout_p=options.dropout_p,
    )
    weights = {
        "none": lambda: query.new_empty(0),
        "average": lambda: result.weights.mean(dim=1).to(query.dtype),
        "heads": lambda: result.weights.to(query.dtype),
    }[options.weights]()
    return result.output.to(query.dtype), result.lse, weights


def _first_order(inputs: Inputs, options: Options, computed: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """What ``attention_backward`` computes of the inputs' gradients, as a differentiable function of the results'
    gradients and the inputs."""

    def function(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        gradients, differentiable = arguments[:3], arguments[3:]
        results, primals = of(computed, lambda *t: _formula(inputs, options, t), differentiable)
        values, pullback = vjp(results, *primals)
        return pullback(tuple(torch.zeros_like(v) if g is None else g.to(v.dtype) for g, v in zip(gradients, values)))

    return function


# ---------------------------------------------------------------------------------------------------- all of the blocks


def _each_block(inputs: Inputs, options: Options) -> Iterator[tuple[Block, Inputs, Options]]:
    """Every block, and the call that it is by itself."""
    if inputs.dropout_state is not None:
        keep = implementation(options.backend).dropout_keep(inputs, options)
        inputs = inputs._replace(dropout_state=keep)
    (size, _, length), keys = inputs.query.shape[:3], inputs.key.shape[2]
    if not keys:
        yield Block(slice(0, size), slice(0, length), slice(0, 0)), inputs, options
    for batch in batches(inputs, options):
        # nothing looks at numbers, which transforms would not allow; the LSE of a row without keys is its sink
        for block in blocks(inputs, options, batch, looks=False, skips=inputs.sinks is None):
            yield block, *block.cut(inputs, options)


def _cut(block: Block, tensors: Tensors, axes: Sequence[Axes]) -> list[Tensor | None]:
    return [None if t is None else block.of(t, a) for t, a in zip(tensors, axes)]


def _result_axes(options: Options) -> tuple[Axes, Axes, Axes]:
    """Those of output, LSE and weights."""
    weights: dict[str, Axes] = {"none": (None,), "average": ("batch", "rows", "keys"), "heads": SCORES}
    return OF_ROWS, OF_ROWS, weights[options.weights]


def _by_position(
    computed: Sequence[bool], arguments: Tensors, axes: Sequence[Axes], pieces: Any, query: Tensor
) -> list[Tensor | None]:
    """:func:`_assembled` in the shapes and dtypes of the arguments that are ``computed``, None for the others."""
    chosen = [a for a, c in zip(arguments, computed) if c and a is not None]
    totals = _assembled(pieces, query, [a.shape for a in chosen], [a for a, c in zip(axes, computed) if c])
    found = iter(total.to(argument.dtype) for total, argument in zip(totals, chosen))
    return [next(found) if c else None for c in computed]


def _assembled(
    pieces: Iterator[tuple[Block, Sequence[Tensor]]],
    query: Tensor,
    shapes: Sequence[Sequence[int]],
    axes: Sequence[Axes],
) -> list[Tensor]:
    """Tensors of these shapes, the sums of what the blocks give, in at least float32."""
    totals: list[Tensor | None] = [None] * len(shapes)
    for block, parts in pieces:
        for i, (part, shape, part_axes) in enumerate(zip(parts, shapes, axes)):
            total = totals[i]
            if part.shape == torch.Size(shape):
                totals[i] = part if total is None else total + part
                continue
            if total is None:  # made from the part, so that it carries the same transforms
                total = totals[i] = part.new_zeros(shape, dtype=statistics_dtype(part.dtype))
            view = block.of(total, part_axes)
            view += part
    dtype = statistics_dtype(query.dtype)
    return [query.new_zeros(s, dtype=dtype) if t is None else t for s, t in zip(shapes, totals)]
