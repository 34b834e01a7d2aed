"""The lecture's attention layer of recurrent networks: queries and keys scored by a small network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.modules._common import check_backend
from fastattn.ops import additive_attention
from fastattn.ops.common.backends import Backend


class AdditiveAttention(nn.Module):
    """``softmax(w . tanh(W q_i + U k_j)) V`` (arXiv:1409.0473), the alignment model of sequence-to-sequence networks.

    Args:
        query_dim: size of the queries, as of a decoder's states.
        key_dim: size of the keys, as of an encoder's states.
        attention_dim: size of the layer that scores them.
        bias: learn biases in the two projections.
        device: where to make the parameters.
        dtype: of which type to make them.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, as for :func:`fastattn.additive_attention`; default what
            :func:`fastattn.use_backend` says at the call.

    Attributes:
        query_projection: ``W``, an ``nn.Linear``.
        key_projection: ``U``, an ``nn.Linear``.
        weight: ``w``, ``[attention_dim]``.

    Raises:
        ValueError: a size is not positive, or ``backend`` is unknown.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("attention_dim", attention_dim)):
            if size <= 0:
                raise ValueError(f"{name}={size}: expected a positive number")
        self.backend: Backend | None = backend
        self.query_projection = nn.Linear(query_dim, attention_dim, bias=bias, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_dim, attention_dim, bias=bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(attention_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the weight as that of an ``nn.Linear`` with one output."""
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        bound = 1 / math.sqrt(self.weight.shape[0])
        nn.init.uniform_(self.weight, -bound, bound)

    def project_key(self, key: Tensor) -> Tensor:
        """``U k``, ``[B, S, attention_dim]``: a decoder computes it once and passes it to every step."""
        return self.key_projection(key)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        projected_key: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """A context vector for every query.

        Args:
            query: ``[B, L, query_dim]``.
            key: ``[B, S, key_dim]``.
            value: ``[B, S, value_dim]``; default the key.
            projected_key: what :meth:`project_key` made of the key.
            key_padding_mask: boolean ``[B, S]``, True = padding.
            attn_mask: boolean (True = may attend) or floating (added to the scores), broadcastable to ``[B, L, S]``.
            is_causal: query ``i`` sees keys ``j <= i``.
            need_weights: also return the weights.

        Returns:
            The context ``[B, L, value_dim]``, zero for a query that may see no key, and the weights ``[B, L, S]`` or
            None.

        Raises:
            TypeError, ValueError, NotImplementedError: as :func:`fastattn.additive_attention`.
        """
        result: Any = additive_attention(
            self.query_projection(query),
            self.project_key(key) if projected_key is None else projected_key,
            key if value is None else value,
            self.weight,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            backend=self.backend,
        )
        return (result[0], result[1]) if need_weights else (result, None)

    def extra_repr(self) -> str:
        """Sizes are those of the projections; what is left is the backend."""
        return "" if self.backend is None else f"backend={self.backend!r}"
