"""What a run on a GPU measures: cases and the variants that each is worth, the most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from benchmarks.cases import AttentionCase, Case, Kind, Mask
from benchmarks.families import kernels, sequence
from benchmarks.families.additive import of_tangents
from benchmarks.families.norm import of_elements

# Compiling takes longer than everything else of a case: FlexAttention and torch.compile stand where they are asked for.
_FAST = (
    "fastattn",
    "sdpa",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-cudnn",
    "flash-attn",
    "flash-attn-3",
    "xformers",
)
_FAST_NORMS = ("fastattn", "eager", "liger", "quack")
_TOKENS, _WIDTH = 16384, 2048
_NORM_ELEMENTS = 1 << 27  # 256 MiB a tensor in 16 bits: five times an L2
_QUICK = 16  # cases of a quick run


def matrix(*, quick: bool = False) -> list[tuple[Case, tuple[str, ...]]]:
    """Cases and their variants: what the time does not reach is the least missed."""
    cases: dict[Case, tuple[str, ...]] = dict(kernels.telling())

    def add(
        seqlen: int, head_dim: int, mask: Mask, *names: str, dtype: torch.dtype = torch.bfloat16, weights: bool = False
    ) -> None:
        batch = 2 if weights else max(1, _TOKENS // seqlen)  # the truth of averaged weights takes every head's scores
        for backward in (False, True):
            heads = _WIDTH // head_dim
            options = {"mask": mask, "weights": weights, "dtype": dtype, "backward": backward, "device": "cuda"}
            cases.setdefault(AttentionCase("attention", batch, heads, seqlen, head_dim, **options), names)

    def add_norms(size: int, *more: str, kinds: Sequence[Kind] = get_args(Kind), **options: Any) -> None:
        options = {"dtype": torch.bfloat16, "device": "cuda", **options}
        for kind in kinds:
            for backward in (False, True):
                case = of_elements(_NORM_ELEMENTS, kind, size, backward=backward, **options)
                cases[case] = (*_FAST_NORMS, *more)

    def add_layers(family: str, batch: int, seqlen: int, *names: str, **options: Any) -> None:
        for backward in (False, True):
            more: dict[str, Any] = {"dtype": torch.bfloat16, "backward": backward, "device": "cuda", **options}
            cases[AttentionCase(family, batch, 16, seqlen, 64, **more)] = names

    add(1024, 64, "causal", *_FAST, "fastattn-torch", "sdpa-math", "flex", "compile")
    for head_dim in (128, 64):
        add(4096, head_dim, "none", *_FAST)
        add(4096, head_dim, "causal", *_FAST)
    for size in (4096, 16384):
        add_norms(size, "compile")
    for size in (1024, 8192):
        add_norms(size)
    for seqlen in (16384, 1024):
        for head_dim in (128, 64):
            add(seqlen, head_dim, "none", *_FAST)
            add(seqlen, head_dim, "causal", *_FAST)
    add(2048, 64, "none", "fastattn", "naive", weights=True)
    add_layers("module", 4, 2048, "fastattn", "nn.MultiheadAttention", "compile", weights=True)
    add_layers("layer", 4, 2048, "fastattn", "nn.TransformerEncoderLayer", "compile")
    for seqlen in (512, 4096):
        names = ("fastattn", "nn.MultiheadAttention", "nn.RNN", "nn.GRU", "nn.LSTM", "causal-conv", "dilated-tcn")
        add_layers("sequence", max(1, 4096 // seqlen), seqlen, *names, mask="causal")
    for backward in (False, True):
        case = of_tangents(1 << 31, 512, 256, backward=backward, dtype=torch.bfloat16, device="cuda")
        cases[case] = ("fastattn", "eager")
    for size in (512, 2048, 256, 65536, 64, 32768, 262144, 4097):
        add_norms(size)
    add_norms(4096, kinds=["layer"], dtype=torch.float32)
    add_norms(4096, kinds=["layer"], wide_residual=True)
    add_norms(4096, kinds=["layer"], dropout_p=0.1)
    masks: tuple[Mask, ...] = ("padding", "documents", "sparse", "bias", "window", "boolean", "alibi", "softcap")
    for mask in masks:
        add(4096, 128, mask, *_FAST, "flex")
    add(4096, 256, "causal", *_FAST)
    add(4096, 128, "none", *_FAST, dtype=torch.float16)
    add(4096, 64, "causal", *_FAST, dtype=torch.float16)
    for seqlen in (512, 2048, 8192):
        for head_dim in (128, 64):
            add(seqlen, head_dim, "none", *_FAST)
            add(seqlen, head_dim, "causal", *_FAST)
    ways = tuple(v.name for v in sequence.FAMILY.variants)
    for seqlen in (128, 1024, 2048, 8192, 16384):
        add_layers("sequence", max(1, 4096 // seqlen), seqlen, *ways, mask="causal")
    entries = list(cases.items())
    return entries[:_QUICK] if quick else entries
