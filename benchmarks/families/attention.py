"""The family ``attention``: softmax attention over ``[B, H, L, D]``, without projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import fastattn
from benchmarks.cases import AttentionCase, Mask
from benchmarks.families import peers
from benchmarks.families.masks import PAIRS_IN_SYMBOLS, in_words_of_reference, inputs, masks, step, visible_pairs
from benchmarks.variants import Family, Step, Variant, Work
from fastattn.ops.attention.call import make_call
from fastattn.reference import attention as reference

Build = Callable[[AttentionCase, torch.dtype], Step]


# ----------------------------------------------------------------------------------------------------------------- ours


def _ours(backend: Literal["triton", "torch"] | None = None) -> Build:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        words: dict[str, Any] = {"need_weights": case.weights, "backend": backend, **masks(case, dtype)}

        def function(*qkv: Tensor) -> tuple[Tensor, ...]:
            result = fastattn.attention(*qkv, **words)
            return result if isinstance(result, tuple) else (result,)

        return step(function, inputs(case, dtype), case)

    return build


def _beside_ours(backend: Literal["triton", "torch"]) -> Callable[[AttentionCase], str | None]:
    """A backend by name has something to show only where ``fastattn`` does not run it anyway."""

    def applies(case: AttentionCase) -> str | None:
        if backend == "triton" and torch.device(case.device).type == "cpu":
            return "needs a GPU: on a CPU only Triton's interpreter runs it, which is no measure"
        alike = dataclasses.replace(case, batch=1, seqlen=8)  # no backend looks at lengths
        query, key, value, _ = inputs(alike, case.dtype)
        found = fastattn.explain(query, key, value, **masks(alike, case.dtype))
        if found.backend == backend:
            return "is what fastattn runs here"
        return "; ".join(found.refusals.get(backend, ())) or None

    return applies


# ---------------------------------------------------------------------------------------------------------- the formula


def _naive(case: AttentionCase, dtype: torch.dtype) -> Step:
    tensors = inputs(case, dtype)
    return step(_formula(case, tensors, masks(case, dtype)), tensors, case)


def _compiled(case: AttentionCase, dtype: torch.dtype) -> Step:
    tensors = inputs(case, dtype)
    return step(peers.compiled(_formula(case, tensors, masks(case, dtype))), tensors, case)


def _ours_compiled(case: AttentionCase, dtype: torch.dtype) -> Step:
    words: dict[str, Any] = {"need_weights": case.weights, **masks(case, dtype)}

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        result = fastattn.attention(*qkv, **words)
        return result if isinstance(result, tuple) else (result,)

    return step(peers.compiled(function), inputs(case, dtype), case)


def _reference(case: AttentionCase, dtype: torch.dtype) -> Step:
    """The formula over what :func:`_ends` leaves."""
    tensors, arguments = list(_ends(case, tuple(inputs(case, dtype)))), masks(case, dtype)
    if not case.weights:
        for name, tensor in arguments.items():
            if name == "alibi_slopes":  # [H]: of one head for each of the two entries
                arguments[name] = tensor[[0, -1], None]
            elif name == "attn_mask" and tensor.dim() == 4:
                arguments[name] = tensor.expand(case.batch, case.heads, -1, -1)[[0, -1], [0, -1]].unsqueeze(1)
            elif isinstance(tensor, Tensor) and name != "attn_mask":  # [B, S]
                arguments[name] = tensor[[0, -1]]
    return step(_formula(case, tensors, arguments), tensors, case)


def _ends(case: AttentionCase, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first head of the first batch entry and the last one of the last: where offsets begin and where they end.

    Their float64 truth fits where that of all of them would not. Averaged weights need every head.
    """
    return results if case.weights else tuple(t[[0, -1], [0, -1]].unsqueeze(1) for t in results)


def _formula(
    case: AttentionCase, tensors: list[Tensor], arguments: dict[str, Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """The definition under these arguments of ``fastattn.attention``, of tensors like these."""
    rules = in_words_of_reference(make_call(*tensors[:3], **arguments))

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        result = reference(*qkv, **rules)
        return (result.output, result.weights.mean(dim=1)) if case.weights else (result.output,)

    return function


def _compiled_applies(case: AttentionCase) -> str | None:
    return peers.too_many_scores(case) or peers.cannot_compile(case)


# ------------------------------------------------------------------------------------------------------------ the work


def flops(case: AttentionCase) -> tuple[float, str]:
    """``4 D`` operations a head and visible pair, 2.5 times that in the backward (arXiv:2307.08691), and in symbols."""
    each = {"eval": 4, "forward": 4, "train": 14, "backward": 10}[case.direction]
    pairs = visible_pairs(case)
    return float(each * case.head_dim * case.heads * pairs), f"{each} D H P, P = {PAIRS_IN_SYMBOLS[case.mask]}"


def work(case: AttentionCase, variant: str) -> Work:
    """:func:`flops`, and each tensor through memory once a pass, which is twice in training.

    Forward ``q, k, v -> o``; backward ``q, k, v, o, do -> dq, dk, dv``. Each pass reads an ``L x L`` mask or bias in
    the shape it is given in; averaged weights are written once. What is smaller by a factor of L is left out.
    """
    operations, in_symbols = flops(case)
    element, squared = case.dtype.itemsize, case.seqlen**2
    tensors, passes = {"eval": (4, 1), "forward": (4, 1), "train": (12, 2), "backward": (8, 1)}[case.direction]
    moved = tensors * element * case.batch * case.heads * case.seqlen * case.head_dim
    moved_in_symbols = f"{tensors * element} B H L D"
    if case.mask in ("boolean", "sparse"):
        moved += passes * squared
        moved_in_symbols += " + L^2" if passes == 1 else f" + {passes} L^2"
    elif case.mask == "bias":
        moved += passes * element * case.heads * squared
        moved_in_symbols += f" + {passes * element} H L^2"
    if case.weights:
        moved += element * case.batch * squared
        moved_in_symbols += f" + {element} B L^2"
    return Work(operations, moved, f"flops {in_symbols}; bytes {moved_in_symbols}")


FAMILY = Family(
    "attention",
    (
        Variant("fastattn", _ours()),
        Variant("fastattn-triton", _ours("triton"), _beside_ours("triton")),
        Variant("fastattn-torch", _ours("torch"), _beside_ours("torch")),
        Variant("naive", _naive, peers.too_many_scores),
        Variant("fastattn-compile", _ours_compiled, peers.cannot_compile, slow=True),
        Variant("compile", _compiled, _compiled_applies, slow=True),
        *peers.VARIANTS,
    ),
    peer="sdpa",
    reference=_reference,
    comparable=_ends,
    work=work,
)


def quick_cases() -> list[AttentionCase]:
    """Without weights beside SDPA, with them beside the formula."""
    small, larger = (2, 4, 64, 32), (1, 8, 512, 64)
    return [
        AttentionCase("attention", *shape, backward=backward, mask=mask, weights=weights)
        for shape in (small, larger)
        for backward in (False, True)
        for mask, weights in (("causal", False), ("causal", True))
    ] + [
        AttentionCase("attention", *larger, backward=backward, mask=mask)
        for mask, backward in (("window", False), ("documents", False), ("window", True))
    ]


def more_cases() -> list[AttentionCase]:
    """Every mask, from calls that are all host to such as are all work; weights where they are few and many; 16 bits;
    and none or the causal mask at a shorter and a longer length: how time grows."""

    def of(shape: tuple[int, int, int, int], mask: Mask, backward: bool, **options: Any) -> AttentionCase:
        return AttentionCase("attention", *shape, backward=backward, mask=mask, **options)

    small, short, larger, long = (2, 4, 64, 32), (4, 8, 128, 64), (1, 8, 512, 64), (1, 8, 2048, 64)
    between = (1, 8, 128, 64), (1, 8, 1024, 64)
    plain: tuple[Mask, ...] = ("none", "causal")
    beyond: tuple[Mask, ...] = ("window", "alibi", "softcap")
    directions = (False, True)
    half = (torch.bfloat16, torch.float16)
    return [
        *(of(small, mask, backward) for mask in ("none", "padding") for backward in directions),
        *(of(short, mask, backward) for mask in beyond for backward in directions),
        *(of(larger, mask, backward) for mask in get_args(Mask) for backward in directions),
        *(of(long, mask, False) for mask in get_args(Mask)),
        *(of(long, mask, True) for mask in ("none", "softcap")),
        *(
            of(shape, "none", backward, weights=True)
            for shape in ((1, 2, 1024, 64), (1, 4, 1024, 64), (2, 8, 512, 32))
            for backward in directions
        ),
        *(
            of(shape, mask, backward, dtype=dtype)
            for shape in (small, larger)
            for mask in plain
            for backward in directions
            for dtype in half
        ),
        *(of(larger, mask, backward, dtype=half[0]) for mask in ("padding", "softcap") for backward in directions),
        *(of(shape, mask, backward) for shape in between for mask in plain for backward in directions),
        *(of((1, 8, 4096, 64), mask, False) for mask in plain),
    ]
