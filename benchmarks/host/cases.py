"""The calls whose host time is measured, each beside the call of torch's that it is held against.

Ours are bfloat16 of a usual small size: the host's work does not depend on it, but for masks, whose tile map is made
from ``L = 512`` on. A peer's kernel cannot be left out. Where there is no GPU it computes on the CPU, in float32 and on
tensors so small that entering it takes most of the time; how much, the same call on tensors of one row says, which is
measured too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

Step = Callable[[], object]
Build = Callable[[Callable[..., Any], bool, "Place"], Step]  # of a call, with gradients or without, and where
Scale = Literal["full", "small", "least"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step's tensors lie, and how large they are.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        scale: ``full``: as the case says; ``small``: so that computing takes a few microseconds of one core; ``least``:
            one row of eight elements.
    """

    device: str
    dtype: torch.dtype
    scale: Scale = "full"

    def rows(self, full: int, small: int) -> int:
        """A length, by the scale."""
        return {"full": full, "small": small, "least": 1}[self.scale]

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers; of the least scale one row, whatever the shape."""
        if self.scale == "least":
            shape = (*(1 for _ in shape[:-1]), 8)
        return torch.randn(shape, device=self.device, dtype=self.dtype)


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
    d_output: Tensor | None = None

    def step() -> object:
        nonlocal d_output
        results = call(*leaves)
        output = results[0] if isinstance(results, tuple) else results
        if d_output is None:
            d_output = torch.ones_like(output)
        return torch.autograd.grad(output, leaves, d_output)

    return step


# ---------------------------------------------------------------------------------------------------------- attention


def _inputs(place: Place, length: int) -> tuple[Tensor, ...]:
    return tuple(place.draw(1, 2, place.rows(length, small=16), 64) for _ in range(3))


def _padding(place: Place, length: int) -> Tensor:
    """``[B, S]``, True at the last quarter of the keys."""
    keys = place.rows(length, small=16)
    return (torch.arange(keys, device=place.device) >= keys - keys // 4)[None]


def _attention(words: str, length: int, train: bool, place: Place) -> Step:
    options: dict[str, Any] = {}
    if words == "causal":
        options["is_causal"] = True
    elif words == "padding":
        options["key_padding_mask"] = _padding(place, length)
    elif words == "averaged weights":
        options["need_weights"] = True
    elif words == "score_mod":
        return _step(_with_table, (*_inputs(place, length), _table(place)), train)
    return _step(functools.partial(fastattn.attention, **options), _inputs(place, length), train)


def _table(place: Place) -> Tensor:
    """``[H, distances]``, what a score_mod adds to scores."""
    return place.draw(2, 2 * place.rows(64, small=16))


def _with_table(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return score + table[head, query_index - key_index]

    return fastattn.attention(query, key, value, score_mod=score_mod)


def _sdpa_with_table(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)
    return F.scaled_dot_product_attention(query, key, value, table[:, rows[:, None] - rows])


def _sdpa(words: str, length: int, train: bool, place: Place) -> Step:
    """Padding is made the mask that it takes in every step, and a function a bias; weights it has none."""
    if words == "score_mod":
        return _step(_sdpa_with_table, (*_inputs(place, length), _table(place)), train)
    padding = _padding(place, length) if words == "padding" else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None if padding is None else ~padding[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=words == "causal")

    return _step(attend, _inputs(place, length), train)


def _of_attention(train: bool, words: str, length: int, kernels: str = "auto", quick: bool = False) -> HostCase:
    name = f"{_mode(train)} {words} L{length}" + (f", {kernels}" if kernels != "auto" else "")
    ours, peer = (functools.partial(build, words, length, train) for build in (_attention, _sdpa))
    return HostCase(name, ours, peer, "SDPA", kernels, quick)


def _mode(train: bool) -> str:
    return "train" if train else "eval"


# ------------------------------------------------------------------------------------------------------------ decoding


class _Decoding:
    """One token of one sequence, and a cache that it is put into, contiguous or in pages."""

    def __init__(self, place: Place, in_pages: bool) -> None:
        self.query, self.key, self.value = (place.draw(1, 2, 1, 64) for _ in range(3))
        room, self.held = (1, 0) if place.scale == "least" else (64, 16)
        shape = (4, 2, 16, 64) if in_pages else (1, 2, room, 64)
        self.caches = [place.draw(*shape) for _ in range(2)]
        self.table = torch.arange(4, dtype=torch.int32, device=place.device)[None] if in_pages else None
        self.seqlens = torch.full((1,), self.held, dtype=torch.int32, device=place.device)


def _decode(in_pages: bool, place: Place) -> Step:
    of = _Decoding(place, in_pages)
    words: dict[str, Any] = {"cache_seqlens": of.seqlens, "block_table": of.table}
    call = functools.partial(fastattn.attention_with_kvcache, of.query, *of.caches, of.key, of.value, **words)
    return _step(call, (), train=False)


def _sdpa_decode(place: Place) -> Step:
    """The contiguous cache is written, and its slots in use are attended to."""
    of = _Decoding(place, in_pages=False)

    def attend() -> Tensor:
        for cache, new in zip(of.caches, (of.key, of.value)):
            cache[:, :, of.held : of.held + 1] = new
        keys, values = (cache[:, :, : of.held + 1] for cache in of.caches)
        return F.scaled_dot_product_attention(of.query, keys, values)

    return _step(attend, (), train=False)


# -------------------------------------------------------------------------------------------- norms, additive, module


def _norm(vectors: int, small: int) -> Build:
    """A norm of a sum: ``x``, ``residual``, then weight and, if there are two vectors, bias; ``small`` rows of a
    peer."""

    def build(call: Callable[..., Any], train: bool, place: Place) -> Step:
        rows = [place.draw(place.rows(64, small), 512) for _ in range(2)]
        return _step(call, (*rows, *(place.draw(512) for _ in range(vectors))), train)

    return build


def _eager_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias)


def _eager_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x + residual, weight.shape, weight)


def _additive(call: Callable[..., Any], train: bool, place: Place) -> Step:
    rows = (place.draw(1, place.rows(64, small=4), 64) for _ in range(3))
    return _step(call, (*rows, place.draw(64)), train)


def _eager_additive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(query[:, :, None] + key[:, None]) @ weight, dim=-1) @ value


def _module(kind: Callable[..., nn.MultiheadAttention], train: bool, place: Place) -> Step:
    """Self-attention without weights. Its projections are torch's in either, and are computed: so they are small."""
    size = place.rows(64, small=16) if place.device != "cpu" else 16
    module = kind(size, 2, batch_first=True, device=place.device, dtype=place.dtype).train(train)
    x = torch.randn(1, 4, size, device=place.device, dtype=place.dtype)
    return _step(lambda x, *_: module(x, x, x, need_weights=False), (x, *module.parameters()), train)


def all_cases() -> list[HostCase]:
    """Every call, in the order of the table."""
    found = [
        _of_attention(False, "plain", 64, quick=True),
        _of_attention(False, "causal", 64),
        _of_attention(False, "padding", 64),
        _of_attention(False, "padding", 512),
        _of_attention(False, "causal", 512),
        _of_attention(False, "averaged weights", 64),
        _of_attention(False, "score_mod", 64),
        _of_attention(True, "plain", 64, quick=True),
        _of_attention(True, "causal", 64),
        _of_attention(True, "padding", 512),
        _of_attention(True, "averaged weights", 64),
        _of_attention(True, "score_mod", 64),
        _of_attention(False, "causal", 64, "gluon"),
        _of_attention(True, "causal", 64, "gluon"),
        _of_attention(False, "plain", 64, "triton"),
        _of_attention(False, "causal", 64, "triton"),
        _of_attention(True, "plain", 64, "triton"),
        _of_attention(True, "causal", 64, "triton"),
    ]
    found += [
        HostCase(name, functools.partial(_decode, in_pages), _sdpa_decode, against="SDPA, contiguous", quick=in_pages)
        for name, in_pages in (("decode", False), ("decode pages", True))
    ]
    # on a CPU F.rms_norm is many operators, so that few rows are enough
    rest: list[tuple[str, Build, Callable[..., Any], Callable[..., Any], str]] = [
        ("add_layer_norm", _norm(2, small=64), fastattn.add_layer_norm, _eager_layer_norm, "eager"),
        ("add_rms_norm", _norm(1, small=4), fastattn.add_rms_norm, _eager_rms_norm, "eager"),
        ("additive_attention", _additive, fastattn.additive_attention, _eager_additive, "eager"),
        ("MultiheadAttention", _module, fastattn.MultiheadAttention, nn.MultiheadAttention, "nn.MultiheadAttention"),
    ]
    for name, build, ours, peer, against in rest:
        for train in (False, True):
            steps = (functools.partial(build, call, train) for call in (ours, peer))
            quick = not train and name in ("add_layer_norm", "MultiheadAttention")
            found.append(HostCase(f"{name} {_mode(train)}", *steps, against=against, quick=quick))
    return found
