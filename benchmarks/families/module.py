"""The family ``module``: ``fastattn.MultiheadAttention`` beside ``nn.MultiheadAttention`` on the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks.cases import AttentionCase, Mask
from benchmarks.families import attention
from benchmarks.families.masks import padding_mask
from benchmarks.families.peers import cannot_compile, compiled, too_many_scores
from benchmarks.variants import Family, Step, Variant, Work, differentiated
from fastattn.reference import attention as reference


def _module(case: AttentionCase, dtype: torch.dtype, kind: type[nn.MultiheadAttention]) -> nn.MultiheadAttention:
    module = kind(case.embed_dim, case.heads, batch_first=True)
    generator = case.generator()
    with torch.no_grad():
        for parameter in module.parameters():  # drawn here, so that no variant depends on an initialisation's order
            drawn = torch.randn(parameter.shape, generator=generator, device=generator.device)
            parameter.copy_((drawn / case.embed_dim**0.5).to(case.dtype))
    return module.to(case.device, dtype).train(case.backward)


def _masks(case: AttentionCase) -> dict[str, Tensor]:
    """In torch's words: True = not allowed."""
    if case.mask == "padding":
        return {"key_padding_mask": padding_mask(case)}
    if case.mask == "causal":
        return {"attn_mask": torch.ones(case.seqlen, case.seqlen, dtype=torch.bool, device=case.device).triu(1)}
    return {}


def _step(
    case: AttentionCase, dtype: torch.dtype, module: nn.MultiheadAttention, function: Callable[..., tuple]
) -> Step:
    x = case.draw(case.batch, case.seqlen, case.embed_dim, dtype=dtype, generator=case.generator(3))

    def of_leaves(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        # nn.Module reads its parameters itself: they are passed so that their gradients are taken
        return tuple(t for t in function(x) if t is not None)

    return differentiated(of_leaves, (x, *(module.parameters() if case.backward else ())), case)


def _self_attention(
    kind: type[nn.MultiheadAttention], wrap: Callable[..., Callable[..., tuple]] = lambda function: function
) -> Callable[[AttentionCase, torch.dtype], Step]:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        module, masks = _module(case, dtype, kind), _masks(case)

        def function(x: Tensor) -> tuple[Tensor, Tensor | None]:
            return module(x, x, x, need_weights=case.weights, **masks)

        return _step(case, dtype, module, wrap(function))

    return build


def _by_hand(
    attend: Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, ...]],
) -> Callable[[AttentionCase, torch.dtype], Step]:
    """The projections written out around ``attend``."""

    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        module, masks = _module(case, dtype, nn.MultiheadAttention), _masks(case)

        def function(x: Tensor) -> tuple[Tensor, ...]:
            qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
            query, key, value = qkv.unflatten(2, (3, case.heads, -1)).permute(2, 0, 3, 1, 4)
            output, *weights = attend(query, key, value, masks)
            projected = module.out_proj(output.transpose(1, 2).flatten(2))
            return (projected, *(w.mean(dim=1) for w in weights)) if case.weights else (projected,)

        return _step(case, dtype, module, function)

    return build


def _visible(masks: dict[str, Tensor]) -> Tensor | None:
    if "key_padding_mask" in masks:
        return ~masks["key_padding_mask"][:, None, None, :]
    return ~masks["attn_mask"] if masks else None


def _attend_naively(query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(reference(query, key, value, mask=_visible(masks))[:2])


def _attend_eagerly(query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, ...]:
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    visible = _visible(masks)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=3)
    return weights @ value, weights


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (F.scaled_dot_product_attention(query, key, value, attn_mask=_visible(masks)),)


def _masks_torch_has(case: AttentionCase) -> str | None:
    return None if case.mask in ("none", "padding", "causal") else f"no {case.mask} mask in this family"


def _compiled_applies(case: AttentionCase) -> str | None:
    return _masks_torch_has(case) or cannot_compile(case)


def _eager_applies(case: AttentionCase) -> str | None:
    return _masks_torch_has(case) or too_many_scores(case)


def _sdpa_applies(case: AttentionCase) -> str | None:
    return "returns no weights" if case.weights else _masks_torch_has(case)


def work_of(products: int) -> Callable[[AttentionCase, str], Work]:
    """Operations of attention and of ``products B L E^2`` around it, three times those in training; no bytes.

    The projections are ``8 B L E^2``. Their rate bounds every case here, and memory's none.
    """

    def work(case: AttentionCase, variant: str) -> Work:
        scores, in_symbols = attention.flops(case)
        around = products * (3 if case.backward else 1)
        flops = around * case.batch * case.seqlen * case.embed_dim**2 + scores
        return Work(flops, formula=f"flops {around} B L E^2 + {in_symbols}")

    return work


def allowance(case: AttentionCase, result: Tensor) -> float:
    """A bias's gradient sums the tokens; where one after the other, its errors are a random walk.

    Of n terms of one size, the k-th partial sum is as large as sqrt(k) of them, and rounding it loses eps / sqrt(12) of
    that: sqrt(n / 24) eps of the sum in the end.
    """
    eps = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps  # 16 bits are summed in float32
    return eps * (case.batch * case.seqlen / 24) ** 0.5 if result.dim() == 1 else 0.0


FAMILY = Family(
    "module",
    (
        Variant("fastattn", _self_attention(fastattn.MultiheadAttention), _masks_torch_has),
        Variant("nn.MultiheadAttention", _self_attention(nn.MultiheadAttention), _masks_torch_has),
        Variant("compile", _self_attention(nn.MultiheadAttention, compiled), _compiled_applies, slow=True),
        Variant(
            "fastattn-compile", _self_attention(fastattn.MultiheadAttention, compiled), _compiled_applies, slow=True
        ),
        Variant("qkv+sdpa", _by_hand(_attend_sdpa), _sdpa_applies),
        Variant("eager", _by_hand(_attend_eagerly), _eager_applies),
    ),
    peer="nn.MultiheadAttention",
    reference=_by_hand(_attend_naively),
    allowance=allowance,
    work=work_of(8),
)


def _cases(
    shape: tuple[int, int, int, int],
    masks: Sequence[Mask],
    weights: Sequence[bool],
    dtype: torch.dtype = torch.float32,
) -> list[AttentionCase]:
    return [
        AttentionCase("module", *shape, backward=backward, mask=mask, weights=averaged, dtype=dtype)
        for backward in (False, True)
        for mask in masks
        for averaged in weights
    ]


_MASKS: tuple[Mask, ...] = ("none", "padding", "causal")  # every one that torch's module has
_BOTH = (False, True)


def quick_cases() -> list[AttentionCase]:
    """Small to larger, training and evaluation; the smallest with weights on and off under every mask."""
    return [
        *_cases((1, 2, 16, 32), _MASKS, _BOTH),
        *_cases((8, 4, 64, 32), _MASKS, [False]),
        *_cases((8, 4, 64, 32), ["none"], [True]),
        *_cases((4, 8, 128, 64), ("none", "causal"), [False]),
        *_cases((4, 8, 128, 64), ["none"], [True]),
    ]


def more_cases() -> list[AttentionCase]:
    """More of the small sizes, and longer ones with the rest of the masks."""
    shapes = ((8, 4, 64, 32), (8, 8, 32, 32), (8, 4, 32, 64), (4, 8, 128, 64))
    small = [_cases(shape, _MASKS, _BOTH) for shape in shapes]
    return [
        *(case for cases in small for case in cases),
        *_cases((1, 8, 1024, 64), _MASKS, _BOTH),
        *_cases((1, 8, 2048, 64), ("none", "causal"), [False]),
        *_cases((1, 8, 2048, 64), ["none"], [True]),
        *_cases((8, 4, 64, 32), ("none", "causal"), [False], dtype=torch.bfloat16),
        *_cases((2, 8, 512, 32), ("none", "causal"), _BOTH),
        *_cases((1, 2, 1024, 64), ["none"], [True]),
        *_cases((1, 4, 1024, 64), ["none"], [True]),
    ]
