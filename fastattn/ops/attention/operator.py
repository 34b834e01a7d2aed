"""Attention as the operators ``fastattn::attention_forward`` and ``attention_backward``; see ``row_operator``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import blocks, cutting
from fastattn.ops.attention.contract import (
    AttentionCall,
    InputGradients,
    Inputs,
    Kept,
    Needs,
    Options,
    OutputGradients,
    Results,
    empty_gradients,
    empty_results,
    stored,
    weights_shape,
)
from fastattn.ops.attention.functions import on_torch as functions
from fastattn.ops.attention.functions.contract import (
    ModifiedInputGradients,
    ModifiedInputs,
    ModifiedNeeds,
    empty_modified_gradients,
    read_by,
)
from fastattn.ops.common.blocks import OF_ROWS, SCORES, Axes, Block, statistics_dtype
from fastattn.ops.common.derivatives import Blocked, Formula
from fastattn.ops.common.flops import product_flops
from fastattn.ops.common.operator import apply as apply_function
from fastattn.ops.common.operator import take
from fastattn.ops.common.row_operator import BackwardFunction, ForwardFunction, RowOperator, apply_unwatched
from fastattn.ops.common.short_way import is_looked_at
from fastattn.ops.common.tracing import is_eager_on_cpu, is_traced
from fastattn.reference import attention as reference


def implementation(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``dropout_keep`` implement the operators for a backend."""
    if backend == "triton":
        from fastattn.ops.attention import launch  # imports triton

        return launch
    return blocks


# ---------------------------------------------------------------------------------------------------------- the formula


def _pair_of(inputs: Inputs) -> RowOperator:
    """The pair of operators that takes these inputs."""
    return ATTENTION if isinstance(inputs, Inputs) else MODIFIED


def _blocked(inputs: Inputs, options: Options) -> Blocked:
    """Output, LSE and weights as a formula of the differentiable inputs, cut into blocks. Only dropout's kept weights
    are ever whole, as booleans."""
    query = inputs.query
    weights: dict[str, Axes] = {"none": (None,), "average": ("batch", "rows", "keys"), "heads": SCORES}

    def each() -> Iterator[tuple[Block, Formula]]:
        for block, own, rules in each_block(inputs, options):
            yield block, formula(own, rules, block)

    pair = _pair_of(inputs)
    return Blocked(
        primals=[t if t is None or t.is_floating_point() else None for t in pair.differentiable(inputs)],
        axes=pair.differentiable(cutting.axes_of(inputs._fields)),
        result_shapes=(
            (*query.shape[:3], inputs.value.shape[3]),
            query.shape[:3],
            weights_shape(query, inputs.key, options.weights),
        ),
        result_dtypes=(query.dtype, statistics_dtype(query.dtype), query.dtype),
        result_axes=(OF_ROWS, OF_ROWS, weights[options.weights]),
        blocks=each,
    )


def formula(inputs: Inputs, options: Options, block: Block) -> Formula:
    """What ``attention_forward`` computes of the differentiable inputs of a block that :func:`cutting.cut` made; the
    dropout state is the kept weights."""
    compute = torch.promote_types(inputs.query.dtype, torch.float32)
    captured = _pair_of(inputs).differentiable(inputs._fields)[len(ATTENTION.differentiable(Inputs._fields)) :]

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        *of_captured: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        score_mod = None
        if options.score_mod:
            differentiable: dict[str, Any] = dict(zip(captured, of_captured))
            read = functions.read_by_score_mod(inputs._replace(**differentiable), options)
            score_mod = functions.bound(read, options, block)
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
            score_mod=score_mod,
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

    return function


def each_block(inputs: Inputs, options: Options) -> Iterator[tuple[Block, Inputs, Options]]:
    """Every block, and the call that it is by itself."""
    if inputs.dropout_state is not None:
        keep = implementation(options.backend).dropout_keep(inputs, options)
        inputs = inputs._replace(dropout_state=keep)
    (size, _, length), keys = inputs.query.shape[:3], inputs.key.shape[2]
    if not keys:
        yield Block(slice(0, size), slice(0, length), slice(0, 0)), inputs, options
    for batch in cutting.batches(inputs, options):
        # No block is left out by a look at numbers, which transforms do not allow, and none where there are sinks: the
        # LSE of a row without keys is its sink.
        for block in cutting.blocks(inputs, options, batch, looks=False, skips=inputs.sinks is None):
            yield block, *cutting.cut(block, inputs, options)


# -------------------------------------------------------------------------------------------------------- the operators


def _forward_flops(inputs: Any, options: Options) -> int:
    """``Q K^T`` and ``P V``."""
    query, key, value = inputs.query, inputs.key, inputs.value
    return product_flops(query, key, query[3]) + product_flops(query, key, value[3])


def _backward_flops(inputs: Any, options: Options) -> int:
    """``dQ``, ``dK``, ``dV`` and ``dP``; and ``Q K^T`` again, where torch's module would not have kept the weights."""
    query, key, value = inputs.query, inputs.key, inputs.value
    of_scores = 3 if options.weights == "none" else 2
    return of_scores * product_flops(query, key, query[3]) + 2 * product_flops(query, key, value[3])


ATTENTION = RowOperator(
    name="attention",
    inputs=Inputs,
    options=Options,
    results=Results,
    kept=Kept,
    output_gradients=OutputGradients,
    needs=Needs,
    input_gradients=InputGradients,
    implementation=implementation,
    ask=lambda *optional: Needs(*optional, d_weights_may_be_zeros=is_traced()),
    stored=stored,
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    blocked=_blocked,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


MODIFIED = dataclasses.replace(
    ATTENTION,
    name="attention_modified",
    inputs=ModifiedInputs,
    needs=ModifiedNeeds,
    input_gradients=ModifiedInputGradients,
    ask=lambda *optional: ModifiedNeeds(*optional, d_weights_may_be_zeros=is_traced()),
    empty_gradients=empty_modified_gradients,
)


class AttentionBackward(BackwardFunction):
    """The gradients of :class:`Attention`."""

    pair, operator = ATTENTION, ATTENTION.backward

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        arguments, dims = cls.operator.split(args), cls.operator.split(in_dims)
        inputs, needs, samples = arguments.inputs, arguments.needs, info.batch_size
        if inputs.dropout_state is not None:  # each sample draws its own, or all of them the same: no folding
            return super().vmap(info, in_dims, *args)
        # an optional input whose gradient is needed has one gradient for each sample, and may not stay shared
        alone = [name for name in _BROADCASTING if getattr(needs, f"needs_d_{name}", False)]
        folded = _fold(
            samples,
            (*dims.gradients, *dims.kept, *dims.inputs),
            (*arguments.gradients, *arguments.kept, *inputs),
            (*OutputGradients._fields, *Kept._fields, *Inputs._fields),
            broadcasting=set(_BROADCASTING) - set(alone),
        )
        gradients, kept, tensors = take(folded, OutputGradients, Kept, Inputs)
        results = cls.apply(*gradients, *kept, *needs, *tensors, *arguments.options)
        out_dims = tuple(0 if computed else None for computed in cls.pair.computed(needs))
        found = InputGradients(*_unfolded(samples, results, out_dims))
        for name in alone:
            tensor, dim = getattr(inputs, name), getattr(dims.inputs, name)
            shape = tensor.shape if dim is None else tensor.select(dim, 0).shape
            gradient = getattr(found, f"d_{name}").sum_to_size(samples, *shape)
            found = found._replace(**{f"d_{name}": gradient})
        return tuple(found), out_dims


class Attention(ForwardFunction):
    """``(output, lse, weights, statistics)`` of one call; ``weights`` is empty where none are asked for."""

    pair, operator, backward_function = ATTENTION, ATTENTION.forward, AttentionBackward

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        inputs, options = cls.operator.split(args)
        if inputs.dropout_state is not None:  # each sample draws its own, or all of them the same: no folding
            return super().vmap(info, in_dims, *args)
        dims = cls.operator.split(in_dims).inputs
        folded = _fold(info.batch_size, dims, inputs, Inputs._fields, broadcasting=_BROADCASTING)
        out_dims = tuple(0 if is_stored else None for is_stored in stored(options))
        return _unfolded(info.batch_size, cls.apply(*folded, *options), out_dims), out_dims


class ModifiedBackward(BackwardFunction):
    """The gradients of :class:`Modified`."""

    pair, operator = MODIFIED, MODIFIED.backward


class Modified(ForwardFunction):
    """:class:`Attention` of a call with functions of the user's. Functions are told the number of a batch entry, so
    that samples of a vmap are no further batch entries: each is a call by itself."""

    pair, operator, backward_function = MODIFIED, MODIFIED.forward, ModifiedBackward


# ----------------------------------------------------------------------------------------------------------------- vmap

# The inputs that broadcast over a batch of 1.
_BROADCASTING = ("bias", "alibi_slopes", "sinks", "mask", "query_documents", "key_documents", "prefix")


def _fold(
    samples: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Any],
    names: Sequence[str],
    *,
    broadcasting: Collection[str],
) -> list[Tensor | None]:
    """Fold vmap's dimension of every tensor into the batch, whose size is the first tensor's.

    A tensor whose name is in ``broadcasting`` stays as it is where all samples and all batch entries share it.
    """
    batch = tensors[0].shape[0] if in_dims[0] is None else tensors[0].select(in_dims[0], 0).shape[0]
    folded: list[Tensor | None] = []
    for name, tensor, dim in zip(names, tensors, in_dims):
        if tensor is None or (dim is None and name in broadcasting and tensor.shape[0] == 1):
            folded.append(tensor)
        else:
            tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
            folded.append(tensor.expand(samples, batch, *tensor.shape[2:]).flatten(0, 1))
    return folded


def _unfolded(samples: int, tensors: Sequence[Tensor], out_dims: Sequence[int | None]) -> tuple[Tensor, ...]:
    """Undo :func:`_fold` on results. Those without a dimension for vmap are empty placeholders."""
    return tuple(
        t if dim is None else t.view(samples, t.shape[0] // samples, *t.shape[1:]) for t, dim in zip(tensors, out_dims)
    )


# --------------------------------------------------------------------------------------------------------------- a call

# The arguments of the operators that a call has under the same names.
_TENSORS_OF_CALL = [name for name in Inputs._fields if name in AttentionCall._fields]
_OPTIONS_OF_CALL = Options._fields[: Options._fields.index("backend")]


def apply(
    call: AttentionCall, dropout_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, weights or None, lse or None)`` of a call, through the operators."""
    function = Modified if call.is_modified else Attention
    inputs, options = operands(call, dropout_state, backend)
    if backend == "torch" and is_eager_on_cpu(call.query) and not is_looked_at():
        results = Results(*apply_unwatched(function, inputs, options))
    else:
        results = Results(*apply_function(function, inputs, options))
    weights = None if call.weights == "none" else results.weights
    return results.output, weights, results.lse if call.return_lse else None


def operands(
    call: AttentionCall, dropout_state: Tensor | None, backend: str, *, keeps_statistics: bool | None = None
) -> tuple[Inputs, Options]:
    """A call in the form that the operators take; statistics are kept where autograd may ask for them, by default."""
    if keeps_statistics is None:
        keeps_statistics = call.return_lse or torch.is_grad_enabled()
    inputs = Inputs(*(getattr(call, name) for name in _TENSORS_OF_CALL), dropout_state=dropout_state)
    options = Options(
        *(getattr(call, name) for name in _OPTIONS_OF_CALL), backend=backend, keeps_statistics=keeps_statistics
    )
    if call.is_modified:
        empty = dict.fromkeys(name for name in ModifiedInputs._fields if name not in Inputs._fields)
        inputs = ModifiedInputs(**inputs._asdict(), **{**empty, **read_by(call)})
        options = options._replace(
            score_mod="" if call.score_mod is None else call.score_mod.text,
            mask_mod="" if call.mask_mod is None else call.mask_mod.text,
            first_batch=call.first_batch,
            first_row=call.first_row,
            first_key=call.first_key,
        )
    return inputs, options
