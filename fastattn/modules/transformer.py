"""``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer`` of this package's attention and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_variadic

from fastattn.modules import _layer_inference
from fastattn.modules._common import check_backend, plain_twin
from fastattn.modules._tracing import leaf_node
from fastattn.modules.multihead_attention import MultiheadAttention
from fastattn.modules.norm import AddLayerNorm, AddRMSNorm
from fastattn.ops.attention.jagged import nested_like, packed
from fastattn.ops.common.backends import Backend
from fastattn.ops.common.tracing import is_symbolically_traced

_Masks = tuple[Tensor | None, Tensor | None, bool]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` with the same parameters, arguments and results, of fused parts.

    ``self_attn`` is a :class:`fastattn.MultiheadAttention`, ``norm1`` and ``norm2`` are :class:`fastattn.AddLayerNorm`.
    Wherever a norm follows a residual add, the add, the dropout in front of it and the norm are one operation: both of
    them in a post-norm layer, the first in a pre-norm layer. Parameters, their names, initialisation and order, and
    with them checkpoints in both directions, are torch's.

    Args:
        d_model: size ``E`` of the model.
        nhead: number ``H`` of heads; divides ``d_model``.
        dim_feedforward: size between the two linear layers.
        dropout: probability of dropping, in training: attention weights, what each block adds to ``src``, and what the
            activation gives.
        activation: ``"relu"``, ``"gelu"``, or anything that takes and gives a tensor.
        layer_norm_eps: added to the variances.
        batch_first: sequences are ``[N, L, E]`` instead of ``[L, N, E]``.
        norm_first: normalise what enters each block (pre-norm) instead of what leaves its add (post-norm).
        bias: learn biases, those of the norms included.
        device: where to make the parameters.
        dtype: of which type to make them.
        backend: of attention and norms: ``"auto"``, ``"triton"`` or ``"torch"``; default what
            :func:`fastattn.use_backend` says at the call.

    Raises:
        ValueError: ``d_model`` or ``nhead`` is not positive, ``dropout`` is no probability, or ``backend`` is unknown.
        AssertionError: ``nhead`` does not divide ``d_model`` (torch's own error type).
        RuntimeError: ``activation`` is another string.

    Where it differs from torch's layer, on purpose:

    * It computes in evaluation what it computes in training. On a CPU, with gradients off, it does so without a call of
      the modules inside, as torch's fused inference path does, and for small unmasked calls by torch's function; but
      never by taking every ``nn.GELU`` for the exact one. ``activation_relu_or_gelu``, by which an
      ``nn.TransformerEncoder`` chooses that path, is always 0, so that it makes no nested tensors of its own; made with
      ``enable_nested_tensor=True``, its default, it warns of that.
    * What padded positions hold is nobody's to read: there, where much of a batch is padding
      (``src_key_padding_mask``), they are left out and zero, as in torch's path with nested tensors, so that they cost
      nothing; elsewhere they hold what the layer computes for them.
    * Rows that may see nothing, and ``is_causal=True`` without a mask, are as in :class:`fastattn.MultiheadAttention`,
      whose list goes for the dropout's order as well.
    * Boolean masks reach the attention as they are, not as floats. An ``nn.TransformerEncoder`` makes floats of them
      all the same: called without it, layers skip what is hidden, and NaN in padding stays where it is.
    * A norm gets ``(block output, residual=src)`` instead of the sum. Put a hook or another module in its place, or in
      that of the dropout in front, and it gets what it gets in torch; the operations are then separate.

    Jagged nested tensors ``[N, j, E]`` (see :func:`fastattn.pack`) are taken in training and evaluation, whatever
    ``batch_first`` says. Others go to torch's implementation, and so does a subclass, or a layer, with an
    ``_sa_block``, ``_mha_block`` or ``_ff_block`` of its own, which it then calls.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _make_parts_ours(self, backend)
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from ``src`` to itself, then feed it forward. In masks True means "not allowed", floats are added.

        Args:
            src: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; or ``[L, E]`` without a batch.
            src_mask: ``[L, L]`` or ``[N * H, L, L]``, or what else :meth:`fastattn.MultiheadAttention.forward` takes.
            src_key_padding_mask: ``[N, L]``, or ``[L]`` without a batch.
            is_causal: a promise that ``src_mask`` is the causal mask; without padding it is then not read.

        Returns:
            A tensor like ``src``.

        Raises:
            AssertionError, RuntimeError: what ``nn.TransformerEncoderLayer`` raises in training.
            ValueError: ``src`` is not ``E`` wide, with ``norm_first``.
            NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
        """
        tensors = (src, src_mask, src_key_padding_mask)
        traced = has_torch_function_variadic(*tensors) and is_symbolically_traced(*tensors)
        if traced:
            node = leaf_node(
                self, src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
            if node is not None:
                return node
        jagged = not traced and src.layout is torch.jagged
        if (not traced and src.is_nested and not jagged) or _has_blocks_of_its_own(self, nn.TransformerEncoderLayer):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        src_mask, src_key_padding_mask = _checked_masks(src, src_mask, src_key_padding_mask)
        masks = (src_mask, src_key_padding_mask, is_causal)
        if jagged:
            return _of_packed_rows(self._encoded, src, masks)
        output = None if traced else _layer_inference.encode(self, src, masks)
        if output is not None:
            return output
        return self._encoded(src, masks, _attend)

    def _encoded(self, x: Tensor, masks: _Masks, attend: Callable[..., Tensor]) -> Tensor:
        if self.norm_first:
            normed = self.norm1(x)
            attended = attend(self.self_attn, normed, normed, *masks)
            normed, x = _add_norm(self.norm2, self.dropout1, attended, x, return_residual=True)
            return x + self.dropout2(_feed_forward(self, normed))
        x = _add_norm(self.norm1, self.dropout1, attend(self.self_attn, x, x, *masks), x)
        return _add_norm(self.norm2, self.dropout2, _feed_forward(self, x), x)

    def __prepare_scriptable__(self) -> nn.TransformerEncoderLayer:
        """What ``torch.jit.script`` compiles in this module's place."""
        plain = plain_twin(self, nn.TransformerEncoderLayer)
        plain.activation_relu_or_gelu = fused_activation(self.activation)
        return plain


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` with the same parameters, arguments and results, of fused parts.

    ``self_attn`` and ``multihead_attn`` are :class:`fastattn.MultiheadAttention`, the three norms
    :class:`fastattn.AddLayerNorm`. Arguments, errors and what is fused are those of :class:`TransformerEncoderLayer`,
    and so are the differences from torch's layer, but for the fused inference path and the nested tensors, which a
    decoder has not. One is its own: a copy keeps an ``activation`` that is a module, where torch's, in an
    ``nn.TransformerDecoder`` for one, has ReLU.

    Args:
        d_model: as for :class:`TransformerEncoderLayer`, and so are all the others.
        nhead: as there.
        dim_feedforward: as there.
        dropout: as there.
        activation: as there.
        layer_norm_eps: as there.
        batch_first: as there.
        norm_first: as there.
        bias: as there.
        device: as there.
        dtype: as there.
        backend: as there.

    Raises:
        ValueError, AssertionError, RuntimeError: as :class:`TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _make_parts_ours(self, backend)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Attend from ``tgt`` to itself, then to ``memory``, then feed it forward. Masks as in the encoder's layer.

        Args:
            tgt: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; or ``[L, E]`` without a batch.
            memory: ``[N, S, E]``, ``[S, N, E]`` or ``[S, E]``.
            tgt_mask: ``[L, L]`` or ``[N * H, L, L]``, or what else :meth:`fastattn.MultiheadAttention.forward` takes.
            memory_mask: ``[L, S]`` or ``[N * H, L, S]``, or what else it takes.
            tgt_key_padding_mask: ``[N, L]``, or ``[L]`` without a batch.
            memory_key_padding_mask: ``[N, S]``, or ``[S]`` without a batch.
            tgt_is_causal: a promise that ``tgt_mask`` is the causal mask; without padding it is then not read.
            memory_is_causal: the same of ``memory_mask``.

        Returns:
            A tensor like ``tgt``.

        Raises:
            AssertionError, RuntimeError: what ``nn.TransformerDecoderLayer`` raises.
            ValueError: ``tgt`` is not ``E`` wide, with ``norm_first``.
            NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
        """
        tensors = (tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if has_torch_function_variadic(*tensors) and is_symbolically_traced(*tensors):
            node = leaf_node(
                self, tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal,
            )  # fmt: skip
            if node is not None:
                return node
        if _has_blocks_of_its_own(self, nn.TransformerDecoderLayer):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
        masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        memory_masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if tgt.layout is torch.jagged:
            return _of_packed_rows(self._decoded, tgt, memory, masks, memory_masks)
        output = _layer_inference.decode(self, tgt, memory, masks, memory_masks)
        if output is not None:
            return output
        return self._decoded(tgt, memory, masks, memory_masks, _attend)

    def _decoded(
        self, x: Tensor, memory: Tensor, masks: _Masks, memory_masks: _Masks, attend: Callable[..., Tensor]
    ) -> Tensor:
        if self.norm_first:
            normed = self.norm1(x)
            attended = attend(self.self_attn, normed, normed, *masks)
            normed, x = _add_norm(self.norm2, self.dropout1, attended, x, return_residual=True)
            attended = attend(self.multihead_attn, normed, memory, *memory_masks)
            normed, x = _add_norm(self.norm3, self.dropout2, attended, x, return_residual=True)
            return x + self.dropout3(_feed_forward(self, normed))
        x = _add_norm(self.norm1, self.dropout1, attend(self.self_attn, x, x, *masks), x)
        x = _add_norm(self.norm2, self.dropout2, attend(self.multihead_attn, x, memory, *memory_masks), x)
        return _add_norm(self.norm3, self.dropout3, _feed_forward(self, x), x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # As torch's encoder layer does it: its decoder layer misses an activation that is a module, and makes it ReLU.
        nn.Module.__setstate__(self, state)
        if not hasattr(self, "activation"):
            self.activation = F.relu

    def __prepare_scriptable__(self) -> nn.TransformerDecoderLayer:
        """What ``torch.jit.script`` compiles in this module's place."""
        return plain_twin(self, nn.TransformerDecoderLayer)


def fused_activation(activation: object) -> int:
    """What torch keeps as ``activation_relu_or_gelu``: 1, 2, or 0 for an activation that its fused path has not."""
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0


def _make_parts_ours(layer: nn.Module, backend: Backend | None) -> None:
    """Make the attention and the norms that torch has just put into ``layer`` those of this package."""
    # Their class and not the modules: so parameters, and the random numbers they were drawn from, are torch's.
    for part in layer.children():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = MultiheadAttention
        elif type(part) is nn.LayerNorm:
            part.__class__ = AddLayerNorm
        else:
            continue
        if backend is not None:
            part.__dict__["backend"] = backend  # as nn.Module keeps what is no tensor


def _checked_masks(
    src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks, of one kind; torch's errors and warning, under the names that they have here."""
    mask_dtype = F._none_or_dtype(src_mask)
    if src_mask is not None and src_key_padding_mask is not None and src_key_padding_mask.dtype != mask_dtype:
        src_key_padding_mask = F._canonical_mask(
            src_key_padding_mask, "src_key_padding_mask", mask_dtype, "src_mask", src.dtype
        )
        return F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, False), src_key_padding_mask
    for name, mask in (("src_key_padding_mask", src_key_padding_mask), ("src_mask", src_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    return src_mask, src_key_padding_mask


def _attend(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return attention(
        x,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
    )[0]


def _of_packed_rows(layer: Callable[..., Tensor], src: Tensor, *rest: Any) -> Tensor:
    """A layer of a jagged nested tensor: everything but attention is computed row by row, and so on the packed rows
    themselves. The memory of a decoder stays as it is."""

    def attend(attention: nn.Module, x: Tensor, memory: Tensor, *masks: Any) -> Tensor:
        nested = nested_like(x, src)
        output: Any = _attend(attention, nested, nested if memory is x else memory, *masks)
        return output.values()

    rows, _ = packed("src", src)
    return nested_like(layer(rows, *rest, attend), src)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


def _add_norm(norm: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor, return_residual: bool = False) -> Any:
    """``norm(residual + dropout(x))``, or the pair of it and the sum: in one operation unless somebody watches."""
    if not isinstance(norm, (AddLayerNorm, AddRMSNorm)) or _is_hooked(norm) or is_symbolically_traced(x, residual):
        total = residual + dropout(x)
        return (norm(total), total) if return_residual else norm(total)
    if type(dropout) is nn.Dropout and not _is_hooked(dropout):
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        x, dropout_p = dropout(x), 0.0
    return norm(
        x,
        residual,
        dropout_p=dropout_p,
        # Autocast gives the block a lower dtype than the residual's, which is that of the layer.
        out_dtype=None if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype),
        return_residual=return_residual,
    )


def _is_hooked(module: nn.Module) -> bool:
    """Does somebody look at what this module is called with, or at what it gives?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def _has_blocks_of_its_own(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Has somebody put other blocks into the layer than torch's, by a subclass or by hand?"""
    return any(
        name in vars(layer) or getattr(type(layer), name, None) is not getattr(kind, name, None)
        for name in ("_sa_block", "_mha_block", "_ff_block")
    )
