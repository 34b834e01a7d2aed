"""Attention over packed sequences, one after the other, each by the textbook. Differentiable to any order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.reference.attention import attention


class VarlenResult(NamedTuple):
    """What attention over packed sequences gives. Rows that belong to no sequence are zero."""

    output: Tensor  # [T, H, Dv]
    lse: Tensor  # [H, T]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_k: Tensor | None = None,
    bottom_right: bool = False,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
    lower: int | None = None,
    upper: int | None = None,
    dropout_keep: Tensor | None = None,
    **words: Any,
) -> VarlenResult:
    """:func:`attention` of every sequence by itself.

    Args:
        query: ``[T, H, D]``.
        key: ``[Tk, Hk, D]``.
        value: ``[Tk, Hk, Dv]``.
        cu_seqlens_q: integer ``[N + 1]``: where each sequence begins among the rows, and where the last one ends.
        cu_seqlens_k: the same for keys.
        seqused_k: integer ``[N]``: so many first keys of each sequence are in use; None: all.
        bottom_right: row ``i`` stands at key position ``i + keys - rows`` of its sequence, and not at ``i``.
        bias: ``[N | 1, H | 1, longest | 1, longest | 1]``, added to the scores by positions inside a sequence.
        alibi_slopes: ``[N | 1, H]``.
        sinks: ``[1, H]``.
        prefix: integer ``[N | 1]``.
        lower: a row sees keys from its position plus ``lower``; None: from the first.
        upper: a row sees keys to its position plus ``upper``; None: to the last.
        dropout_keep: boolean ``[N | 1, H | 1, longest | 1, longest | 1]``: the weights that dropout keeps.
        **words: ``softcap``, ``scale``, ``dropout_p``, as of :func:`attention`.
    """
    output = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    lse = torch.full((query.shape[1], query.shape[0]), -torch.inf, dtype=query.dtype, device=query.device)
    for number in range(cu_seqlens_q.shape[0] - 1):
        rows = slice(int(cu_seqlens_q[number]), int(cu_seqlens_q[number + 1]))
        first, last = int(cu_seqlens_k[number]), int(cu_seqlens_k[number + 1])
        keys = slice(first, last if seqused_k is None else first + int(seqused_k[number]))
        length, width = rows.stop - rows.start, keys.stop - keys.start
        shift = width - length if bottom_right else 0

        def of_sequence(tensor: Tensor | None, number: int = number) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[number : number + 1]

        def of_pairs(tensor: Tensor | None, length: int = length, width: int = width) -> Tensor | None:
            own = of_sequence(tensor)
            if own is None:
                return None
            own = own if own.shape[2] == 1 else own[:, :, :length]
            return own if own.shape[3] == 1 else own[..., :width]

        result = attention(
            query[rows].transpose(0, 1)[None],
            key[keys].transpose(0, 1)[None],
            value[keys].transpose(0, 1)[None],
            bias=of_pairs(bias),
            alibi_slopes=of_sequence(alibi_slopes),
            sinks=sinks,
            prefix=of_sequence(prefix),
            lower=None if lower is None else lower + shift,
            upper=None if upper is None else upper + shift,
            shift=shift,
            dropout_keep=of_pairs(dropout_keep),
            **words,
        )
        place = torch.arange(rows.start, rows.stop, device=query.device)
        output = output.index_copy(0, place, result.output[0].transpose(0, 1).to(output.dtype))
        lse = lse.index_copy(1, place, result.lse[0].to(lse.dtype))
    return VarlenResult(output, lse)
