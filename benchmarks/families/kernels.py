"""The family ``kernels``: attention's forward, and its backward alone, as the kernels do them, on a GPU.

Beside what the package picks (``fastattn``) stands each of its configurations, and every kernel of others, pinned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.cases import AttentionCase, KernelCase, Mask
from benchmarks.families import attention, configurations, peers
from benchmarks.variants import Family

FAMILY = Family(
    "kernels",
    (attention.FAMILY.variant("fastattn"), *configurations.VARIANTS, *peers.VARIANTS),
    peer="sdpa",
    reference=attention.FAMILY.reference,
    comparable=attention.FAMILY.comparable,
    work=attention.work,
    replays=lambda case: not case.backward,
)
OURS = ("fastattn", *(variant.name for variant in configurations.VARIANTS))

_PEERS = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flash-attn", "flash-attn-3", "xformers")
_BEST_PEERS = ("sdpa-cudnn", "sdpa-flash")
_TOKENS, _WIDTH = 16384, 2048  # as in the published tables: B L and H D
_LONGEST_SQUARE = 8192  # of an L x L mask or bias: the float64 truth of a longer one fills the memory

Entry = tuple[KernelCase, tuple[str, ...]]


def _entries(seqlen: int, head_dim: int, masks: Iterable[Mask], peers: tuple[str, ...], *, every: bool) -> list[Entry]:
    """Forward and backward under each of the masks, with the variants that they are worth."""
    found: list[Entry] = []
    for mask in masks:
        if mask in ("bias", "boolean", "sparse") and seqlen > _LONGEST_SQUARE:
            continue
        for backward in (False, True):
            options: dict[str, Any] = {"mask": mask, "backward": backward, "dtype": torch.bfloat16, "device": "cuda"}
            heads, batch = _WIDTH // head_dim, max(1, _TOKENS // seqlen)
            case = KernelCase("kernels", batch, heads, seqlen, head_dim, **options)
            found.append((case, ("fastattn", *configurations.names_for(case, every=every), *peers)))
    return found


def question() -> list[Entry]:
    """Are the kernels as fast as cuDNN's? At one length, without a mask and causal, beside the fastest peers."""
    return _entries(8192, 128, ("none", "causal"), (*_BEST_PEERS, "flash-attn-3"), every=False)


def telling() -> list[Entry]:
    """Each kind of kernels as the package configures it beside every peer, the most telling cases first."""
    found: list[Entry] = []
    masks: tuple[Mask, ...] = ("none", "causal", "bias", "boolean", "padding", "window")
    for seqlen in (8192, 4096, 2048, 16384):
        for head_dim in (128, 64):
            found += _entries(seqlen, head_dim, masks, _PEERS, every=False)
    found += _entries(4096, 128, ("sparse",), _PEERS, every=False)
    found += _entries(4096, 256, ("none", "causal"), _PEERS, every=False)
    return found


def sweep() -> list[Entry]:
    """Every configuration beside the fastest peers, over lengths without a mask, then under each mask at one length."""
    found: list[Entry] = []
    for seqlen in (8192, 2048, 4096, 512, 16384, 1024):
        for head_dim in (128, 64) if seqlen in (4096, 16384, 1024) else (128, 64, 256):
            found += _entries(seqlen, head_dim, ("none", "causal"), _BEST_PEERS, every=True)
    masks: tuple[Mask, ...] = ("bias", "boolean", "padding", "window", "sparse")
    return found + _entries(4096, 128, masks, _BEST_PEERS, every=True)


def trial() -> list[Entry]:
    """A tiny case of each direction for trying the path on a CPU, where the kernels themselves refuse."""
    cases = [KernelCase("kernels", 1, 2, 64, 32, backward=backward) for backward in (False, True)]
    return [(case, ("fastattn", *configurations.names_for(case, every=False), "sdpa")) for case in cases]


def small(case: AttentionCase, *, backward: bool | None = None) -> KernelCase:
    """A problem of next to no work for which the kernels of a case are compiled as for itself.

    Triton compiles anew where a stride ceases to be a multiple of 16; lengths and numbers of heads are its run time's.

    Args:
        case: of any family of attention.
        backward: the direction; None: the case's own.
    """
    shared: dict[str, Any] = {"mask": case.mask, "dtype": case.dtype, "device": case.device, "seed": case.seed}
    backward = case.backward if backward is None else backward
    return KernelCase("kernels", 2, 2, min(case.seqlen, 512), case.head_dim, backward=backward, **shared)


def ragged(case: KernelCase) -> KernelCase | None:
    """One with the same kernels and tiles that end early; None: its mask has the length among its strides."""
    if case.mask in ("padding", "boolean", "sparse", "bias"):
        return None
    return dataclasses.replace(case, seqlen=max(1, 5 * case.seqlen // 8 - 3))


def quick_cases() -> list[KernelCase]:
    """None on a CPU."""
    return []


def more_cases() -> list[KernelCase]:
    """None on a CPU."""
    return []
