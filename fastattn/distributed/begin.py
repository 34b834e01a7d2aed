"""The beginning of a call on shards: every rank checks its own arguments, all of them agree, and each has a run."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.distributed import allgather, exchange, ring, two_dimensions, ulysses
from fastattn.distributed.agreement import agree
from fastattn.distributed.call import Checked, Tensors, Words, check, said_of, spans, spans_of
from fastattn.distributed.columns import by_rows
from fastattn.distributed.layout import Place, ranks_of
from fastattn.distributed.parts import Run, Span
from fastattn.ops.attention import dropout
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.attention.operator import operands

# For each method the module with its ``forward`` and ``backward``.
METHODS: dict[str, ModuleType] = {"allgather": allgather, "ring": ring, "ulysses": ulysses, "2d": two_dimensions}

Spans = tuple[tuple[Span | None, ...], ...] | None  # of the pieces of each rank


class Started(NamedTuple):
    """A call on which all ranks have agreed."""

    method: ModuleType
    run: Run
    inputs: Any


def begin(tensors: Tensors, words: Words, places: tuple[Place, ...], seed: Tensor | None = None) -> Started:
    """Check a call, agree on it with the other ranks, and bring its masks into the form that methods take.

    Args:
        tensors: of this rank.
        words: of the call.
        places: of this process, one for each dimension of a mesh.
        seed: of dropout, int64 ``[1]``, where it was drawn already; None: the state is drawn here.

    Raises:
        TypeError, ValueError, NotImplementedError: this rank's arguments cannot be; the others are told.
        RanksDisagreeError: those of the ranks differ, or another rank refuses its own.
        RankLostError: a rank did not come.
    """
    device = tensors.query.device if isinstance(tensors.query, Tensor) else torch.device("cpu")
    try:
        checked = check(tensors, words, places)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        agree({}, {}, refusal, places, device)
        raise
    call = checked.call
    own = [spans(documents, places, checked.balance) for documents in (call.query_documents, call.key_documents)]
    said = agree(said_of(checked, words), {"spans": own}, None, places, device)
    checked = checked._replace(call=_with_rows(checked, places))
    of_queries, of_keys = (spans_of([of_rank["spans"][side] for of_rank in said], places) for side in (0, 1))
    inputs, _ = operands(checked.call, _dropout_state(call, places, seed), checked.backend)
    return Started(METHODS[checked.method], run_of(checked, places, of_queries, of_keys), inputs)


def run_of(checked: Checked, places: tuple[Place, ...], query_spans: Spans, key_spans: Spans) -> Run:
    """The run of a call whose mask is by rows, given the spans of all ranks' documents."""
    call = checked.call
    mask = call.bias if call.bias is not None else call.mask
    beside = ranks_of(places[1:])
    axes = (False, False)
    if mask is not None:
        axes = mask.shape[1] == call.query.shape[1] > 1, mask.shape[2] == call.query.shape[2]
    return Run(
        place=places[0],
        balance=checked.balance,
        rows=call.query.shape[2] * beside,
        keys=call.key.shape[2] * beside,
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        mask_axes=axes,
        options=operands(call, None, checked.backend, keeps_statistics=True)[1],
        longest_prefix=0 if call.prefix is None else int(call.prefix.max()),
        query_spans=query_spans,
        key_spans=key_spans,
        heads_for=places[1] if len(places) == 2 else None,
    )


def _with_rows(checked: Checked, places: tuple[Place, ...]) -> AttentionCall:
    """The call with this rank's rows of its mask."""
    call = checked.call
    if checked.attn_mask_by == "rows":
        return call
    masks = call.bias, call.mask
    bias, mask = (t if t is None else by_rows(t, call.key.shape[2], places, checked.balance) for t in masks)
    return call._replace(bias=bias, mask=mask)


def _dropout_state(call: AttentionCall, places: tuple[Place, ...], state: Tensor | None) -> Tensor | None:
    """The state that one process would draw for the whole sequence, from the first rank: every rank draws, so that
    generators which are alike remain so."""
    if call.dropout_p == 0.0:
        return None
    ranks = ranks_of(places)
    if state is None:
        rows = call.query.detach()[:, :, :1].expand(-1, -1, call.query.shape[2] * ranks, -1)
        state = dropout.draw(rows, call.key.shape[2] * ranks, call.dropout_p)
    for place in places:
        state = exchange.from_first(state, place, "the broadcast of dropout's state")
    return state
