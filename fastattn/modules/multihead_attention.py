"""``nn.MultiheadAttention`` over this package's attention: one projection, strided views, one fused call."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import has_torch_function

from fastattn.modules._common import check_backend, plain_twin
from fastattn.modules._mha_arguments import TENSORS, Arguments, arguments_of
from fastattn.modules._mha_compute import Inputs, Words, attend, is_taken_as_causal
from fastattn.modules._mha_direct import attend as attend_directly
from fastattn.modules._mha_jagged import attend_jagged
from fastattn.modules._mha_masks import check_causal_hint, check_dimensions, check_types
from fastattn.modules._tracing import leaf_node
from fastattn.ops.attention import on_triton
from fastattn.ops.attention.api import run
from fastattn.ops.attention.contract import AttentionCall
from fastattn.ops.common import backends
from fastattn.ops.common.backends import Backend
from fastattn.ops.common.checks import check_dense, is_autocast_enabled
from fastattn.ops.common.short_way import ShortWay
from fastattn.ops.common.tracing import is_symbolically_traced


def _kernels_side() -> ModuleType:
    from fastattn.modules import _mha_kernels  # imports triton

    return _mha_kernels


_CALLS = ShortWay(_kernels_side, Arguments)  # in inference


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with the same parameters, arguments and results, on fused kernels.

    Parameters, their names, initialisation and order, and with them checkpoints in both directions, are torch's.

    Args:
        embed_dim: size ``E`` of the model.
        num_heads: number ``H`` of heads; divides ``embed_dim``.
        dropout: probability of dropping a weight in training.
        bias: add biases in the input and output projections.
        add_bias_kv: append a learned key and value to every sequence.
        add_zero_attn: append a key and a value of zeros to every sequence.
        kdim: number of features of the keys; default ``embed_dim``.
        vdim: number of features of the values; default ``embed_dim``.
        batch_first: sequences are ``[N, L, E]`` instead of ``[L, N, E]``.
        device: where to make the parameters.
        dtype: of which type to make them.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, as for :func:`fastattn.attention`; default what
            :func:`fastattn.use_backend` says at the call.

    Raises:
        ValueError: ``embed_dim`` or ``num_heads`` is not positive, or ``backend`` is unknown.
        AssertionError: ``num_heads`` does not divide ``embed_dim`` (torch's own error type).

    Where it differs from ``nn.MultiheadAttention``, on purpose:

    * A query that may see no key gets zero attention, so that its output is ``out_proj.bias``, and finite gradients,
      with weights or without, in training and evaluation. In torch it is NaN in most cases, and so are the gradients
      of the whole batch.
    * ``is_causal=True`` without ``attn_mask`` raises RuntimeError in evaluation too, as torch does in training. There
      torch silently computes attention that is not causal. Errors are the same in both modes throughout.
    * More shapes of ``attn_mask`` are accepted; see :meth:`forward`.
    * Averaged weights take O(N L S) memory, not O(N H L S); on a CPU beyond 2^21 scores (2^22 in training), below
      which all of them are made at once, as in torch.
    * With ``need_weights=False``, double backward and forward-mode AD work on the Triton backend.
    * The output is contiguous, where torch's is a transposed view with ``batch_first=True`` in training. So a dropout
      layer behind it draws in another order; the dropout inside is torch's under one seed, on the torch backend.
    * Jagged nested tensors ``[N, j, E]`` (``torch.nested``, :func:`fastattn.pack`) are taken without weights, with
      masks by positions inside a sequence, and with ``is_causal=True`` without a mask; torch refuses them.
    * ``torch.jit.script`` cannot compile the kernels: it gets ``nn.MultiheadAttention`` with the same parameters, and a
      warning says so. Script a copy: TorchScript puts what it compiles into the model it is given.
    * As the root of what ``torch.fx`` traces, and where it has hooks, it is torch's function in that graph, and rows
      that see nothing are torch's; inside a model it is one node.
    * An ``out_proj`` without a ``weight``, or a quantised one, is called; torch cannot use it.

    Inside ``nn.TransformerEncoderLayer`` torch's fused inference path never calls ``self_attn``;
    :class:`fastattn.TransformerEncoderLayer` decides itself what calls it, and :func:`fastattn.fuse` switches torch's
    path off where this module was put into torch's layer by hand.
    """

    backend: Backend | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if backend is not None:
            self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``. In both masks True means "not allowed", floats are added.

        Args:
            query: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; or ``[L, E]`` without a batch.
            key: ``[N, S, kdim]``, ``[S, N, kdim]`` or ``[S, kdim]``.
            value: ``[N, S, vdim]``, ``[S, N, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[N, S]``, or ``[S]`` without a batch; boolean (True = padding) or floating.
            need_weights: also return the weights. Without them no ``L x S`` tensor is made.
            attn_mask: ``[L, S]`` or ``[N * H, L, S]`` (without a batch ``[H, L, S]``); beyond torch also ``[N, L, S]``,
                ``[N, H, L, S]``, and 1 in place of any of these. Boolean (True = not allowed) or floating, of the
                query's dtype or float32.
            average_attn_weights: the weights averaged over heads instead of one set a head.
            is_causal: a promise that ``attn_mask`` is the causal mask. Where neither weights nor ``key_padding_mask``
                are given the mask is then not read, and keys ``j > i`` are hidden from query ``i``, those of
                ``add_bias_kv`` and ``add_zero_attn`` included; elsewhere the promise is ignored. As in torch's
                training mode; its evaluation mode sometimes reads the mask instead.

        Returns:
            The output in the query's layout, and the weights, after dropout, or None. Weights are ``[N, L, S']``
            averaged, ``[N, H, L, S']`` not, ``N`` left out without a batch; ``S'`` counts the appended keys too.

        Raises:
            AssertionError, RuntimeError: what ``nn.MultiheadAttention`` raises in training, with its message.
            NotImplementedError: the backend asked for by name refuses; the message lists its reasons.
        """
        given = (query, key, value, key_padding_mask, attn_mask)
        if has_torch_function(given) and is_symbolically_traced(*given):
            return self._recorded(*given[:4], need_weights, attn_mask, average_attn_weights, is_causal)
        signature = None
        if getattr(query, "is_cpu", False):
            found = attend_directly(
                self, self.backend, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
            if found is not None:
                return found
        if not self.training and query.device.type in backends.DEVICES and not torch.is_grad_enabled():
            flags = need_weights, average_attn_weights, is_causal
            arguments = arguments_of(self, self.backend, *given, *flags)
            if arguments is not None and not is_autocast_enabled(query.device):
                values = arguments[:TENSORS]
                signature = _CALLS.key(values, arguments[TENSORS:])
                if signature is not None and (entry := _CALLS.find(signature, arguments)) is not None:
                    found = entry(values)
                    return found if need_weights else (found, None)
        # Each read once: nn.Module takes its time to find a parameter.
        in_weight, in_bias, out_proj = self.in_proj_weight, self.in_proj_bias, self.out_proj
        out_weight, out_bias = getattr(out_proj, "weight", None), getattr(out_proj, "bias", None)
        bias_k, bias_v = self.bias_k, self.bias_v
        tensors = (query, key, value, in_weight, in_bias, bias_k, bias_v, out_weight, out_bias)
        weights_words = need_weights, average_attn_weights
        parameters = in_weight, in_bias, bias_k, bias_v
        if query.layout is torch.jagged:
            # without a mask too, unlike below: no mask is of the shape of all sequences
            is_causal = is_causal and (attn_mask is None or key_padding_mask is None)
            described = self._described(given, parameters, is_causal, *weights_words)
            back = functools.partial(self._project_back, out_weight, out_bias)
            return attend_jagged(*described, self.backend, back), None
        if query.is_nested or key.is_nested or value.is_nested or _is_overridden(tensors):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if key_padding_mask is not None or attn_mask is not None:
            check_types(key_padding_mask, attn_mask)
        check_dimensions(query, key, value, key_padding_mask, attn_mask)
        if is_causal:
            check_causal_hint(attn_mask)
            is_causal = is_taken_as_causal(key_padding_mask, need_weights)
        inputs, words = self._described(given, parameters, is_causal, *weights_words)
        try:
            merged, weights = attend(inputs, words, functools.partial(self._run, signature))
        except RuntimeError:  # NotImplementedError is one
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                check_dense(name, tensor)
            raise
        return self._project_back(out_weight, out_bias, merged), weights

    def _described(
        self,
        given: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        parameters: tuple[Tensor | None, ...],
        is_causal: bool,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Inputs, Words]:
        """A call as a function of tensors and words."""
        in_weight, in_bias, bias_k, bias_v = parameters
        in_weights = None if self._qkv_same_embed_dim else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return Inputs(*given, in_weight, in_weights, in_bias, bias_k, bias_v), Words(
            self.embed_dim,
            self.num_heads,
            self.embed_dim // self.num_heads,
            self.batch_first,
            self.add_zero_attn,
            is_causal,
            self._dropout_p(need_weights) if self.training else 0.0,
            ("average" if average_attn_weights else "heads") if need_weights else "none",
        )

    def _project_back(self, weight: Any, bias: Tensor | None, merged: Tensor) -> Tensor:
        if isinstance(weight, Tensor):  # no call of the module, as in torch: its hooks see nothing
            return F.linear(merged, weight, bias)
        return self.out_proj(merged)  # quantised, or another module in its place, that torch cannot use

    def _recorded(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: bool,
        attn_mask: Any,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> Any:
        """What a graph of ``torch.fx`` gets: this module as one node, or, where that cannot be, torch's function."""
        flags = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        node = leaf_node(self, query, key, value, **flags)
        if node is not None:
            return node
        if self.batch_first:  # nobody knows here whether there is a batch; where there is none, this changes nothing
            moved = {id(x): x.movedim(0, -2) for x in (query, key, value)}  # one Proxy stays one: self-attention
            query, key, value = (moved[id(x)] for x in (query, key, value))
        same = self._qkv_same_embed_dim
        output, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
            training=self.training, use_separate_proj_weight=not same,
            q_proj_weight=None if same else self.q_proj_weight, k_proj_weight=None if same else self.k_proj_weight,
            v_proj_weight=None if same else self.v_proj_weight, **flags,
        )  # fmt: skip
        return output.movedim(0, -2) if self.batch_first else output, weights

    def _run(self, signature: Hashable | None, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention; where the kernels have run it, the next call of this signature takes the short way."""
        results = run(call, self.backend)
        if signature is not None and backends.choose(call, self.backend, on_triton.refusals) == "triton":
            _CALLS.remember(signature)
        return results

    def _dropout_p(self, need_weights: bool) -> float:
        """The training probability, or torch's errors for what is none: they differ with ``need_weights``."""
        p = self.dropout
        if 0.0 <= p <= 1.0:
            return p
        if p < 0.0 and need_weights:
            return 0.0  # torch ignores it there
        error = ValueError if need_weights else RuntimeError
        raise error(f"dropout probability has to be between 0 and 1, but got {p}")

    def __prepare_scriptable__(self) -> nn.MultiheadAttention:
        """What ``torch.jit.script`` compiles in this module's place."""
        return plain_twin(self, nn.MultiheadAttention, "backend")


def _is_overridden(tensors: tuple[Tensor | None, ...]) -> bool:
    """Does an input or a parameter take over functions? Then the whole call is torch's to hand over."""
    # True under a function mode too (torch.device as a context is one), which sees every call made here anyway.
    return has_torch_function(tensors) and any(map(_takes_over_functions, tensors))


def _takes_over_functions(value: object) -> bool:
    """Is ``value`` of a type with a ``__torch_function__`` of its own, neither disabled nor inherited from Tensor?"""
    override = getattr(type(value), "__torch_function__", None)
    if override is None or override is Parameter.__torch_function__:
        return False
    return getattr(override, "__func__", override) is not Tensor.__torch_function__.__func__
