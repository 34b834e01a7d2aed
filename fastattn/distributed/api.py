"""The public function: attention over a sequence that is shared out among ranks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.distributed import functions
from fastattn.distributed.attention_in_graphs import attention_in_graph
from fastattn.distributed.begin import begin
from fastattn.distributed.call import MaskSide, Method, Tensors, Words
from fastattn.distributed.layout import Balance, places_in
from fastattn.distributed.parts import Done, Run
from fastattn.ops.attention.contract import Alignment, Kept, MaskMod, OutputGradients, ScoreMod
from fastattn.ops.common import backends
from fastattn.ops.common.operator import take


class _Attention(torch.autograd.Function):
    """``(output, lse)`` of a rank's rows, by a module with ``forward`` and ``backward``."""

    @staticmethod
    def forward(ctx: Any, method: ModuleType, run: Run, *tensors: Any) -> tuple[Tensor, Tensor]:
        done: Done = method.forward(run, functions.kinds_of(run.options)[0](*tensors))
        ctx.method, ctx.run = method, run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*done.inputs, *done.kept)
        return done.output, done.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyrefly: ignore[bad-override]  # of the decorator, not of this
        kind, kind_of_needs = functions.kinds_of(ctx.run.options)
        inputs, kept = take(ctx.saved_tensors, kind, Kept)
        d_output, d_lse = grads
        if d_output is None:
            d_output = inputs.query.new_zeros(*d_lse.shape, inputs.value.shape[3])
        wanted = kind(*ctx.needs_input_grad[2:])
        asked = (name.removeprefix("needs_d_") for name in kind_of_needs._fields[:-1])
        needs = kind_of_needs(*(getattr(wanted, name) for name in asked), d_weights_may_be_zeros=False)
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
    attn_mask_by: MaskSide = "rows",
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window: tuple[int | None, int | None] | None = None,
    prefix: int | Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
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
        group_or_mesh: the ranks, in the order of their shards: a process group, or a device mesh of one dimension; for
            ``"2d"`` of two.
        method: ``"allgather"`` (all keys to every rank, arXiv:2407.21783, section 3.3.2), ``"ring"`` (keys from rank to
            rank while each computes, arXiv:2310.01889), ``"ulysses"`` (each rank computes some heads of the whole
            sequence, arXiv:2309.14509; the ranks have to divide the heads), ``"2d"`` (by heads along the second
            dimension of a mesh, and a ring along the first, arXiv:2405.07719), or ``"auto"``: ``"2d"`` on a mesh of two
            dimensions, else what :func:`fastattn.distributed.model.choose` has as the fastest; of calls that it does
            not know (documents, prefixes, dense masks, keys of another length) by heads where these can be shared and
            there is no ``attn_mask``, else a ring where a rank has 4096 keys or more.
            :func:`fastattn.distributed.explain` says which, and why.
        balance: which tokens a rank has: ``"none"``, contiguous ones; ``"zigzag"``, one chunk from the beginning and
            one from the end of the sequence; ``"stripe"``, every ``W``-th (arXiv:2311.09431). Under causality the last
            two give every rank the same work. See :func:`position_ids`.
        attn_mask: boolean or floating, broadcastable to ``[B, H, n, S]``: this rank's rows, in the order of its shard,
            and all keys, in the order of the sequence. With one row for ``n`` queries it is the same on every rank.
        attn_mask_by: ``"rows"``, or ``"columns"``: ``attn_mask`` is broadcastable to ``[B, H, L, m]``, all rows, in the
            order of the sequence, and this rank's keys, in the order of its shard. One exchange makes rows of them.
        key_padding_mask: this rank's boolean ``[B, m]``, True = padding.
        is_causal: query ``i`` of the sequence sees keys ``j <= i`` of it, or ``j <= i + S - L``.
        causal_alignment: ``"top_left"`` or ``"bottom_right"``.
        window: ``(left, right)``, in tokens of the sequence.
        prefix: this many keys, the first ones of the sequence, are visible to every query in spite of causality and
            window; an int, or an integer tensor ``[B]``, the same on every rank.
        document_ids: this rank's integers ``[B, n]``, or a pair ``([B, n], [B, m])``.
        alibi_slopes: floating ``[H]`` or ``[B, H]``, the same on every rank.
        softcap: as there.
        score_mod: as there, the same on every rank: it is told heads, queries and keys of the whole sequence, and the
            tensors that it captures are whole. Where two programs differ, ranks disagree; the numbers that are captured
            are not compared.
        mask_mod: as there, likewise. What it hides is not computed with, and sent all the same.
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
        ``alibi_slopes``, an ``attn_mask`` of one row and what ``score_mod`` captures are a rank's share, as those of
        all weights that ranks have alike: they add up to those of one process.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`fastattn.attention`; a method or balance cannot be.
        RanksDisagreeError: the ranks were called with different arguments; the message names rank and argument.
        RankLostError: a rank did not come within the group's time-out, or is gone.
    """
    tensors = Tensors(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        prefix=prefix,
        document_ids=document_ids,
        score_mod=score_mod,
        mask_mod=mask_mod,
    )
    words = Words(
        method=method,
        balance=balance,
        attn_mask_by=attn_mask_by,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        softcap=softcap,
        scale=scale,
        dropout_p=dropout_p,
        return_lse=return_lse,
        backend=backend,
    )
    if torch.compiler.is_compiling():
        output, lse = attention_in_graph(tensors, words, group_or_mesh)
    else:
        started = begin(tensors, words, places_in(group_or_mesh))
        output, lse = _Attention.apply(started.method, started.run, *started.inputs)
    return (output, lse) if return_lse else output
