"""What a case of attention draws: query, key and value, what rules who sees whom, and how many pairs that leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AttentionCase, KernelCase
from benchmarks.variants import Step, backward_alone, differentiated
from fastattn.ops.attention.contract import AttentionCall

SOFTCAP = 30.0


def inputs(case: AttentionCase, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, as views of ``[B, L, H, D]``: as a projection leaves them."""
    generator = case.generator()
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    return [case.draw(*shape, dtype=dtype, generator=generator).transpose(1, 2) for _ in range(4)]


def step(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], case: AttentionCase) -> Step:
    """A step of ``function(query, key, value)`` over what :func:`inputs` draws."""
    *qkv, d_output = tensors
    if isinstance(case, KernelCase) and case.backward:
        return backward_alone(function, tuple(qkv), lambda output: d_output)
    return differentiated(function, tuple(qkv), case, d_output)


def masks(case: AttentionCase, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of ``fastattn.attention`` that rule the scores, in its words."""
    seqlen = case.seqlen
    if case.mask == "none":
        return {}
    if case.mask == "padding":
        return {"key_padding_mask": padding_mask(case)}
    if case.mask in ("boolean", "sparse"):
        return {"attn_mask": _random_mask(case.mask, seqlen, case.seed + 2, case.device)}
    if case.mask == "bias":
        # On the device: a CPU takes seconds over the largest, each time that it is drawn
        drawn = case.draw(1, case.heads, seqlen, seqlen, dtype=dtype, generator=case.generator(2))
        return {"attn_mask": drawn}
    causal: dict[str, Any] = {"is_causal": True}
    if case.mask == "documents":  # of unequal lengths, about eight to a sequence
        generator = torch.Generator().manual_seed(case.seed + 2)
        ends = torch.rand(case.batch, seqlen, generator=generator) < 8 / seqlen
        return causal | {"document_ids": ends.cumsum(1).int().to(case.device)}
    if case.mask == "window":
        return causal | {"window": (window(case), None)}
    if case.mask == "alibi":
        return causal | {"alibi_slopes": 2.0 ** (-8 * torch.arange(1, case.heads + 1, device=case.device) / case.heads)}
    if case.mask == "softcap":
        return causal | {"softcap": SOFTCAP}
    return causal


def in_words_of_reference(call: AttentionCall) -> dict[str, Any]:
    """What rules the scores of a call, as the keyword arguments of :func:`fastattn.reference.attention`."""
    others = ("query", "key", "value", "dropout_p", "weights", "return_lse")
    others += ("score_mod", "mask_mod", "first_batch", "first_row", "first_key")  # which such a call has not
    return {name: rule for name, rule in call._asdict().items() if name not in others}


@functools.lru_cache(maxsize=2)
def _random_mask(mask: str, seqlen: int, seed: int, device: str) -> Tensor:
    """Drawn on the CPU, the same numbers for every device; once for all variants: the largest takes it seconds."""
    generator = torch.Generator().manual_seed(seed)
    if mask == "boolean":
        return (torch.rand(seqlen, seqlen, generator=generator) < 0.75).to(device)
    blocks = -(-seqlen // 128)  # a quarter of the blocks of 128 x 128, and the diagonal
    seen = (torch.rand(blocks, blocks, generator=generator) < 0.25) | torch.eye(blocks, dtype=torch.bool)
    seen = seen.repeat_interleave(128, 0).repeat_interleave(128, 1)[:seqlen, :seqlen]
    return seen.contiguous().to(device)


def window(case: AttentionCase) -> int:
    """How many keys before its own a query sees through a window."""
    return case.seqlen // 8


def padding_mask(case: AttentionCase) -> Tensor:
    """Lengths spread between half and whole, True = padding."""
    lengths = torch.linspace(case.seqlen / 2, case.seqlen - 1, case.batch).long()
    return (torch.arange(case.seqlen) >= lengths[:, None]).to(case.device)


@functools.cache
def visible_pairs(case: AttentionCase) -> int:
    """How many pairs of a query and a key of the whole batch, in one head, may see each other.

    Only the masks that are an ``L x L`` matrix are drawn for it.
    """
    batch, seqlen = case.batch, case.seqlen
    on_cpu = dataclasses.replace(case, device="cpu")  # the same numbers are drawn everywhere
    if case.mask in ("none", "bias"):
        return batch * seqlen**2
    if case.mask in ("causal", "alibi", "softcap"):
        return batch * _triangle(seqlen)
    if case.mask == "window":
        width = window(case) + 1
        return batch * (_triangle(width) + (seqlen - width) * width)
    if case.mask == "padding":
        return seqlen * int((~padding_mask(on_cpu)).sum())
    drawn = masks(on_cpu, case.dtype)
    if case.mask == "documents":
        lengths = [row.unique_consecutive(return_counts=True)[1] for row in drawn["document_ids"]]
        return _triangle(torch.cat(lengths)).sum().item()
    return batch * int(drawn["attn_mask"].sum())


PAIRS_IN_SYMBOLS = {
    "none": "B L^2",
    "bias": "B L^2",
    **dict.fromkeys(("causal", "alibi", "softcap"), "B L (L + 1) / 2"),
    "window": "B w (2 L - w + 1) / 2, w = L // 8 + 1",
    "padding": "L sum(lengths)",
    "documents": "sum(n (n + 1) / 2) over documents of n tokens",
    **dict.fromkeys(("boolean", "sparse"), "B times the ones of the mask"),
}


def _triangle(length: Any) -> Any:
    """Pairs of a causal square: ``1 + 2 + ... + length``, of a number or of each in a tensor."""
    return length * (length + 1) // 2
