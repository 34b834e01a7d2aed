"""What a run on a GPU measures: cases and the variants that each is worth, the most telling first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from benchmarks.cases import AttentionCase, Case, Kind, Mask
from benchmarks.families import decode, kernels, sequence
from benchmarks.families.additive import of_tangents
from benchmarks.families.decode import DecodeCase
from benchmarks.families.functions import FunctionCase
from benchmarks.families.norm import of_elements
from benchmarks.families.varlen import VarlenCase

Part = Literal["", "question", "rest"]

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
_FLEX_MASKS: tuple[Mask, ...] = ("causal", "padding", "documents", "sparse", "window", "bias", "softcap")

Entry = tuple[Case, tuple[str, ...]]


def matrix(*, quick: bool = False, part: Part = "") -> list[Entry]:
    """Cases and their variants: what the time does not reach is the least missed.

    Args:
        quick: the first of them.
        part: "question": what is asked first of all, :func:`benchmarks.families.kernels.question`; "rest": the cases
            without those; "": all.
    """
    asked: list[Entry] = list(kernels.question())
    if part == "question":
        return asked
    entries = [*_without_compilers().items(), *_beside_compilers().items()]
    if part == "rest":
        entries = [(case, names) for case, names in entries if case not in dict(asked)]
    return entries[:_QUICK] if quick else entries


def _without_compilers() -> dict[Case, tuple[str, ...]]:
    """The cases with the variants that need no compiler but triton's, for our kernels."""
    cases: dict[Case, tuple[str, ...]] = dict(kernels.telling())

    def add(
        seqlen: int, head_dim: int, mask: Mask, *names: str, dtype: torch.dtype = torch.bfloat16, weights: bool = False
    ) -> None:
        batch = 2 if weights else max(1, _TOKENS // seqlen)  # the truth of averaged weights takes every head's scores
        for backward in (False, True):
            heads = _WIDTH // head_dim
            options = {"mask": mask, "weights": weights, "dtype": dtype, "backward": backward, "device": "cuda"}
            cases.setdefault(AttentionCase("attention", batch, heads, seqlen, head_dim, **options), names)

    def add_norms(size: int, kinds: Sequence[Kind] = get_args(Kind), **options: Any) -> None:
        options = {"dtype": torch.bfloat16, "device": "cuda", **options}
        for kind in kinds:
            for backward in (False, True):
                case = of_elements(_NORM_ELEMENTS, kind, size, backward=backward, **options)
                cases[case] = _FAST_NORMS

    def add_layers(family: str, batch: int, seqlen: int, *names: str, **options: Any) -> None:
        for backward in (False, True):
            more: dict[str, Any] = {"dtype": torch.bfloat16, "backward": backward, "device": "cuda", **options}
            cases[AttentionCase(family, batch, 16, seqlen, 64, **more)] = names

    add(1024, 64, "causal", *_FAST, "fastattn-torch", "sdpa-math")
    for head_dim in (128, 64):
        add(4096, head_dim, "none", *_FAST)
        add(4096, head_dim, "causal", *_FAST)
    for size in (4096, 16384, 1024, 8192):
        add_norms(size)
    for seqlen in (16384, 1024):
        for head_dim in (128, 64):
            add(seqlen, head_dim, "none", *_FAST)
            add(seqlen, head_dim, "causal", *_FAST)
    add(2048, 64, "none", "fastattn", "naive", weights=True)
    add_layers("module", 4, 2048, "fastattn", "nn.MultiheadAttention", weights=True)
    add_layers("layer", 4, 2048, "fastattn", "nn.TransformerEncoderLayer")
    for seqlen in (512, 4096):
        names = ("fastattn", "nn.MultiheadAttention", "nn.RNN", "nn.GRU", "nn.LSTM", "causal-conv", "dilated-tcn")
        add_layers("sequence", max(1, 4096 // seqlen), seqlen, *names, mask="causal")
    for backward in (False, True):
        case = of_tangents(1 << 31, 512, 256, backward=backward, dtype=torch.bfloat16, device="cuda")
        cases[case] = ("fastattn", "eager")
    for longest in (2048, 512):
        for backward in (False, True):
            more: dict[str, Any] = {"dtype": torch.bfloat16, "backward": backward, "device": "cuda"}
            packed = VarlenCase("varlen", _TOKENS // longest * 2, 16, longest, 128, causal=True, **more)
            cases[packed] = ("fastattn", "sdpa-padded", "varlen_attn", "flash-attn")
    for batch, heads, kv_heads, held, page_size in (
        (1, 32, 8, 32768, 64),
        (16, 32, 8, 8192, 64),
        (16, 32, 8, 8192, 16),
        (64, 32, 8, 4096, 256),
        (16, 16, 16, 8192, 256),
    ):
        step = DecodeCase("decode", batch, heads, kv_heads, held, 128, page_size, dtype=torch.bfloat16, device="cuda")
        cases[step] = tuple(v.name for v in decode.FAMILY.variants if not v.slow)
    for size in (512, 2048, 256, 65536, 64, 32768, 262144, 4097):
        add_norms(size)
    add_norms(4096, kinds=["layer"], dtype=torch.float32)
    add_norms(4096, kinds=["layer"], wide_residual=True)
    add_norms(4096, kinds=["layer"], dropout_p=0.1)
    masks: tuple[Mask, ...] = ("padding", "documents", "sparse", "bias", "window", "boolean", "alibi", "softcap")
    for mask in masks:
        add(4096, 128, mask, *_FAST)
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
    return cases


def _beside_compilers() -> dict[Case, tuple[str, ...]]:
    """FlexAttention and torch.compile beside what the package picks.

    Compiling takes longer than everything else of such a case, a dozen of them as long as the rest of the matrix. They
    are of other sizes than the cases before, since a run has each case once.
    """
    cases: dict[Case, tuple[str, ...]] = {}
    for mask in _FLEX_MASKS:
        for backward in (False, True):
            options: dict[str, Any] = {"mask": mask, "dtype": torch.bfloat16, "backward": backward, "device": "cuda"}
            cases[AttentionCase("attention", 2, 16, 4096, 128, **options)] = ("fastattn", "sdpa", "flex")
    for example in ("window_with_globals", "t5_bias", "pair_bias"):
        more: dict[str, Any] = {"dtype": torch.bfloat16, "backward": True, "device": "cuda"}
        case = FunctionCase("functions", example, 1, 16, 2048, 128, **more)
        cases[case] = ("fastattn", "fastattn-words", "sdpa", "flex")
    for backward in (False, True):
        options = {"dtype": torch.bfloat16, "backward": backward, "device": "cuda"}
        for kind in get_args(Kind):
            cases[of_elements(_NORM_ELEMENTS, kind, 5120, **options)] = ("fastattn", "eager", "compile")
        layer = AttentionCase("layer", 2, 16, 2048, 64, **options)
        module = dataclasses.replace(layer, family="module", weights=True)
        cases[layer] = ("fastattn", "nn.TransformerEncoderLayer", "compile")
        cases[module] = ("fastattn", "nn.MultiheadAttention", "compile")
    return cases
