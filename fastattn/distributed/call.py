"""One call on shards, as a rank checks it by itself, and what it says of it to the others."""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastattn.distributed import traffic, ulysses
from fastattn.distributed.agreement import digest
from fastattn.distributed.choosing import auto
from fastattn.distributed.functions import function_of_whole
from fastattn.distributed.layout import Balance, Place, check_balance, pieces, ranks_of
from fastattn.distributed.parts import Span
from fastattn.ops.attention import on_triton
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import AttentionCall, Function
from fastattn.ops.common import backends
from fastattn.ops.common.checks import check_attn_mask, shapes_of

Method = Literal["auto", "allgather", "ring", "ulysses", "2d"]
MaskSide = Literal["rows", "columns"]


class Tensors(NamedTuple):
    """What of a user's call may hold tensors, those that may have gradients first."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    key_padding_mask: Any = None
    prefix: Any = None
    document_ids: Any = None
    score_mod: Any = None
    mask_mod: Any = None


class Words(NamedTuple):
    """The rest of a user's call."""

    method: Any = "auto"
    balance: Any = "none"
    attn_mask_by: Any = "rows"
    is_causal: Any = False
    causal_alignment: Any = "top_left"
    window: Any = None
    softcap: Any = None
    scale: Any = None
    dropout_p: Any = 0.0
    return_lse: Any = False
    backend: Any = None


class Checked(NamedTuple):
    """A call that this rank has nothing against."""

    call: AttentionCall  # tensors are this rank's; bounds and shift are those of the whole sequence
    method: traffic.Method
    balance: Balance
    backend: str
    attn_mask_by: MaskSide  # bias and mask of the call have this rank's queries and all keys, or all and its keys


# The arguments of attention itself, but for the mask and the functions, which are of the whole sequence.
_OF_SHARDS = (
    "alibi_slopes", "sinks", "key_padding_mask", "prefix", "document_ids", "is_causal", "causal_alignment", "window",
    "softcap", "scale", "dropout_p", "return_lse",
)  # fmt: skip


def check(tensors: Tensors, words: Words, places: tuple[Place, ...]) -> Checked:
    """Check everything that a rank can check by itself."""
    method, attn_mask_by, attn_mask = words.method, words.attn_mask_by, tensors.attn_mask
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}")
    if (method == "2d") != (len(places) == 2) and method != "auto":
        raise ValueError(
            f"method={method!r} over ranks in {len(places)} dimensions: expected '2d' or 'auto' on a device mesh of "
            "two, and another method on a group or a mesh of one"
        )
    if attn_mask_by not in get_args(MaskSide):
        raise ValueError(f"attn_mask_by={attn_mask_by!r}: expected one of {', '.join(map(repr, get_args(MaskSide)))}")
    balance, world = check_balance(words.balance), ranks_of(places)
    given = {**tensors._asdict(), **words._asdict()}
    call = make_call(tensors.query, tensors.key, tensors.value, **{name: given[name] for name in _OF_SHARDS})
    query, key = call.query, call.key
    if 0 in (*query.shape[:3], key.shape[1], key.shape[2]):
        raise ValueError(f"{shapes_of(query, key, call.value)}: expected at least one query and one key on each rank")
    if balance == "zigzag" and world > 1 and (query.shape[2] % 2 or key.shape[2] % 2):
        raise ValueError(
            f"{shapes_of(query, key, call.value)}: expected even lengths (dimension 2) for balance='zigzag', which "
            "gives each rank two chunks of the sequence"
        )
    if attn_mask is not None:
        queries, keys = (
            t.new_empty((*t.shape[:2], t.shape[2] * (world if side == attn_mask_by else 1), 0))
            for t, side in ((query, "columns"), (key, "rows"))
        )
        attn_mask = check_attn_mask(attn_mask, queries, keys)
        is_boolean = attn_mask.dtype == torch.bool
        call = call._replace(mask=attn_mask if is_boolean else None, bias=None if is_boolean else attn_mask)
    score_mod, mask_mod = (
        function_of_whole(kind, getattr(tensors, kind), query, key, world) for kind in ("score_mod", "mask_mod")
    )
    call = call._replace(score_mod=score_mod, mask_mod=mask_mod)
    further = (world - 1) * call.shift
    call = call._replace(
        lower=None if call.lower is None else call.lower + further,
        upper=None if call.upper is None else call.upper + further,
        shift=call.shift + further,
    )
    chosen = backends.choose(call, words.backend, triton_refusals)
    heads, kv_heads = query.shape[1], key.shape[1]
    refusal = ulysses.refusal(heads, kv_heads, places[-1].world)
    if method == "auto":
        method = auto(call, places, balance).method
    if method in ("ulysses", "2d") and refusal is not None:
        raise ValueError(f"method={method!r}: {refusal}: expected heads that the ranks can share, or another method")
    if balance == "stripe" and method != "ulysses" and call.alibi_slopes is not None and places[0].world > 1:
        raise NotImplementedError(
            f"balance='stripe' with alibi_slopes and method={method!r}: the distances between two stripes are no whole "
            "numbers of their tokens; balance='zigzag' and method='ulysses' have them"
        )
    return Checked(call, method, balance, chosen, attn_mask_by)


def triton_refusals(call: AttentionCall) -> list[str]:
    """Why the kernels cannot run the parts of a call; empty where they can."""
    reasons = on_triton.refusals(call)
    if call.dropout_p > 0.0:
        reasons.append(
            f"dropout_p={call.dropout_p}: the kernels draw by a weight's place in their own call, and so would not "
            "drop what one process does"
        )
    return reasons


def said_of(checked: Checked, words: Words) -> dict[str, Any]:
    """What has to be the same on every rank."""
    call = checked.call

    def kind(tensor: Tensor | None) -> Any:
        return None if tensor is None else [str(tensor.dtype).removeprefix("torch."), *tensor.shape]

    differentiable = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
    trained = [
        "attn_mask" if name == "bias" else name
        for name in differentiable
        if torch.is_grad_enabled() and (t := getattr(call, name)) is not None and t.requires_grad
    ]
    return {
        **{name: kind(getattr(call, name)) for name in ("query", "key", "value")},
        "device": call.query.device.type,
        "method": checked.method,
        "balance": checked.balance,
        "backend": checked.backend,
        **{name: getattr(words, name) for name in ("is_causal", "causal_alignment", "window", "softcap", "dropout_p")},
        "scale": call.scale,
        "return_lse": call.return_lse,
        "attn_mask": kind(call.bias if call.bias is not None else call.mask),
        "attn_mask_by": checked.attn_mask_by,
        "key_padding_mask": kind(call.key_padding_mask),
        "document_ids": [kind(call.query_documents), kind(call.key_documents)],
        **{name: digest(getattr(call, name)) for name in ("prefix", "alibi_slopes", "sinks")},
        **{name: _said_of_function(getattr(call, name)) for name in ("score_mod", "mask_mod")},
        "tensors that need gradients": trained,
    }


def _said_of_function(function: Function | None) -> Any:
    """A digest of its program, and what it captures."""
    if function is None:
        return None
    read = [[str(t.dtype).removeprefix("torch."), *t.shape, t.requires_grad] for t in function.captured]
    return [f"a program of digest {zlib.crc32(function.text.encode()):08x}", read]


def spans(documents: Tensor | None, places: tuple[Place, ...], balance: Balance) -> list[list[int] | None] | None:
    """The smallest and the largest number that this rank has of each piece of a shard along the first dimension."""
    if documents is None:
        return None
    tokens = documents.shape[1]
    first = places[1].rank * tokens if len(places) == 2 else 0
    found: list[list[int] | None] = []
    for piece in pieces(places[0].rank, places[0].world, tokens * ranks_of(places[1:]), balance):
        own = documents[:, max(0, piece.local.start - first) : max(0, piece.local.stop - first)]
        found.append([int(edge) for edge in own.aminmax()] if own.numel() else None)
    return found


def spans_of(
    said: list[list[list[int] | None] | None], places: tuple[Place, ...]
) -> tuple[tuple[Span | None, ...], ...] | None:
    """The spans of each rank along the first dimension, of what :func:`spans` gives on every rank."""
    beside = ranks_of(places[1:])
    found: list[tuple[Span | None, ...]] = []
    for rank in range(0, len(said), beside):
        together: list[Span | None] = []
        for of_piece in zip(*(of_rank or () for of_rank in said[rank : rank + beside])):
            edges = [edge for span in of_piece if span is not None for edge in span]
            together.append(Span(min(edges), max(edges)) if edges else None)
        found.append(tuple(together))
    return None if said[0] is None else tuple(found)
