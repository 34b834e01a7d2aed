"""The problems: attention in its surroundings, and a residual add with its norm."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import torch
from torch import Tensor

from fastattn.reference.residual_norm import Kind

# What rules who sees whom, and what else touches the scores.
Mask = Literal["none", "causal", "padding", "boolean", "sparse", "documents", "window", "bias", "alibi", "softcap"]


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """One problem. Its numbers are drawn from its seed, rounded to ``dtype``: every variant gets the same ones."""

    family: str
    _: dataclasses.KW_ONLY
    dtype: torch.dtype = torch.float32
    backward: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Readable and unique."""

    @abc.abstractmethod
    def tiny(self) -> Case:
        """One of the same kind that needs next to no memory."""

    @property
    def is_random(self) -> bool:
        """Does a step draw numbers itself, so that its results depend on them?"""
        return False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh one on the case's device; equal offsets give equal numbers."""
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def draw(self, *shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, representable in the case's dtype, in ``dtype`` on the case's device."""
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(self.dtype).to(self.device, dtype)


@dataclasses.dataclass(frozen=True)
class AttentionCase(Case):
    """Attention: alone, in its module, or beside the other ways of processing a sequence.

    ``backward`` is a training step: forward and backward.
    """

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    mask: Mask = "none"
    weights: bool = False

    @property
    def name(self) -> str:
        """As in ``module-b1-h2-l16-d32-train-causal-weights-float32``."""
        parts = [self.family, f"b{self.batch}", f"h{self.heads}", f"l{self.seqlen}", f"d{self.head_dim}"]
        parts += [self.direction, "" if self.mask == "none" else self.mask]
        parts += ["weights" if self.weights else "", self.dtype_name]
        return "-".join(filter(None, parts))

    @property
    def direction(self) -> str:
        """What a step is, in a word."""
        return "train" if self.backward else "eval"

    def tiny(self) -> AttentionCase:
        return dataclasses.replace(self, batch=1, heads=1, seqlen=4, head_dim=4)

    @property
    def embed_dim(self) -> int:
        return self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class KernelCase(AttentionCase):
    """Attention as its kernels meet it. ``backward`` is the backward alone."""

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


@dataclasses.dataclass(frozen=True)
class NormCase(Case):
    """``r' = residual + x`` and the norm ``y`` of ``r'``, both kept, as a pre-norm layer needs them; or ``y`` of ``x``.

    ``backward`` is the backward alone.

    Attributes:
        kind: layer norm, with a weight and a bias, or RMS norm, with a weight.
        rows: how many are normalised.
        size: of a row.
        wide_residual: the residual stream is float32, whatever ``x`` and ``y`` are.
        dropout_p: of the dropout of ``x``.
        alone: nothing is added to ``x``, and ``y`` is all there is.
    """

    kind: Kind
    rows: int
    size: int
    wide_residual: bool = False
    dropout_p: float = 0.0
    alone: bool = False

    @property
    def name(self) -> str:
        """As in ``norm-layer-m32768-n4096-backward-residual32-bfloat16``."""
        parts = [self.family, self.kind, f"m{self.rows}", f"n{self.size}", "backward" if self.backward else "forward"]
        parts += ["alone" if self.alone else ""]
        parts += ["residual32" if self.wide_residual else "", "dropout" if self.dropout_p else "", self.dtype_name]
        return "-".join(filter(None, parts))

    def tiny(self) -> NormCase:
        return dataclasses.replace(self, rows=1, size=4)

    @property
    def residual_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32) if self.wide_residual else self.dtype

    @property
    def is_random(self) -> bool:
        return self.dropout_p > 0.0
