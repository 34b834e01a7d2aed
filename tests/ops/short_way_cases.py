"""Calls that may take the short way, and what its tests share: tensors in several layouts, both ways of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastattn
from fastattn.ops.additive_attention import api as additive_api
from fastattn.ops.attention import api as attention_api
from fastattn.ops.attention.kvcache import api as kvcache_api
from fastattn.ops.common import short_way
from fastattn.ops.residual_norm import api as norm_api
from tests.machines import DEVICE

WAYS = (attention_api._ARGUMENTS, attention_api._CALLS, norm_api._SHORT, additive_api._CALLS, kvcache_api._ARGUMENTS)
L, D = 5, 8


class Draw:
    """Random tensors of one call.

    Args:
        seed: of the numbers.
        dtype: of floating tensors.
        layout: ``"dense"``; ``"strided"``: heads lie within rows, beside what is none of them, or elements lie apart;
            ``"unaligned"``: their address is no multiple of 16 bytes.

    Attributes:
        leaves: the tensors that gradients are asked of: those made with ``grad``, or what they are views of.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, layout: str = "dense") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.layout = dtype, layout
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator).to(dtype or self.dtype).to(DEVICE)
        if self.layout == "strided":
            heads = numbers.movedim(1, 2) if len(shape) == 4 else numbers
            leaf = torch.cat([heads, heads], 2) if len(shape) == 4 else numbers.repeat_interleave(2, -1)
        elif self.layout == "unaligned":
            leaf = torch.cat([numbers.new_zeros(1), numbers.flatten()])
        else:
            leaf = numbers
        leaf.requires_grad_(grad)
        self.leaves += [leaf] * grad
        if self.layout == "strided":
            return leaf[:, :, : shape[1]].movedim(2, 1) if len(shape) == 4 else leaf[..., ::2]
        return leaf[1:].view(shape) if self.layout == "unaligned" else leaf

    def bools(self, *shape: int) -> Tensor:
        """A boolean mask, of which the first key is True."""
        found = torch.randn(*shape, generator=self.generator) < 0.5
        found[..., 0] = True
        return found.to(DEVICE)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers from 0 to ``high - 1``."""
        return torch.randint(high, shape, generator=self.generator).to(dtype).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------- cases

Case = Callable[[Draw], Any]  # the results of a call on tensors of its own


def _attention(*, batch: int = 1, heads: int = 1, kv_heads: int = 1, keys: int = L, **options: Any) -> Case:
    """Attention; options that are functions are called with the :class:`Draw`."""

    def call(draw: Draw) -> Any:
        made = {name: value(draw) if callable(value) else value for name, value in options.items()}
        query, key, value = (draw(batch, *shape, D) for shape in ((heads, L), (kv_heads, keys), (kv_heads, keys)))
        return fastattn.attention(query, key, value, backend="triton", **made)

    return call


ATTENTION: dict[str, Case] = {
    "plain": _attention(batch=2, heads=2, kv_heads=2),
    "causal": _attention(is_causal=True),
    "bottom_right": _attention(keys=7, is_causal=True, causal_alignment="bottom_right"),
    "window": _attention(window=(2, 1)),
    "window_to_the_right": _attention(window=(None, 1)),
    "prefix": _attention(is_causal=True, prefix=2),
    "prefix_tensor": _attention(batch=2, is_causal=True, prefix=lambda draw: draw.integers(4, 2)),
    "documents": _attention(document_ids=lambda draw: draw.integers(2, 1, L)),
    "documents_of_16_bits": _attention(document_ids=lambda draw: draw.integers(2, 1, L, dtype=torch.int16)),
    "document_pair": _attention(keys=7, document_ids=lambda draw: (draw.integers(2, 1, L), draw.integers(2, 1, 7))),
    "alibi": _attention(alibi_slopes=lambda draw: draw(1)),
    "alibi_of_batch": _attention(batch=2, alibi_slopes=lambda draw: draw(2, 1), is_causal=True),
    "softcap": _attention(softcap=2.0),
    "sinks": _attention(sinks=lambda draw: draw(1)),
    "scale": _attention(scale=0.3),
    "dropout": _attention(dropout_p=0.4),
    "dropout_padding_weights": _attention(
        dropout_p=0.4, key_padding_mask=lambda draw: ~draw.bools(1, L), need_weights=True
    ),
    "weights": _attention(need_weights=True),
    "weights_of_heads": _attention(need_weights=True, average_attn_weights=False),
    "lse": _attention(return_lse=True, need_weights=True),
    "fewer_key_heads": _attention(heads=2),
    "padding": _attention(key_padding_mask=lambda draw: ~draw.bools(1, L)),
    "mask": _attention(attn_mask=lambda draw: draw.bools(L, L)),
    "mask_of_heads": _attention(attn_mask=lambda draw: draw.bools(1, 1, L)),
    "mask_of_all": _attention(attn_mask=lambda draw: draw.bools(1, 1, L, L)),
    "bias": _attention(attn_mask=lambda draw: draw(L, L)),
    "bias_of_keys": _attention(attn_mask=lambda draw: draw(L)),
    "bias_of_heads": _attention(heads=2, attn_mask=lambda draw: draw(2, L, L), is_causal=True),
    "bias_of_all": _attention(batch=2, attn_mask=lambda draw: draw(2, 1, L, L)),
    "everything": _attention(
        attn_mask=lambda draw: draw(1, 1, L, L), key_padding_mask=lambda draw: ~draw.bools(1, L), is_causal=True,
        window=(3, None), prefix=1, document_ids=lambda draw: draw.integers(2, 1, L),
        alibi_slopes=lambda draw: draw(1), softcap=3.0, sinks=lambda draw: draw(1), dropout_p=0.2, need_weights=True,
        return_lse=True,
    ),
}  # fmt: skip


def _norm(function: Any, *shape: int, residual: bool = True, **options: Any) -> Case:
    """A fused norm of rows of this shape; options that are functions are called with the :class:`Draw`."""
    shape = shape or (3, D)

    def call(draw: Draw) -> Any:
        made = {name: value(draw) if callable(value) else value for name, value in options.items()}
        return function(draw(*shape), draw(*shape) if residual else None, backend="triton", **made)

    return call


def _vector(draw: Draw) -> Tensor:
    return draw(D)


def _channels_last(draw: Draw) -> Any:
    x, residual = (draw(2, 3, 2, 4).to(memory_format=torch.channels_last) for _ in range(2))
    return fastattn.add_rms_norm(x, residual, draw(4), backend="triton")


_vectors = {"weight": _vector, "bias": _vector}
NORMS: dict[str, Case] = {
    "layer": _norm(fastattn.add_layer_norm, **_vectors),
    "layer_weight_alone": _norm(fastattn.add_layer_norm, weight=_vector),
    "layer_without_vectors": _norm(fastattn.add_layer_norm),
    "layer_without_residual": _norm(fastattn.add_layer_norm, residual=False, **_vectors),
    "layer_of_bias": _norm(fastattn.add_layer_norm, residual=False, x_bias=_vector, **_vectors),
    "layer_of_all": _norm(
        fastattn.add_layer_norm, 2, 3, D, x_bias=_vector, row_scale=lambda draw: draw(2, 1), dropout_p=0.3,
        return_residual=True, unit_offset=True, **_vectors,
    ),
    "layer_row_scale": _norm(fastattn.add_layer_norm, row_scale=lambda draw: draw(3), **_vectors),
    "layer_row_scale_broadcast": _norm(fastattn.add_layer_norm, 4, 7, D, row_scale=lambda draw: draw(4, 1)),
    "layer_row_scale_constant": _norm(fastattn.add_layer_norm, row_scale=lambda draw: draw(3, grad=False), **_vectors),
    "layer_dropout": _norm(fastattn.add_layer_norm, dropout_p=0.5, return_residual=True, **_vectors),
    "layer_axes": _norm(
        fastattn.add_layer_norm, 3, 2, 4, normalized_shape=(2, 4), weight=lambda draw: draw(2, 4),
        x_bias=lambda draw: draw(2, 4), return_residual=True,
    ),
    "layer_residual_in_float32": _norm(
        fastattn.add_layer_norm, residual_dtype=torch.float32, return_residual=True, **_vectors
    ),
    "layer_out_in_float32": _norm(fastattn.add_layer_norm, out_dtype=torch.float32, **_vectors),
    "layer_vectors_of_two_dtypes": _norm(
        fastattn.add_layer_norm, weight=lambda draw: draw(D, dtype=torch.float16), bias=_vector
    ),
    "rms": _norm(fastattn.add_rms_norm, weight=_vector, return_residual=True),
    "rms_unit_offset": _norm(fastattn.add_rms_norm, weight=_vector, unit_offset=True, eps=1e-3),
    "rms_channels_last": _channels_last,
    "layer_norm": lambda draw: fastattn.layer_norm(draw(3, D), (D,), draw(D), draw(D), backend="triton"),
    "layer_norm_axes": lambda draw: fastattn.layer_norm(draw(3, 2, 4), (2, 4), draw(2, 4), backend="triton"),
    "rms_norm": lambda draw: fastattn.rms_norm(draw(3, D), D, draw(D), backend="triton"),
}  # fmt: skip


def _additive(*, heads: int = 0, **options: Any) -> Case:
    """Additive attention, of three dimensions if there are no heads."""

    def call(draw: Draw) -> Any:
        made = {name: value(draw) if callable(value) else value for name, value in options.items()}
        lead = (1, heads) if heads else (2,)
        query, key, value = draw(*lead, 3, 4), draw(*lead, 5, 4), draw(*lead, 5, 2)
        return fastattn.additive_attention(query, key, value, draw(4), backend="triton", **made)

    return call


ADDITIVE: dict[str, Case] = {
    "plain": _additive(),
    "heads": _additive(heads=2, need_weights=True),
    "masks": _additive(
        is_causal=True, attn_mask=lambda draw: draw(3, 5), key_padding_mask=lambda draw: ~draw.bools(2, 5)
    ),
    "mask_of_all": _additive(
        heads=1, attn_mask=lambda draw: draw.bools(1, 1, 3, 5), need_weights=True, average_attn_weights=False
    ),
}


def _multihead(**options: Any) -> Case:
    def call(draw: Draw) -> Any:
        torch.manual_seed(5)
        module = fastattn.MultiheadAttention(D, 1, batch_first=True, backend="triton", dropout=0.2)
        module.to(DEVICE, draw.dtype)
        draw.leaves += list(module.parameters())
        made = {name: value(draw) if callable(value) else value for name, value in options.items()}
        x = draw(1, L, D)
        found = module(x, x, x, **made)
        return tuple(each for each in found if each is not None)

    return call


MULTIHEAD: dict[str, Case] = {
    "weights": _multihead(),
    "masks": _multihead(
        need_weights=False, key_padding_mask=lambda draw: ~draw.bools(1, L), attn_mask=lambda draw: draw(L, L)
    ),
}


# ------------------------------------------------------------------------------------------------------------ both ways


def forget() -> None:
    """Forget every signature that was met."""
    for way in WAYS:
        way.clear()


@contextlib.contextmanager
def long_way() -> Generator[None]:
    """No call takes the short way."""
    with mock.patch.object(short_way.ShortWay, "key", return_value=None):
        yield


class Taken:
    """How often calls went by a plan.

    Attributes:
        forwards: calls that took the short way.
        planned: those of them that ran a plan that was written down before.
        backwards: their backwards by a plan that was written down before.
    """

    def __init__(self) -> None:
        self.forwards = self.planned = self.backwards = 0


@contextlib.contextmanager
def counted() -> Generator[Taken]:
    """Count what goes by plans."""
    taken, entry = Taken(), short_way._Entry
    forward, backward_key = entry.forward, entry._backward_key

    def counting_forward(self: Any, tensors: Any) -> Any:
        taken.forwards += 1
        taken.planned += self._forward is not None
        return forward(self, tensors)

    def counting_key(self: Any, *arguments: Any) -> Any:
        key = backward_key(self, *arguments)
        taken.backwards += key is not None and self._backwards.get(key) is not None
        return key

    with (
        mock.patch.object(entry, "forward", counting_forward),
        mock.patch.object(entry, "_backward_key", counting_key),
    ):
        yield taken


def tensors_of(results: Any) -> tuple[Tensor, ...]:
    """What a public function returned, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def results_and_gradients(case: Case, draw: Draw) -> list[Tensor]:
    """The results of a call, and the gradients of all its leaves."""
    torch.manual_seed(draw.generator.initial_seed())  # of the dropout
    results = tensors_of(case(draw))
    cotangents = [torch.randn(t.shape, generator=draw.generator).to(t) for t in results]
    return [*(t.detach() for t in results), *torch.autograd.grad(results, draw.leaves, cotangents)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise unless these are the same to the last bit, and lie alike in memory."""
    assert len(actual) == len(expected)
    for number, (found, wanted) in enumerate(zip(actual, expected)):
        assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), number
        assert torch.equal(found, wanted), f"{number}: {(found - wanted).abs().max()}"
