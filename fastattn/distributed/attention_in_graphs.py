"""A call on shards inside of a graph that torch.compile makes: the exchange ``attention`` of ``in_graphs``.

At run time it begins as an eager call does. What its backward is to get beside the inputs, a graph has to know by its
shapes: the documents of all ranks, the state of dropout, a mask by rows that came by columns, and by heads all inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.distributed.begin import METHODS, Spans, begin, run_of
from fastattn.distributed.call import Checked, Tensors, Words, check
from fastattn.distributed.columns import home, shape_of_rows
from fastattn.distributed.in_graphs import Exchange, on_ranks, places_of, register
from fastattn.distributed.layout import Place, pieces, ranks_of
from fastattn.distributed.parts import Done, Span
from fastattn.ops.attention.contract import Inputs, Kept, Needs, OutputGradients, statistics_shape
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import under_autocast

# Inputs of the exchange: tensors of a call that are no functions; behind them stand the documents of queries, of keys,
# and the seed of dropout.
_GIVEN = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "key_padding_mask", "prefix")
_DIFFERENTIABLE = 6  # of them, the first
_NOTHING = Span(torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min)  # of a piece that has no token


def attention_in_graph(tensors: Tensors, words: Words, group_or_mesh: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE.

    Raises:
        NotImplementedError: there are functions of the user's.
    """
    if tensors.score_mod is not None or tensors.mask_mod is not None:
        raise NotImplementedError(
            "score_mod or mask_mod of context_parallel_attention under torch.compile: expected a call outside of a "
            "graph, such as in a function that is decorated with torch.compiler.disable"
        )
    query, key, value = under_autocast(tensors.query, tensors.key, tensors.value)
    prefix, documents = tensors.prefix, tensors.document_ids
    of_queries, of_keys = documents if isinstance(documents, tuple) else (documents, None)
    number = None if isinstance(prefix, Tensor) else prefix
    left, right = (None, None) if words.window is None else words.window
    said = [(name, word) for name, word in zip(Words._fields, words) if name != "window"]
    said += [("window", words.window is not None), ("left", left), ("right", right), ("prefix", number)]
    masks = tensors.attn_mask, tensors.alibi_slopes, tensors.sinks, tensors.key_padding_mask
    seed = None
    if isinstance(words.dropout_p, float) and words.dropout_p > 0.0:
        seed = torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=query.device)
    given = query, key, value, *masks, prefix if number is None else None, of_queries, of_keys, seed
    output, lse, *_ = on_ranks("attention", group_or_mesh, said, *given)
    return output, lse


def _call(spec: dict[str, Any], given: Any) -> tuple[Tensors, Words]:
    """The call of an exchange."""
    *tensors, of_queries, of_keys, _ = given
    named: dict[str, Any] = dict(zip(_GIVEN, tensors))
    for (name, tensor), is_trained in zip(named.items(), spec["trained"]):
        named[name] = None if tensor is None else tensor.detach().requires_grad_(is_trained)
    named["prefix"] = spec["prefix"] if named["prefix"] is None else named["prefix"]
    documents = of_queries if of_keys is None else (of_queries, of_keys)
    said = {name: spec[name] for name in Words._fields}
    said["window"] = (spec["left"], spec["right"]) if said["window"] else None
    return Tensors(**named, document_ids=documents, score_mod=None, mask_mod=None), Words(**said)


def _kept_names(checked: Checked) -> list[str]:
    """The inputs that the backward cannot have from the exchange's own."""
    call = checked.call
    if checked.method in ("ulysses", "2d"):
        names = [name for name in Inputs._fields if name != "dropout_state" and getattr(call, name) is not None]
    else:
        names = [n for n in ("bias", "mask") if checked.attn_mask_by == "columns" and getattr(call, n) is not None]
    return [*names, *(["dropout_state"] if call.dropout_p > 0.0 else [])]


# -------------------------------------------------------------------------------------------------------------- forward


def _forward(spec: dict[str, Any], given: Any) -> list[Tensor]:
    tensors, words = _call(spec, given)
    with torch.enable_grad():  # which a call asks for, to know what is trained
        places = places_of(spec)
        checked = check(tensors, words, places)
        started = begin(tensors, words, places, given[-1])
    done: Done = started.method.forward(started.run, started.inputs)
    if not any(spec["trained"]):
        return [_own(done.output), _own(done.lse)]
    kept = [getattr(done.inputs, name) for name in _kept_names(checked)]
    if checked.method in ("ulysses", "2d"):
        kept += done.kept
    spans = [_as_numbers(each, done.output.device) for each in (started.run.query_spans, started.run.key_spans)]
    return [_own(tensor) for tensor in (done.output, done.lse, *spans, *kept)]


def _own(tensor: Tensor) -> Tensor:
    """A tensor in memory of its own, as an operator has to return it."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _like_forward(spec: dict[str, Any], given: Any) -> list[Tensor]:
    places = places_of(spec)
    with torch.enable_grad():
        checked = check(*_call(spec, given), places)
    call = checked.call
    query, ranks, by_heads = call.query, ranks_of(places), checked.method in ("ulysses", "2d")
    dtype, value_dim = statistics_dtype(query.dtype), call.value.shape[3]
    edges = len(pieces(0, places[0].world, 2, checked.balance))
    of_documents = (places[0].world, edges, 2) if call.query_documents is not None else (0,)
    found = [query.new_empty((*query.shape[:3], value_dim)), query.new_empty(query.shape[:3], dtype=dtype)]
    if not any(spec["trained"]):
        return found
    found += [query.new_empty(of_documents, dtype=torch.int64) for _ in range(2)]
    for name in _kept_names(checked):
        if name == "dropout_state":  # by heads alone the kept weights of these, else the seed
            scores = (query.shape[0], query.shape[1] // ranks, query.shape[2] * ranks, call.key.shape[2] * ranks)
            kept, seed = query.new_empty(scores, dtype=torch.bool), query.new_empty((1,), dtype=torch.int64)
            found.append(kept if checked.method == "ulysses" else seed)
            continue
        tensor = getattr(call, name)
        shape = list(tensor.shape)
        if name in ("bias", "mask") and checked.attn_mask_by == "columns":
            shape = shape_of_rows(shape, call.key.shape[2], places)
        found.append(tensor.new_empty(_by_heads(name, shape, call, places[-1]) if by_heads else shape))
    if by_heads:
        batch, heads, rows, _ = _by_heads("query", list(query.shape), call, places[-1])
        found.append(query.new_empty((batch, heads, rows, value_dim)))
        backend = checked.backend if checked.method == "ulysses" else "torch"  # a ring keeps the LSE
        found.append(query.new_empty(statistics_shape(query.new_empty((batch, heads, rows, 0)), backend), dtype=dtype))
    return found


def _by_heads(name: str, shape: list[int], call: Any, place: Place) -> list[int]:
    """The shape of an input of some heads and of all tokens of the ranks that share the heads."""
    ranks, rows = place.world, call.query.shape[2]
    if name == "query":
        return [shape[0], shape[1] // ranks, shape[2] * ranks, shape[3]]
    if name in ("key", "value"):
        return [shape[0], max(1, shape[1] // ranks), shape[2] * ranks, shape[3]]
    if name in ("alibi_slopes", "sinks"):
        return [shape[0], shape[1] // ranks]
    if name in ("bias", "mask"):
        heads = shape[1] // ranks if shape[1] == call.query.shape[1] > 1 else shape[1]
        return [shape[0], heads, shape[2] * ranks if shape[2] == rows else shape[2], shape[3]]
    return shape if name == "prefix" else [shape[0], shape[1] * ranks]


def _as_numbers(spans: Spans, device: torch.device) -> Tensor:
    """The spans of documents as a tensor; empty where there are none."""
    if spans is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.tensor([[span or _NOTHING for span in of_rank] for of_rank in spans], dtype=torch.int64, device=device)


def _as_spans(numbers: Tensor) -> Spans:
    if not numbers.numel():
        return None
    return tuple(
        tuple(None if (found := Span(*edges)) == _NOTHING else found for edges in of_rank)
        for of_rank in numbers.tolist()
    )


# ------------------------------------------------------------------------------------------------------------- backward


def _backward(spec: dict[str, Any], grads: Any, found: Any, given: Any) -> list[Tensor]:
    output, lse, query_spans, key_spans, *rest = found
    places = places_of(spec)
    tensors, words = _call(spec, given)
    with torch.enable_grad():
        checked = check(tensors, words, places)
    names = _kept_names(checked)
    of_call: dict[str, Any] = {name: getattr(checked.call, name) for name in Inputs._fields if name != "dropout_state"}
    inputs = Inputs(**(of_call | {"dropout_state": None, **dict(zip(names, rest))}))
    kept = Kept(*rest[len(names) :]) if checked.method in ("ulysses", "2d") else Kept(output, lse)
    if checked.attn_mask_by == "columns":  # a run asks for the axes of rows alone
        shapes = {
            name: mask.new_empty((*shape_of_rows(mask.shape, tensors.key.shape[2], places)[:3], 0))
            for name in ("bias", "mask")
            if (mask := of_call[name]) is not None
        }
        checked = checked._replace(call=checked.call._replace(**shapes))
    run = run_of(checked, places, _as_spans(query_spans), _as_spans(key_spans))
    d_output, d_lse = grads
    d_output = torch.zeros_like(output) if d_output is None else d_output
    needs = Needs(*(bool(spec["trained"][number]) for number in (3, 4, 5)), d_weights_may_be_zeros=False)
    needs = needs._replace(needs_d_bias=needs.needs_d_bias and checked.call.bias is not None)
    gradients = list(METHODS[checked.method].backward(run, OutputGradients(d_output, d_lse, None), kept, needs, inputs))
    if needs.needs_d_bias and checked.attn_mask_by == "columns":
        gradients[3] = home(gradients[3], of_call["bias"].shape, tensors.key.shape[2], places, checked.balance)
    return [_of_input(g, t, needed) for g, t, needed in _with_gradients(gradients, spec, given)]


def _like_backward(spec: dict[str, Any], grads: Any, found: Any, given: Any) -> list[Tensor]:
    return [_of_input(t, t, needed) for _, t, needed in _with_gradients(given, spec, given)]


def _with_gradients(gradients: Any, spec: dict[str, Any], given: Any) -> Iterator[tuple[Any, Any, bool]]:
    """Each input with its gradient, and whether it is needed."""
    for number, tensor in enumerate(given):
        is_needed = number < _DIFFERENTIABLE and bool(spec["trained"][number])
        yield (gradients[number] if is_needed else None), (given[0] if tensor is None else tensor), is_needed


def _of_input(gradient: Any, tensor: Tensor, is_needed: bool) -> Tensor:
    """A gradient in the shape of its input, in memory of its own."""
    if not is_needed:
        return tensor.new_empty(0)
    return _own(gradient.reshape(tensor.shape))


register("attention", Exchange(_forward, _like_forward, _backward, _like_backward, results=2))
