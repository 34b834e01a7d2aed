"""The family ``layer``: ``fastattn.TransformerEncoderLayer`` beside ``nn.TransformerEncoderLayer``, post-norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastattn
from benchmarks.cases import AttentionCase, Mask
from benchmarks.families.masks import padding_mask
from benchmarks.families.module import allowance, work_of
from benchmarks.families.peers import cannot_compile, compiled
from benchmarks.variants import Family, Step, Variant, differentiated


def _layer(case: AttentionCase, kind: type[nn.TransformerEncoderLayer]) -> nn.TransformerEncoderLayer:
    """Without dropout, so that there is one right result; its parameters are those that torch's layer starts with."""
    size = (case.embed_dim, case.heads, 4 * case.embed_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        start = nn.TransformerEncoderLayer(*size, dropout=0.0, batch_first=True)
    layer = kind(*size, dropout=0.0, batch_first=True)
    layer.load_state_dict(start.state_dict())
    return layer


def _step(
    kind: type[nn.TransformerEncoderLayer],
    *,
    training: bool = False,
    wrap: Callable[..., Callable[..., tuple[Tensor, ...]]] = lambda function: function,
) -> Callable[[AttentionCase, torch.dtype], Step]:
    def build(case: AttentionCase, dtype: torch.dtype) -> Step:
        layer = _layer(case, kind).to(case.dtype).to(case.device, dtype).train(case.backward or training)
        mask = padding = None
        if case.mask == "causal":
            mask = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool, device=case.device).triu(1)
        if case.mask == "padding":
            padding = padding_mask(case)
        x = case.draw(case.batch, case.seqlen, case.embed_dim, dtype=dtype, generator=case.generator(3))
        parameters = tuple(layer.parameters()) if case.backward else ()

        def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            return (layer(x, mask, padding),)

        return differentiated(wrap(function), (x, *parameters), case)

    return build


def _applies(case: AttentionCase) -> str | None:
    if case.weights:
        return "returns no weights"
    return None if case.mask in ("none", "causal", "padding") else f"no {case.mask} mask in this family"


def _comparable(case: AttentionCase, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All but what stands at padding: inference may leave that out."""
    if case.mask != "padding":
        return results
    return results[0].masked_fill(padding_mask(case)[..., None], 0.0), *results[1:]


def _reference(case: AttentionCase, dtype: torch.dtype) -> Step:
    """Never torch's fused inference."""
    step = _step(nn.TransformerEncoderLayer, training=True)(case, dtype)
    return lambda: _comparable(case, step())


def _compiled_applies(case: AttentionCase) -> str | None:
    return _applies(case) or cannot_compile(case)


FAMILY = Family(
    "layer",
    (
        Variant("fastattn", _step(fastattn.TransformerEncoderLayer), _applies),
        Variant("nn.TransformerEncoderLayer", _step(nn.TransformerEncoderLayer), _applies),
        Variant("compile", _step(nn.TransformerEncoderLayer, wrap=compiled), _compiled_applies, slow=True),
        Variant(
            "fastattn-compile", _step(fastattn.TransformerEncoderLayer, wrap=compiled), _compiled_applies, slow=True
        ),
    ),
    peer="nn.TransformerEncoderLayer",
    reference=_reference,
    comparable=_comparable,
    allowance=allowance,
    work=work_of(8 + 16),  # the projections, and a feed-forward four times as wide
)


def quick_cases() -> list[AttentionCase]:
    """Small and larger, in evaluation beside torch's fused inference."""
    return [
        AttentionCase("layer", *shape, backward=backward, mask=mask)
        for shape, mask in (((8, 4, 64, 32), "none"), ((8, 4, 64, 32), "causal"), ((4, 8, 128, 64), "none"))
        for backward in (False, True)
    ]


def more_cases() -> list[AttentionCase]:
    """Small ones, with padding as well, and longer."""
    small = ((1, 2, 16, 32), (8, 8, 32, 32), (8, 4, 64, 32), (4, 8, 128, 64))
    masks: tuple[Mask, ...] = ("none", "causal", "padding")
    cases = [
        AttentionCase("layer", *shape, backward=backward, mask=mask)
        for backward in (False, True)
        for shape, of_shape in (*((shape, masks) for shape in small), ((1, 8, 2048, 64), masks[:2]))
        for mask in of_shape
    ]
    return [case for case in cases if case not in quick_cases()]
