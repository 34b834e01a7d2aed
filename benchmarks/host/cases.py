"""The calls whose host time is measured, each beside the call of torch's that it is held against.

Ours are bfloat16 of a usual small size: the host's work does not depend on it, but for masks, whose tile map is made
from ``L = 512`` on. A peer's kernel cannot be left out, so where there is no GPU the peer computes on the CPU, on tensors
so small that this takes next to nothing, in float32, whose operators a CPU enters fastest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

Step = Callable[[], object]
Attend = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step's tensors lie, and how large they are.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        tiny: the smallest sizes there are: for peers whose kernels would take time.
    """

    device: str
    dtype: torch.dtype
    tiny: bool = False

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers; of each size one or, of the last axis, eight where all is tiny."""
        shape = (*(1 for _ in shape[:-1]), 8) if self.tiny else shape
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def padding(self, batch: int, keys: int) -> Tensor:
        """``[B, S]``, True at the last quarter of the keys; none where all is tiny."""
        lengths = torch.arange(1 if self.tiny else keys, device=self.device) >= keys - keys // 4
        return lengths.expand(batch, -1).contiguous()


@dataclasses.dataclass(frozen=True)
class HostCase:
    """A call, and that of torch's beside it.

    Attributes:
        name: as in ``train padding L512``.
        ours: makes the step of this package.
        peer: makes the step that ours is held against.
        against: the peer's name.
        kernels: of attention that are asked for, as of :func:`fastattn.use_kernels`.
        quick: whether it is among the few that ``make bench`` runs.
    """

    name: str
    ours: Callable[[Place], Step]
    peer: Callable[[Place], Step]
    against: str
    kernels: Any = "auto"
    quick: bool = False


def _step(call: Callable[..., Any], inputs: tuple[Tensor, ...], train: bool) -> Step:
    """``call(*inputs)`` without gradients, or with the gradients of its first result by every input."""
    if not train:

        def evaluate() -> object:
            with torch.no_grad():
                return call(*inputs)

        return evaluate
    leaves = [tensor.requires_grad_() for tensor in inputs]
    made = call(*leaves)
    d_output = torch.ones_like(made[0] if isinstance(made, tuple) else made)

    def step() -> object:
        results = call(*leaves)
        output = results[0] if isinstance(results, tuple) else results
        return torch.autograd.grad(output, leaves, d_output)

    return step


# ---------------------------------------------------------------------------------------------------------- attention

_BATCH, _HEADS, _HEAD_DIM = 1, 2, 64


def _attention(length: int, train: bool, words: str) -> Callable[[Place], Step]:
    def build(place: Place) -> Step:
        inputs = tuple(place.draw(_BATCH, _HEADS, length, _HEAD_DIM) for _ in range(3))
        options: dict[str, Any] = {}
        if words == "causal":
            options["is_causal"] = True
        elif words == "padding":
            options["key_padding_mask"] = place.padding(_BATCH, length)
        elif words == "averaged weights":
            options["need_weights"] = True
        return _step(functools.partial(fastattn.attention, **options), inputs, train)

    return build


def _sdpa(length: int, train: bool, words: str) -> Callable[[Place], Step]:
    def build(place: Place) -> Step:
        inputs = tuple(place.draw(_BATCH, _HEADS, length, _HEAD_DIM) for _ in range(3))
        options: dict[str, Any] = {"is_causal": words == "causal"}
        if words == "padding":
            options["attn_mask"] = ~place.padding(_BATCH, length)[:, None, None]
        return _step(functools.partial(F.scaled_dot_product_attention, **options), inputs, train)

    return build


def _of_attention(
    train: bool, words: str, length: int, kernels: str = "auto", quick: bool = False
) -> HostCase:  # fmt: skip
    name = f"{'train' if train else 'eval'} {words} L{length}" + (f", {kernels}" if kernels != "auto" else "")
    ours, peer = _attention(length, train, words), _sdpa(length, train, words)
    return HostCase(name, ours, peer, "SDPA", kernels, quick)


# -------------------------------------------------------------------------------------------- norms, additive, module


def _norm(kind: str, train: bool) -> Callable[[Place], Step]:
    def build(place: Place) -> Step:
        x, residual, weight, bias = (place.draw(*shape) for shape in ((64, 512), (64, 512), (512,), (512,)))
        if kind == "rms":
            return _step(fastattn.add_rms_norm, (x, residual, weight), train)
        return _step(fastattn.add_layer_norm, (x, residual, weight, bias), train)

    return build


def _eager_norm(kind: str, train: bool) -> Callable[[Place], Step]:
    def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias)

    def rms(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x + residual, weight.shape, weight)

    def build(place: Place) -> Step:
        x, residual, weight, bias = (place.draw(*shape) for shape in ((64, 512), (64, 512), (512,), (512,)))
        return _step(rms, (x, residual, weight), train) if kind == "rms" else _step(layer, (x, residual, weight, bias), train)

    return build


def _additive(train: bool) -> Callable[[Place], Step]:
    def build(place: Place) -> Step:
        rows, weight = tuple(place.draw(1, 64, 64) for _ in range(3)), place.draw(64)
        return _step(fastattn.additive_attention, (*rows, weight), train)

    return build


def _eager_additive(train: bool) -> Callable[[Place], Step]:
    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(query[:, :, None] + key[:, None]) @ weight, dim=-1) @ value

    def build(place: Place) -> Step:
        rows, weight = tuple(place.draw(1, 64, 64) for _ in range(3)), place.draw(64)
        return _step(attend, (*rows, weight), train)

    return build


def _module(kind: type[nn.MultiheadAttention], train: bool) -> Callable[[Place], Step]:
    """Self-attention without weights. Its projections are torch's in both, and computed: tiny ones, in either."""

    def build(place: Place) -> Step:
        module = kind(16, 2, batch_first=True, device=place.device).train(train)
        x = torch.randn(1, 4, 16, device=place.device)
        return _step(lambda x, *_: module(x, x, x, need_weights=False), (x, *module.parameters()), train)

    return build


def all_cases() -> list[HostCase]:
    """Every call, in the order of the table."""
    found = [
        _of_attention(False, "plain", 64, quick=True),
        _of_attention(False, "causal", 64),
        _of_attention(False, "padding", 64),
        _of_attention(False, "padding", 512, quick=True),
        _of_attention(False, "causal", 512),
        _of_attention(False, "averaged weights", 64),
        _of_attention(True, "plain", 64, quick=True),
        _of_attention(True, "causal", 64),
        _of_attention(True, "padding", 512),
        _of_attention(True, "averaged weights", 64),
    ]
    found += [
        _of_attention(train, words, 64, kernels)
        for kernels in ("gluon", "triton")
        for train in (False, True)
        for words in (("causal",) if kernels == "gluon" else ("plain", "causal"))
    ]
    for kind in ("layer", "rms"):
        for train in (False, True):
            name = f"add_{kind}_norm {'train' if train else 'eval'}"
            found.append(HostCase(name, _norm(kind, train), _eager_norm(kind, train), "eager", quick=kind == "layer"))
    for train in (False, True):
        name = f"additive_attention {'train' if train else 'eval'}"
        found.append(HostCase(name, _additive(train), _eager_additive(train), "eager"))
    for train in (False, True):
        name, ours, peer = f"MultiheadAttention {'train' if train else 'eval'}", fastattn.MultiheadAttention, nn.MultiheadAttention
        found.append(HostCase(name, _module(ours, train), _module(peer, train), "nn.MultiheadAttention", quick=not train))
    return found
