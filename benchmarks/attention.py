"""The family ``attention``: softmax attention over ``[B, H, L, D]``, without projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks.registry import Case, Family, Step, Variant, differentiated
from fastattn.reference import attention as reference

# Above this many elements a variant that makes the L x S scores is not worth its minutes.
_SMALL_SCORES = 1 << 30


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, as views of ``[B, L, H, D]``: as a projection leaves them."""
    generator = case.generator()
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    return [case.draw(*shape, dtype=dtype, generator=generator).transpose(1, 2) for _ in range(4)]


def _masks(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of ``fastattn.attention`` that hide keys, in its words."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    if case.mask == "causal":
        return {"is_causal": True}
    if case.mask == "padding":
        return {"key_padding_mask": padding_mask(case)}
    if case.mask == "boolean":
        visible = torch.rand(case.seqlen, case.seqlen, generator=generator) < 0.75
        return {"attn_mask": visible.to(case.device)}
    if case.mask == "bias":
        return {"attn_mask": case.draw(1, case.heads, case.seqlen, case.seqlen, dtype=dtype, generator=generator)}
    return {}


def padding_mask(case: Case) -> Tensor:
    """Lengths spread between half and whole, True = padding."""
    lengths = torch.linspace(case.seqlen / 2, case.seqlen - 1, case.batch).long()
    return (torch.arange(case.seqlen) >= lengths[:, None]).to(case.device)


def _step(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], case: Case) -> Step:
    *qkv, d_output = tensors
    return differentiated(function, tuple(qkv), case, d_output)


def _ours(case: Case, dtype: torch.dtype) -> Step:
    function = functools.partial(fastattn.attention, need_weights=case.weights, **_masks(case, dtype))
    return _step(lambda *qkv: _tuple(function(*qkv)), _inputs(case, dtype), case)


def _naive(case: Case, dtype: torch.dtype) -> Step:
    return _formula(case, _inputs(case, dtype), _masks(case, dtype))


def _reference(case: Case, dtype: torch.dtype) -> Step:
    """The formula over what :func:`_first_head` leaves."""
    masks = _masks(case, dtype)
    attn_mask, padding = masks.get("attn_mask"), masks.get("key_padding_mask")
    if not case.weights and attn_mask is not None and attn_mask.dim() == 4:
        masks["attn_mask"] = attn_mask[:, :1]
    if not case.weights and padding is not None:
        masks["key_padding_mask"] = padding[:1]
    return _formula(case, list(_first_head(case, tuple(_inputs(case, dtype)))), masks)


def _first_head(case: Case, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first head of the first batch entry, whose float64 truth fits where that of all of them would not.

    Averaged weights need every head.
    """
    return results if case.weights else tuple(t[:1, :1] for t in results)


def _formula(case: Case, tensors: list[Tensor], masks: dict[str, Any]) -> Step:
    attn_mask = masks.get("attn_mask")
    names = {"key_padding_mask": masks.get("key_padding_mask"), "diagonal": 0 if masks.get("is_causal") else None}
    if attn_mask is not None:
        names["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        result = reference(*qkv, **names)
        return (result.output, result.weights.mean(dim=1)) if case.weights else (result.output,)

    return _step(function, tensors, case)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _sdpa(case: Case, dtype: torch.dtype, backend: SDPBackend | None = None) -> Step:
    masks = _masks(case, dtype)
    padding = masks.pop("key_padding_mask", None)
    if padding is not None:
        masks["attn_mask"] = ~padding[:, None, None, :]

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if backend is None:
            return (F.scaled_dot_product_attention(query, key, value, **masks),)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(query, key, value, **masks),)

    return _step(function, _inputs(case, dtype), case)


def _flex(case: Case, dtype: torch.dtype) -> Step:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks = _masks(case, dtype)
    block_mask = score_mod = None
    if case.mask in ("causal", "padding", "boolean"):
        hides: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
        if case.mask == "causal":
            hides = lambda b, h, i, j: i >= j  # noqa: E731
        elif case.mask == "padding":
            visible = ~masks["key_padding_mask"]
            hides = lambda b, h, i, j: visible[b, j]  # noqa: E731
        else:
            visible = masks["attn_mask"]
            hides = lambda b, h, i, j: visible[i, j]  # noqa: E731
        batch = case.batch if case.mask == "padding" else None
        block_mask = create_block_mask(hides, batch, None, case.seqlen, case.seqlen, device=case.device)
    elif case.mask == "bias":
        bias = masks["attn_mask"]
        score_mod = lambda score, b, h, i, j: score + bias[0, h, i, j]  # noqa: E731
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        return (compiled(*qkv, block_mask=block_mask, score_mod=score_mod),)

    return _step(function, _inputs(case, dtype), case)


def _no_weights(case: Case) -> str | None:
    return "returns no weights" if case.weights else None


def _only_small(case: Case) -> str | None:
    scores = case.batch * case.heads * case.seqlen**2
    return f"makes all {scores} scores: only up to {_SMALL_SCORES}" if scores > _SMALL_SCORES else None


def _sdpa_on_cuda(kind: str) -> Callable[[Case], str | None]:
    def applies(case: Case) -> str | None:
        if torch.device(case.device).type != "cuda":
            return f"SDPA's {kind} kernel is compared on CUDA only"
        if case.weights:
            return "returns no weights"
        if kind != "math" and case.dtype == torch.float32:
            return "takes float16 and bfloat16 here"
        if kind == "flash" and case.mask not in ("none", "causal"):
            return "SDPA's flash kernel takes no mask"
        return _only_small(case) if kind == "math" else None

    return applies


def _flex_applies(case: Case) -> str | None:
    if torch.device(case.device).type != "cuda":
        return "FlexAttention is compared on CUDA only"
    return _no_weights(case)


def _sdpa_variant(kind: str, backend: SDPBackend) -> Variant:
    return Variant(f"sdpa-{kind}", functools.partial(_sdpa, backend=backend), _sdpa_on_cuda(kind))


FAMILY = Family(
    "attention",
    (
        Variant("fastattn", _ours),
        Variant("sdpa", _sdpa, _no_weights),
        Variant("naive", _naive, _only_small),
        _sdpa_variant("flash", SDPBackend.FLASH_ATTENTION),
        _sdpa_variant("efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa_variant("cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa_variant("math", SDPBackend.MATH),
        Variant("flex", _flex, _flex_applies),
    ),
    peer="sdpa",
    reference=_reference,
    comparable=_first_head,
)


def quick_cases() -> list[Case]:
    """Without weights beside SDPA, with them beside the formula."""
    small, larger = (2, 4, 64, 32), (1, 8, 512, 64)
    return [
        Case("attention", *shape, backward=backward, mask=mask, weights=weights)
        for shape in (small, larger)
        for backward in (False, True)
        for mask, weights in (("causal", False), ("causal", True))
    ]


def more_cases() -> list[Case]:
    """Longer, and every mask."""
    return [
        Case("attention", 1, 8, 2048, 64, backward=backward, mask=mask, weights=weights)
        for backward in (False, True)
        for mask in ("none", "causal", "padding", "boolean", "bias")
        for weights in (False, True)
    ]
