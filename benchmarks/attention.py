"""The family ``attention``: softmax attention over ``[B, H, L, D]``, without projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from benchmarks.cases import AttentionCase, Mask
from benchmarks.registry import Family, Step, Variant, differentiated
from fastattn.ops._call import make_call
from fastattn.reference import attention as reference
from fastattn.reference import visibility

# Above this many elements a variant that makes the L x S scores is not worth its minutes.
_SMALL_SCORES = 1 << 30


def _inputs(case: AttentionCase, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, as views of ``[B, L, H, D]``: as a projection leaves them."""
    generator = case.generator()
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    return [case.draw(*shape, dtype=dtype, generator=generator).transpose(1, 2) for _ in range(4)]


def masks(case: AttentionCase, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of ``fastattn.attention`` that rule the scores, in its words."""
    generator, seqlen = torch.Generator().manual_seed(case.seed + 2), case.seqlen
    if case.mask == "none":
        return {}
    if case.mask == "padding":
        return {"key_padding_mask": padding_mask(case)}
    if case.mask == "boolean":
        return {"attn_mask": (torch.rand(seqlen, seqlen, generator=generator) < 0.75).to(case.device)}
    if case.mask == "sparse":  # a quarter of the blocks of 128 x 128, and the diagonal
        blocks = -(-seqlen // 128)
        seen = (torch.rand(blocks, blocks, generator=generator) < 0.25) | torch.eye(blocks, dtype=torch.bool)
        seen = seen.repeat_interleave(128, 0).repeat_interleave(128, 1)[:seqlen, :seqlen]
        return {"attn_mask": seen.contiguous().to(case.device)}
    if case.mask == "bias":
        return {"attn_mask": case.draw(1, case.heads, seqlen, seqlen, dtype=dtype, generator=generator)}
    causal: dict[str, Any] = {"is_causal": True}
    if case.mask == "documents":  # of unequal lengths, about eight to a sequence
        ends = torch.rand(case.batch, seqlen, generator=generator) < 8 / seqlen
        return causal | {"document_ids": ends.cumsum(1).int().to(case.device)}
    if case.mask == "window":
        return causal | {"window": (seqlen // 8, None)}
    if case.mask == "alibi":
        return causal | {"alibi_slopes": 2.0 ** (-8 * torch.arange(1, case.heads + 1, device=case.device) / case.heads)}
    if case.mask == "softcap":
        return causal | {"softcap": 30.0}
    return causal


def padding_mask(case: AttentionCase) -> Tensor:
    """Lengths spread between half and whole, True = padding."""
    lengths = torch.linspace(case.seqlen / 2, case.seqlen - 1, case.batch).long()
    return (torch.arange(case.seqlen) >= lengths[:, None]).to(case.device)


def _step(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], case: AttentionCase) -> Step:
    *qkv, d_output = tensors
    return differentiated(function, tuple(qkv), case, d_output)


def _ours(case: AttentionCase, dtype: torch.dtype) -> Step:
    function = functools.partial(fastattn.attention, need_weights=case.weights, **masks(case, dtype))
    return _step(lambda *qkv: _tuple(function(*qkv)), _inputs(case, dtype), case)


def _naive(case: AttentionCase, dtype: torch.dtype) -> Step:
    return _formula(case, _inputs(case, dtype), masks(case, dtype))


def _reference(case: AttentionCase, dtype: torch.dtype) -> Step:
    """The formula over what :func:`_first_head` leaves."""
    arguments = masks(case, dtype)
    if not case.weights:
        for name, tensor in arguments.items():
            if name == "alibi_slopes":
                arguments[name] = tensor[:1]
            elif isinstance(tensor, Tensor) and (name != "attn_mask" or tensor.dim() == 4):
                arguments[name] = tensor[:, :1] if name == "attn_mask" else tensor[:1]
    return _formula(case, list(_first_head(case, tuple(_inputs(case, dtype)))), arguments)


def _first_head(case: AttentionCase, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first head of the first batch entry, whose float64 truth fits where that of all of them would not.

    Averaged weights need every head.
    """
    return results if case.weights else tuple(t[:1, :1] for t in results)


def _formula(case: AttentionCase, tensors: list[Tensor], arguments: dict[str, Any]) -> Step:
    call = make_call(*tensors[:3], **arguments)._asdict()
    for name in ("query", "key", "value", "dropout_p", "weights", "return_lse"):
        del call[name]

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        result = reference(*qkv, **call)
        return (result.output, result.weights.mean(dim=1)) if case.weights else (result.output,)

    return _step(function, tensors, case)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _for_sdpa(case: AttentionCase, dtype: torch.dtype) -> dict[str, Any]:
    """What rules the scores, as SDPA takes it: a mask made whole where it has no word for it."""
    arguments, (query, key, value, _) = masks(case, dtype), _inputs(case, dtype)
    if case.mask in ("none", "causal", "boolean", "sparse", "bias"):
        return arguments
    call = make_call(query, key, value, **arguments)
    lengths = {"seqlen_q": case.seqlen, "seqlen_k": case.seqlen, "lower": call.lower, "upper": call.upper}
    visible = visibility(
        **lengths,
        key_padding_mask=call.key_padding_mask,
        query_documents=call.query_documents,
        key_documents=call.key_documents,
        device=query.device,
    )
    if call.alibi_slopes is None:
        return {"attn_mask": visible}
    positions = torch.arange(case.seqlen, device=query.device)
    bias = -call.alibi_slopes[..., None, None] * (positions[:, None] - positions).abs()
    return {"attn_mask": bias.masked_fill(~visible, float("-inf")).to(dtype)}


def _sdpa(case: AttentionCase, dtype: torch.dtype, backend: SDPBackend | None = None) -> Step:
    arguments = _for_sdpa(case, dtype)

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if backend is None:
            return (F.scaled_dot_product_attention(query, key, value, **arguments),)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(query, key, value, **arguments),)

    return _step(function, _inputs(case, dtype), case)


def _flex(case: AttentionCase, dtype: torch.dtype) -> Step:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    arguments = masks(case, dtype)
    names = ("attn_mask", "key_padding_mask", "document_ids", "alibi_slopes")
    mask, padding, documents, slopes = (arguments.get(name, torch.empty(0)) for name in names)
    hides: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "padding": lambda b, h, i, j: ~padding[b, j],
        "boolean": lambda b, h, i, j: mask[i, j],
        "sparse": lambda b, h, i, j: mask[i, j],
        "documents": lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
        "window": lambda b, h, i, j: (i >= j) & (i - j <= case.seqlen // 8),
        **dict.fromkeys(("causal", "alibi", "softcap"), lambda b, h, i, j: i >= j),
    }
    changes: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "bias": lambda score, b, h, i, j: score + mask[0, h, i, j],
        "alibi": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(),
        "softcap": lambda score, b, h, i, j: 30.0 * torch.tanh(score / 30.0),
    }
    block_mask = None
    if case.mask in hides:
        batch = case.batch if case.mask in ("padding", "documents") else None
        block_mask = create_block_mask(hides[case.mask], batch, None, case.seqlen, case.seqlen, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(*qkv: Tensor) -> tuple[Tensor, ...]:
        return (compiled(*qkv, block_mask=block_mask, score_mod=changes.get(case.mask)),)

    return _step(function, _inputs(case, dtype), case)


def _no_weights(case: AttentionCase) -> str | None:
    return "returns no weights" if case.weights else None


def _sdpa_has(case: AttentionCase) -> str | None:
    return "SDPA has no softcap" if case.mask == "softcap" else _no_weights(case)


def _only_small(case: AttentionCase) -> str | None:
    scores = case.batch * case.heads * case.seqlen**2
    return f"makes all {scores} scores: only up to {_SMALL_SCORES}" if scores > _SMALL_SCORES else None


def _sdpa_on_cuda(kind: str) -> Callable[[AttentionCase], str | None]:
    def applies(case: AttentionCase) -> str | None:
        if torch.device(case.device).type != "cuda":
            return f"SDPA's {kind} kernel is compared on CUDA only"
        if (reason := _sdpa_has(case)) is not None:
            return reason
        if kind != "math" and case.dtype == torch.float32:
            return "takes float16 and bfloat16 here"
        if kind == "flash" and case.mask not in ("none", "causal"):
            return "SDPA's flash kernel takes no mask"
        return _only_small(case) if kind == "math" else None

    return applies


def _flex_applies(case: AttentionCase) -> str | None:
    if torch.device(case.device).type != "cuda":
        return "FlexAttention is compared on CUDA only"
    return _no_weights(case)


def _sdpa_variant(kind: str, backend: SDPBackend) -> Variant:
    return Variant(f"sdpa-{kind}", functools.partial(_sdpa, backend=backend), _sdpa_on_cuda(kind))


FAMILY = Family(
    "attention",
    (
        Variant("fastattn", _ours),
        Variant("sdpa", _sdpa, _sdpa_has),
        Variant("naive", _naive, _only_small),
        _sdpa_variant("flash", SDPBackend.FLASH_ATTENTION),
        _sdpa_variant("efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa_variant("cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa_variant("math", SDPBackend.MATH),
        Variant("flex", _flex, _flex_applies, slow=True),
    ),
    peer="sdpa",
    reference=_reference,
    comparable=_first_head,
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
        AttentionCase("attention", 1, 8, 1024, 64, backward=backward, mask=mask)
        for backward in (False, True)
        for mask in ("window", "documents")
    ]


def more_cases() -> list[AttentionCase]:
    """Longer, and every mask."""
    return [
        AttentionCase("attention", 1, 8, 2048, 64, backward=backward, mask=mask, weights=weights)
        for backward in (False, True)
        for mask in get_args(Mask)
        for weights in (False, True)
    ]
