"""The public functions: attention over a sequence that is shared out among ranks, and the sharing out."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.distributed import allgather, exchange, ring, ulysses
from fastattn.distributed.agreement import agree, digest
from fastattn.distributed.layout import (
    Balance,
    Piece,
    Place,
    check_balance,
    in_order,
    out_of_order,
    pieces,
    place_in,
)
from fastattn.distributed.parts import Done, Run, Span
from fastattn.ops.attention import dropout, on_triton
from fastattn.ops.attention.call import make_call
from fastattn.ops.attention.contract import Alignment, AttentionCall, Inputs, Kept, Needs, OutputGradients
from fastattn.ops.attention.operator import operands
from fastattn.ops.common import backends
from fastattn.ops.common.blocks import statistics_dtype
from fastattn.ops.common.checks import check_attn_mask, shape_of, shapes_of
from fastattn.ops.common.operator import take

Method = Literal["auto", "allgather", "ring", "ulysses"]

_METHODS: dict[str, ModuleType] = {"allgather": allgather, "ring": ring, "ulysses": ulysses}
# Below so many keys on each rank one exchange of all of them is faster than many of a shard.
_FEWEST_KEYS_OF_RING = 4096


# ------------------------------------------------------------------------------------------------------- a checked call


class _Checked(NamedTuple):
    """A call that this rank has nothing against."""

    call: AttentionCall  # bounds and shift are those of the whole sequence; what is said of keys by the mask, too
    method: str
    balance: Balance
    backend: str


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, words: dict[str, Any], method: Any,
    balance: Any, backend: backends.Backend | None, place: Place,
) -> _Checked:  # fmt: skip
    """Check everything that a rank can check by itself."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}")
    balance, world = check_balance(balance), place.world
    call = make_call(query, key, value, **words)
    query, key = call.query, call.key
    if 0 in (*query.shape[:3], key.shape[1], key.shape[2]):
        raise ValueError(f"{shapes_of(query, key, call.value)}: expected at least one query and one key on each rank")
    if balance == "zigzag" and world > 1 and (query.shape[2] % 2 or key.shape[2] % 2):
        raise ValueError(
            f"{shapes_of(query, key, call.value)}: expected even lengths (dimension 2) for balance='zigzag', which "
            "gives each rank two chunks of the sequence"
        )
    if attn_mask is not None:
        all_keys = key.new_empty((*key.shape[:2], key.shape[2] * world, 0), device="meta")
        attn_mask = check_attn_mask(attn_mask, query, all_keys)
        is_boolean = attn_mask.dtype == torch.bool
        call = call._replace(mask=attn_mask if is_boolean else None, bias=None if is_boolean else attn_mask)
    further = (world - 1) * call.shift
    call = call._replace(
        lower=None if call.lower is None else call.lower + further,
        upper=None if call.upper is None else call.upper + further,
        shift=call.shift + further,
    )
    chosen = backends.choose(call, backend, on_triton.refusals)
    if call.dropout_p > 0.0 and chosen == "triton":
        raise NotImplementedError(
            f"dropout_p={call.dropout_p}: the kernels draw by a weight's place in their own call, and so cannot drop "
            "what one process would; backend='torch' can"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    refusal = ulysses.refusal(heads, kv_heads, world)
    if method == "auto":
        method = _choose(call, world, balance, refusal is None)
    if method == "ulysses" and refusal is not None:
        raise ValueError(f"method='ulysses': {refusal}: expected heads that the ranks can share, or another method")
    if balance == "stripe" and method != "ulysses" and call.alibi_slopes is not None and world > 1:
        raise NotImplementedError(
            f"balance='stripe' with alibi_slopes and method={method!r}: the distances between two stripes are no whole "
            "numbers of their tokens; balance='zigzag' and method='ulysses' have them"
        )
    return _Checked(call, method, balance, chosen)


def _choose(call: AttentionCall, world: int, balance: Balance, heads_fit: bool) -> str:
    """The method that ``"auto"`` stands for."""
    if world == 1:
        return "allgather"
    mask = call.bias if call.bias is not None else call.mask
    # by heads the least is sent, unless a mask of all rows has to be
    if heads_fit and (mask is None or call.alibi_slopes is not None):
        return "ulysses"
    return "ring" if call.key.shape[2] >= _FEWEST_KEYS_OF_RING else "allgather"


def _said_of(checked: _Checked, words: dict[str, Any]) -> dict[str, Any]:
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
        **{name: words[name] for name in ("is_causal", "causal_alignment", "window", "softcap", "dropout_p")},
        "scale": call.scale,
        "return_lse": call.return_lse,
        "attn_mask": kind(call.bias if call.bias is not None else call.mask),
        "key_padding_mask": kind(call.key_padding_mask),
        "document_ids": [kind(call.query_documents), kind(call.key_documents)],
        **{name: digest(getattr(call, name)) for name in ("prefix", "alibi_slopes", "sinks")},
        "tensors that need gradients": trained,
    }


def _spans(documents: Tensor | None, place: Place, balance: Balance) -> list[list[int]] | None:
    """The smallest and the largest number in each piece of this rank's shard."""
    if documents is None:
        return None
    own = pieces(place.rank, place.world, documents.shape[1], balance)
    return [[int(edge) for edge in documents[:, piece.local].aminmax()] for piece in own]


# -------------------------------------------------------------------------------------------------------- the attention


class _Attention(torch.autograd.Function):
    """``(output, lse)`` of a rank's rows, by a module with ``forward`` and ``backward``."""

    @staticmethod
    def forward(ctx: Any, method: ModuleType, run: Run, *tensors: Any) -> tuple[Tensor, Tensor]:
        done: Done = method.forward(run, Inputs(*tensors))
        ctx.method, ctx.run = method, run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*done.inputs, *done.kept)
        return done.output, done.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        inputs, kept = take(ctx.saved_tensors, Inputs, Kept)
        d_output, d_lse = grads
        if d_output is None:
            d_output = inputs.query.new_zeros(*d_lse.shape, inputs.value.shape[3])
        wanted = Inputs(*ctx.needs_input_grad[2:])
        needs: Any = Needs(wanted.bias, wanted.alibi_slopes, wanted.sinks, False)  # pyrefly: ignore[bad-argument-type]
        found = ctx.method.backward(ctx.run, OutputGradients(d_output, d_lse, None), kept, needs, inputs)
        gradients = [g if wanted_one else None for g, wanted_one in zip(found, wanted)]
        return None, None, *gradients, *(None,) * (len(wanted) - len(gradients))


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_or_mesh: dist.ProcessGroup | dist.DeviceMesh,
    *,
    method: Method = "auto",
    balance: Balance = "none",
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: backends.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which every rank of a group has a shard (arXiv:2310.01889, 2309.14509).

    The words mean what they mean in :func:`fastattn.attention`, of the whole sequence: its rows are ``L = W n`` and its
    keys ``S = W m`` on ``W`` ranks. All ranks call it with shards of one shape, as :func:`shard` makes them, and with
    the same arguments otherwise; and all of them run the backward, or none does.

    Args:
        query: this rank's ``[B, H, n, D]``, float16, bfloat16, float32 or float64.
        key: its ``[B, Hk, m, D]``; ``Hk`` divides ``H``.
        value: its ``[B, Hk, m, Dv]``.
        group_or_mesh: the ranks, in the order of their shards: a process group, or a device mesh of one dimension.
        method: ``"allgather"`` (all keys to every rank, arXiv:2407.21783, section 3.3.2), ``"ring"`` (keys from rank to
            rank while each computes, arXiv:2310.01889), ``"ulysses"`` (each rank computes some heads of the whole
            sequence, arXiv:2309.14509; the ranks have to divide the heads), or ``"auto"``: by heads where they can be
            shared and there is no ``attn_mask``, else a ring where a rank has 4096 keys or more.
        balance: which tokens a rank has: ``"none"``, contiguous ones; ``"zigzag"``, one chunk from the beginning and
            one from the end of the sequence; ``"stripe"``, every ``W``-th (arXiv:2311.09431). Under causality the last
            two give every rank the same work. See :func:`position_ids`.
        attn_mask: boolean or floating, broadcastable to ``[B, H, n, S]``: this rank's rows, in the order of its shard,
            and all keys, in the order of the sequence. With one row for ``n`` queries it is the same on every rank.
        key_padding_mask: this rank's boolean ``[B, m]``, True = padding.
        is_causal: query ``i`` of the sequence sees keys ``j <= i`` of it, or ``j <= i + S - L``.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``.
        window: ``(left, right)``, in tokens of the sequence.
        prefix: this many keys, the first ones of the sequence, are visible to every query in spite of causality and
            window; an int, or an integer tensor ``[B]``, the same on every rank.
        document_ids: this rank's integers ``[B, n]``, or a pair ``([B, n], [B, m])``.
        alibi_slopes: floating ``[H]`` or ``[B, H]``, the same on every rank.
        softcap: as there.
        sinks: floating ``[H]``, the same on every rank.
        scale: as there.
        dropout_p: as there. The torch backend drops what :func:`fastattn.attention` drops in one process on a CPU, by
            the random state of the group's first rank, at the cost of a byte for each weight of a part while that is
            computed.
        return_lse: also return the log-sum-exp of the scores, differentiable.
        backend: as there. The parts of the first two methods run in plain Triton's kernels where they run in Triton's.

    Returns:
        This rank's rows of the output, ``[B, H, n, Dv]`` in ``query.dtype``, or a tuple of it and the LSE
        ``[B, H, n]``.
        Results and gradients of every rank are bitwise the same in every run. The gradients of ``sinks``,
        ``alibi_slopes`` and an ``attn_mask`` of one row are a rank's share, as those of all weights that ranks have
        alike: they add up to those of one process.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`fastattn.attention`; a method or balance cannot be.
        RanksDisagreeError: the ranks were called with different arguments; the message names rank and argument.
        RankLostError: a rank did not come within the group's time-out, or is gone.
    """
    place = place_in(group_or_mesh)
    words: dict[str, Any] = {
        "key_padding_mask": key_padding_mask,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window": window,
        "prefix": prefix,
        "document_ids": document_ids,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
    }
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    try:
        checked = _check(query, key, value, attn_mask, words, method, balance, backend, place)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        agree({}, {}, refusal, place, device)
        raise
    call, chosen = checked.call, checked.balance
    own = {"queries": _spans(call.query_documents, place, chosen), "keys": _spans(call.key_documents, place, chosen)}
    said = agree(_said_of(checked, words), own, None, place, device)
    options = operands(call, None, checked.backend, keeps_statistics=True)[1]
    mask = call.bias if call.bias is not None else call.mask
    run = Run(
        place=place,
        balance=chosen,
        rows=call.query.shape[2],
        keys=call.key.shape[2],
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        mask_axes=(False, False)
        if mask is None
        else (mask.shape[1] == call.query.shape[1] > 1, mask.shape[2] == call.query.shape[2]),
        options=options,
        longest_prefix=0 if call.prefix is None else int(call.prefix.max()),
        query_spans=_spans_of(said, "queries"),
        key_spans=_spans_of(said, "keys"),
    )
    inputs, _ = operands(call, _dropout_state(call, place), checked.backend)
    output, lse = _Attention.apply(_METHODS[checked.method], run, *inputs)
    return (output, lse) if return_lse else output


def _spans_of(said: list[dict[str, Any]], kind: str) -> tuple[tuple[Span, ...], ...] | None:
    spans = [of_rank[kind] for of_rank in said]
    return None if spans[0] is None else tuple(tuple(Span(*span) for span in of_rank) for of_rank in spans)


def _dropout_state(call: AttentionCall, place: Place) -> Tensor | None:
    """The state that one process would draw for the whole sequence, from the first rank: every rank draws, so that
    generators which are alike remain so."""
    if call.dropout_p == 0.0:
        return None
    rows = call.query.detach()[:, :, :1].expand(-1, -1, call.query.shape[2] * place.world, -1)
    state = dropout.draw(rows, call.key.shape[2] * place.world, call.dropout_p)
    return exchange.from_first(state, place)


# ---------------------------------------------------------------------------------------------------------- sharing out


def _own_pieces(name: str, length: int, place: Place, balance: Balance) -> tuple[Piece, ...]:
    """The pieces of this rank's shard of a sequence, or raise where it cannot be shared out."""
    divisor = place.world * (2 if balance == "zigzag" and place.world > 1 else 1)
    if length % divisor:
        raise ValueError(
            f"{name}={length}: expected a multiple of {divisor}, for {place.world} ranks and balance={balance!r}"
        )
    return pieces(place.rank, place.world, length // place.world, balance)


def shard(
    tensor: Tensor, dim: int, group_or_mesh: dist.ProcessGroup | dist.DeviceMesh, *, balance: Balance = "none"
) -> Tensor:
    """This rank's tokens of a sequence that every rank has.

    Args:
        tensor: of any shape and dtype, the same on every rank. Differentiable.
        dim: the dimension of the tokens.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.

    Returns:
        The tensor with a ``W``-th of its tokens, a view where they are equally far apart.

    Raises:
        ValueError: the tokens cannot be shared out evenly, or ``balance`` is not known.
    """
    place, dim = place_in(group_or_mesh), dim % tensor.dim()
    own = _own_pieces(f"tensor.shape[{dim}]", tensor.shape[dim], place, check_balance(balance))
    found = [tensor[(*(slice(None),) * dim, piece.positions)] for piece in own]
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)


class _Unshard(torch.autograd.Function):
    """The whole sequence; backward the sum of what all ranks want of a shard."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, place: Place, balance: Balance) -> Tensor:
        ctx.dim, ctx.place, ctx.balance = dim, place, balance
        whole = in_order(list(exchange.all_gather([tensor], place)[0]), dim, balance)
        return whole.clone() if place.world == 1 else whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        (gradient,) = grads
        wide = gradient.to(statistics_dtype(gradient.dtype))
        shares = out_of_order(wide, ctx.dim, ctx.place.world, ctx.balance)
        return exchange.sum_over_ranks(shares, ctx.place).to(gradient.dtype), None, None, None


def unshard(
    tensor: Tensor, dim: int, group_or_mesh: dist.ProcessGroup | dist.DeviceMesh, *, balance: Balance = "none"
) -> Tensor:
    """The whole sequence on every rank, of a shard on each; the inverse of :func:`shard`.

    Args:
        tensor: this rank's shard, of one shape and dtype on all ranks. Differentiable: the gradient of a shard is the
            sum of those that all ranks have for it.
        dim: the dimension of the tokens.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.

    Raises:
        RanksDisagreeError: shapes, dtypes or arguments differ.
        RankLostError: a rank did not come within the group's time-out, or is gone.
        ValueError: ``balance`` is not known.
    """
    place, dim = place_in(group_or_mesh), dim % tensor.dim()
    said = {"tensor": [str(tensor.dtype), *shape_of(tensor)], "dim": dim, "balance": check_balance(balance)}
    agree(said, {}, None, place, tensor.device)
    if balance == "zigzag" and place.world > 1 and tensor.shape[dim] % 2:
        raise ValueError(f"tensor.shape[{dim}]={tensor.shape[dim]}: expected an even number for balance='zigzag'")
    return _Unshard.apply(tensor, dim, place, balance)


def position_ids(
    length: int,
    group_or_mesh: dist.ProcessGroup | dist.DeviceMesh,
    *,
    balance: Balance = "none",
    device: torch.device | str | None = None,
) -> Tensor:
    """Where this rank's tokens stand in the sequence, int64 ``[length / W]``, in the order of its shard.

    Args:
        length: of the whole sequence.
        group_or_mesh: as in :func:`context_parallel_attention`.
        balance: which tokens a rank has.
        device: of the result.

    Raises:
        ValueError: the tokens cannot be shared out evenly, or ``balance`` is not known.
    """
    own = _own_pieces("length", length, place_in(group_or_mesh), check_balance(balance))
    positions = [torch.arange(piece.positions.start, piece.positions.stop, piece.step, device=device) for piece in own]
    return torch.cat(positions)
